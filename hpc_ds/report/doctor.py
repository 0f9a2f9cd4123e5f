"""What the doctor tells a person: a line a node, and the findings. Pure; the judgement itself is ``runtime/verdict.py``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from hpc_ds.runtime.compare import rates
from hpc_ds.runtime.verdict import failed, nodes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hpc_ds.runtime.verdict import Finding, Record

TITLES = (
    "node", "", "ranks", "cores", "GPUs", "memory", "disk", "clock", "matmul", "copy", "link", "versions",
)  # fmt: skip
TO_THE_RIGHT = TITLES[2:-1]
_SHOWN_VERSIONS = ("hpc_ds", "python", "torch", "cuda", "hip", "nccl", "driver")


def summary_of(records: Sequence[Record], findings: Sequence[Finding], nodes: Sequence[str]) -> list[dict[str, Any]]:
    """Each node in short, in the order given; null where nothing is known.

    Args:
        records: of all ranks.
        findings: about them.
        nodes: their names; one that did not report has a line too.
    """
    by_node, found = nodes_of(records), rates(records)
    worst: dict[str, str] = {}
    for one in findings:
        worst[one.node] = "fail" if "fail" in {one.level, worst.get(one.node)} else one.level
    lines = []
    for node in dict.fromkeys([*nodes, *by_node]):
        link = found["link"].get(node)
        level = worst.get(node, "ok" if node in by_node else "unknown")
        lines.append({"node": node, "level": level, **_node(by_node.get(node, [])), "link_gb_s": link})
    return lines


def _node(ranks: Sequence[Record]) -> dict[str, Any]:
    memory: dict[str, Any] = next((record["memory"] for record in ranks if "memory" in record), {})
    folders = [one["free_mib"] for record in ranks for one in record.get("folders", ()) if "free_mib" in one]
    clock = next((record["clock"]["skew_s"] for record in ranks if record.get("clock")), None)
    speeds = [record["speed"] for record in ranks if "speed" in record]
    return {
        "ranks": len(ranks),
        "cores": len({core for record in ranks for core in record.get("cores", ())}) or None,
        "gpus": len({gpu["id"] for record in ranks for gpu in record.get("gpus", ())}),
        "memory_mib": min(filter(None, (memory.get("available_mib"), memory.get("allowed_mib"))), default=None),
        "disk_mib": min(folders, default=None),
        "clock_s": clock,
        "matmul_s": max((one["matmul_s"] for one in speeds), default=None),
        "memory_gb_s": min((one["memory_gb_s"] for one in speeds), default=None),
        "versions": ranks[0].get("versions", {}) if ranks else {},
    }


def rows_of(summary: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """The same as cells under ``TITLES``; versions only where a node's are not those of most."""
    common = Counter(tuple(_versions(one)) for one in summary if one["versions"]).most_common(1)
    usual = set(common[0][0]) if common else set()
    return [
        [
            one["node"],
            one["level"],
            one["ranks"],
            one["cores"],
            one["gpus"],
            _gib(one["memory_mib"]),
            _gib(one["disk_mib"]),
            _text(one["clock_s"], "{:+.3f} s"),
            _text(one["matmul_s"], "{:.4g} s"),
            _text(one["memory_gb_s"], "{:.3g} GB/s"),
            _text(one["link_gb_s"], "{:.3g} GB/s"),
            ", ".join(version for version in _versions(one) if version not in usual),
        ]
        for one in summary
    ]


def closing_lines(
    records: Sequence[Record], findings: Sequence[Finding], summary: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What is said below the table: versions, the all-reduce, findings, and the judgement."""
    common = Counter(tuple(_versions(one)) for one in summary if one["versions"]).most_common(1)
    lines = [", ".join(common[0][0])] if common else []
    told = next((record["all_reduce"] for record in records if record.get("all_reduce")), ())
    if told:
        sizes = [f"{_bytes(one['bytes'])} {one['seconds'] * 1e6:.0f} us" for one in told]
        lines.append(f"all-reduce: {', '.join(sizes)} ({max(one['gb_s'] for one in told):.3g} GB/s)")
    lines += [f"{one.level}: {one.node + ': ' if one.node else ''}{one.words}" for one in findings]
    bad = list(dict.fromkeys(one.node for one in findings if one.level == "fail" and one.node))
    nodes = f"{len(summary)} node{'s' if len(summary) != 1 else ''}"
    if bad:
        lines.append(f"{nodes}; unfit: {', '.join(bad)}")
    else:
        lines.append(f"{nodes}; unfit, but no node by itself" if failed(findings) else f"{nodes}, all fit")
    return lines


def named_by(records: Sequence[Record], hosts: Sequence[tuple[str, int, int]]) -> list[Record]:
    """The records under the names by which the launch knows its hosts; what a host calls itself is ``hostname``.

    Args:
        records: of all ranks.
        hosts: name, first rank and number of ranks of each.
    """
    names = {rank: name for name, first, count in hosts for rank in range(first, first + count)}
    return [
        {**record, "hostname": record["node"], "node": names.get(int(record["rank"]), record["node"])}
        for record in records
    ]


def _versions(one: Mapping[str, Any]) -> list[str]:
    return [f"{name} {one['versions'][name]}" for name in _SHOWN_VERSIONS if name in one["versions"]]


def _gib(mib: float | None) -> str:
    return "" if mib is None else f"{mib / 1024:.1f} GiB"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"
