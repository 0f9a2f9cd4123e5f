"""Cores of a machine, parted among its ranks: whole physical cores first, in equal slices side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.errors import ConfigError, LaunchError
from hpc_ds.launch.node_list import ranges

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class Slice(NamedTuple):
    """What one rank may use: logical processors, and how many threads do work there."""

    cores: frozenset[int]
    threads: int


def parse_core_list(text: str) -> list[int]:
    """``0-3,8`` -> [0, 1, 2, 3, 8].

    Raises:
        ConfigError: it is not such a list, or not one that ascends.
    """
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None:
            raise ConfigError(f"core list {text!r}: {part!r} is neither a core nor a range; write it as 0-3,8-11")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (cores and first <= cores[-1]):
            raise ConfigError(
                f"core list {text!r}: {part!r} does not ascend, or overlaps; name each core once, in order"
            )
        cores += range(first, last + 1)
    return cores


def slices(ours: Collection[int], ranks: int, core_list: str | None) -> list[Slice]:
    """The part of each rank of this machine.

    Args:
        ours: the logical processors that this process may use.
        ranks: how many there are here.
        core_list: which to use; None: all.

    Raises:
        LaunchError: the list is wrong, or there are fewer cores than ranks.
    """
    if core_list is not None:
        cores = parse_core_list(core_list)
        if foreign := [core for core in cores if core not in ours]:
            raise LaunchError(
                f"core list {core_list!r}: {ranges(foreign)} not among the cores that may be used here, "
                f"{ranges(ours)}; leave them out"
            )
        return _parted([[core] for core in cores], ranks)
    physical = _physical_cores(ours)
    return _parted(physical if len(physical) >= ranks else [[core] for core in sorted(ours)], ranks)


def _parted(units: Sequence[Sequence[int]], ranks: int) -> list[Slice]:
    each = len(units) // ranks
    if each == 0:
        raise LaunchError(f"{len(units)} cores: fewer than the {ranks} ranks of this host; do not bind ranks to cores")
    parts = (units[rank * each : (rank + 1) * each] for rank in range(ranks))
    return [Slice(frozenset(core for unit in part for core in unit), each) for part in parts]


def _physical_cores(ours: Collection[int]) -> list[list[int]]:
    """Logical processors by the physical core that they are threads of, in the order of their first."""
    units: dict[tuple[int, ...], list[int]] = {}
    for core in sorted(ours):
        try:
            siblings = tuple(parse_core_list(Path(_TOPOLOGY.format(core)).read_text(encoding="ascii")))
        except (OSError, ConfigError):
            siblings = (core,)
        units.setdefault(siblings, []).append(core)
    return list(units.values())
