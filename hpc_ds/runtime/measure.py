"""What the doctor measures together with the other ranks: clocks, all-reduce, the links between nodes, and speed.

Everything here is collective. All ranks measure at the same time, as they will train at the same time; the best of a few
tries counts, because other work on a node can only make it look slower than it is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TRIES = 5
_PINGS = 5
_PARTNERS = 3  # at most, in each direction
_RAILS = 8  # ranks of a node whose links are looked at, at most
_SIZES = {"cpu": (8, 1 << 13, 1 << 20, 1 << 23), "cuda": (8, 1 << 13, 1 << 20, 1 << 26)}  # bytes of an all-reduce
_EXCHANGED = {"cpu": 1 << 22, "cuda": 1 << 26}
_COPIED = {"cpu": 1 << 25, "cuda": 1 << 29}
_MATRIX = {"cpu": (768, torch.float32), "cuda": (8192, torch.bfloat16)}
_GB = 1e9


def meet(word: Any) -> list[Any]:
    """Collective. What every rank says, by rank."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, word)
    return said


def ranks_by_node(nodes: Sequence[str]) -> list[list[int]]:
    """The ranks of each node, nodes in the order of their first rank; ``nodes``: of each rank."""
    found: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        found.setdefault(node, []).append(rank)
    return list(found.values())


def _together() -> None:
    dist.all_reduce(torch.zeros(1))


def _best(function: Callable[[], Any], device: torch.device, *, together: bool) -> float:
    """Seconds of the best of a few tries, after one that does not count."""
    took = []
    for _ in range(_TRIES + 1):
        if together:
            _together()
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begin)
    return max(min(took[1:]), 1e-9)


def speed(device: torch.device) -> dict[str, float]:
    """Collective. Seconds of a fixed product of matrices, and GB/s of a copy in memory, on all ranks at once."""
    size, dtype = _MATRIX[device.type]
    left = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(left)
    matmul_s = _best(lambda: torch.mm(left, left, out=product), device, together=True)
    source = torch.zeros(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source), device, together=True)
    return {"matmul_s": round(matmul_s, 7), "memory_gb_s": round(2 * source.numel() / copy_s / _GB, 3)}


def all_reduce(device: torch.device) -> list[dict[str, float]]:
    """Collective. Seconds of an all-reduce of a few sizes, and GB/s that each rank's link carries in it."""
    size, found = dist.get_world_size(), []
    for count in _SIZES[device.type]:
        data = torch.zeros(count // 4, device=device)
        seconds = _best(lambda data=data: dist.all_reduce(data), device, together=True)  # type: ignore[misc]
        carried = 2 * (size - 1) / size * count / seconds / _GB
        found.append({"bytes": count, "seconds": round(seconds, 7), "gb_s": round(carried, 4)})
    return found


def clock(nodes: Sequence[Sequence[int]]) -> dict[str, float] | None:
    """Collective. How far this node's clock is ahead of rank 0's, half of the quickest round trip taken out.

    Args:
        nodes: the ranks of each node. The first of each asks; None for the others, and for rank 0's own node.
    """
    rank, found = dist.get_rank(), None
    for ranks in nodes:
        if ranks[0] == 0:
            continue
        if rank == 0:
            _answer(ranks[0])
        elif rank == ranks[0]:
            found = _ask()
    return found


def _answer(rank: int) -> None:
    word = torch.zeros(1, dtype=torch.float64)
    for _ in range(_PINGS):
        dist.recv(word, rank)
        word[0] = time.time()
        dist.send(word, rank)


def _ask() -> dict[str, float]:
    word = torch.zeros(1, dtype=torch.float64)
    answers = []
    for _ in range(_PINGS):
        sent, began = time.time(), time.perf_counter()
        dist.send(word, 0)
        dist.recv(word, 0)
        trip = time.perf_counter() - began
        answers.append((trip, sent + trip / 2 - float(word[0])))
    trip, skew = min(answers)
    return {"skew_s": round(skew, 6), "round_trip_s": round(trip, 7)}


def links(nodes: Sequence[Sequence[int]], device: torch.device) -> list[dict[str, float]]:
    """Collective. GB/s at which this rank receives from its like on other nodes, while it sends to its like on others.

    Node i sends to i + 1, then to i + 2, then to i + 3: every node has several partners, so that a slow node can be told
    from a slow partner.

    Args:
        nodes: the ranks of each node.
        device: where the tensors are.
    """
    rank, found = dist.get_rank(), []
    here = next(place for place, ranks in enumerate(nodes) if rank in ranks)
    position = nodes[here].index(rank)
    sent = torch.zeros(_EXCHANGED[device.type], dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    for step in range(1, min(len(nodes) - 1, _PARTNERS) + 1):
        to, source = nodes[(here + step) % len(nodes)], nodes[(here - step) % len(nodes)]
        operations = []
        if position < min(len(to), _RAILS):
            operations.append(dist.P2POp(dist.isend, sent, to[position]))
        if position < min(len(source), _RAILS):
            operations.append(dist.P2POp(dist.irecv, received, source[position]))
        seconds = _best(lambda operations=operations: _exchange(operations), device, together=True)  # type: ignore[misc]
        if position < min(len(source), _RAILS):
            found.append({"from": source[position], "gb_s": round(sent.numel() / seconds / _GB, 4)})
    return found


def _exchange(operations: list[Any]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
