"""Whether a checkpoint is whole, by every byte of it. Needs no torch and no process group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.checkpoint.blocks import Aligned, each_in_lanes
from hpc_ds.checkpoint.blockwise import BlockReader, all_blocks, size_of
from hpc_ds.checkpoint.layout import read_manifest
from hpc_ds.checkpoint.stored import Stored, read_stored
from hpc_ds.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LANES = 4


def open_whole(path: Path) -> Stored:
    """The content of the checkpoint in a folder: manifest and indexes checked in full, of data files the sizes.

    Raises:
        DamagedError: its files are not what was written.
        CheckpointError: there is none, or one of another format.
    """
    return read_stored(read_manifest(path))


def damages(stored: Stored, progress: Callable[[int], None] | None = None) -> list[str]:
    """All that is wrong with the data files: every byte is read and compared.

    Args:
        stored: from ``open_whole``.
        progress: called with the number of bytes checked, from several threads.
    """
    order, found = all_blocks(stored), []
    largest = max((size_of(stored, *block) for block in order), default=0)
    lanes = min(_LANES, len(order))
    readers, buffers = [BlockReader(stored) for _ in range(lanes)], [Aligned(largest).view for _ in range(lanes)]

    def check(lane: int, number: int) -> None:
        size = size_of(stored, *order[number])
        try:
            readers[lane].read(*order[number], buffers[lane][:size])
        except DamagedError as error:
            found.append((number, error.damage))
        if progress is not None:
            progress(size)

    try:
        each_in_lanes(len(order), _LANES, check)
    finally:
        for reader in readers:
            reader.close()
    return [damage for _, damage in sorted(found)]
