"""Nodes beside each other: rates of the same work on each, and which of them are slow. Pure, and without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Record = dict[str, Any]

SLOW, OF_TWO = 0.7, 0.5
"""Of the median; of the other, where there are two."""


def rates(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """What is compared: name -> node -> its rate, that of its slowest rank; the higher the better."""
    compute, memory = (_slowest(records, of) for of in (_products_s, lambda record: record["speed"]["memory_gb_s"]))
    return {"compute": compute, "memory bandwidth": memory, "link": _links(records)}


def _products_s(record: Record) -> float:
    return 1.0 / float(record["speed"]["matmul_s"])


def _slowest(records: Sequence[Record], rate: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in records:
        if "speed" in record:
            node = str(record["node"])
            found[node] = min(found.get(node, rate(record)), rate(record))
    return found


def _links(records: Sequence[Record]) -> dict[str, float]:
    """Of each rank the best of its links, in or out, since a slow one may be its partner's fault; of a node the worst."""
    best: dict[int, float] = {}
    nodes = {int(record["rank"]): str(record["node"]) for record in records}
    for record in records:
        for link in record.get("links", ()):
            for rank in (int(record["rank"]), int(link["from"])):
                best[rank] = max(best.get(rank, 0.0), float(link["gb_s"]))
    found: dict[str, float] = {}
    for rank, rate in best.items():
        if rank in nodes:
            found[nodes[rank]] = min(found.get(nodes[rank], rate), rate)
    return found


def slower(rates_of: Mapping[str, float]) -> dict[str, float]:
    """Node -> its rate as a share of what is usual, of the nodes that are slow.

    Of three or more: below 0.7 of the median. Of two: less than half of the other.
    """
    two = len(rates_of) == 2
    usual, bound = (max(rates_of.values()), OF_TWO) if two else (_median(rates_of.values()), SLOW)
    shares = {node: round(rate / max(usual, 1e-12), 3) for node, rate in rates_of.items()}
    return {node: share for node, share in shares.items() if share < bound}


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values) or [0.0]
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
