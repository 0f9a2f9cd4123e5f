"""What a checkpoint holds, put together from the indexes of its ranks. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.blocks import each_in_lanes
from hpc_ds.checkpoint.index import Entry, Index, read_index
from hpc_ds.checkpoint.layout import Saved, damaged

if TYPE_CHECKING:
    from pathlib import Path

LANES = 8  # threads that read indexes


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a tensor in the data file of a rank; offset in bytes from the beginning of the file's data."""

    start: int
    length: int
    rank: int
    offset: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a checkpoint.

    Attributes:
        dtype: safetensors' name of the type.
        pieces: by start; together they are all of it.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """The content of a checkpoint.

    Attributes:
        saved: its manifest.
        tensors: by name.
        files: index of each rank's data file, without entries and state.
    """

    saved: Saved
    tensors: dict[str, StoredTensor]
    files: list[Index]

    @property
    def path(self) -> Path:
        """The folder of the checkpoint."""
        return self.saved.path

    @property
    def tag(self) -> str:
        """The name it was saved under."""
        return self.saved.tag

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.saved.step

    @property
    def state(self) -> dict[str, Any]:
        """The engine's own state, plain JSON."""
        return self.saved.state


def read_stored(saved: Saved, lanes: int = LANES) -> Stored:
    """Read all indexes of a checkpoint, and look at the size of each file.

    Raises:
        DamagedError: a file is missing, has another size, or an index other bytes than were written.
    """
    indexes: list[Index | None] = [None] * saved.world_size

    def read(_lane: int, rank: int) -> None:
        indexes[rank] = read_index(saved, rank)

    each_in_lanes(saved.world_size, lanes, read)
    files = [index for index in indexes if index is not None]
    ranges: dict[str, list[tuple[int, Entry]]] = {}
    for index in files:
        for entry in index.entries:
            ranges.setdefault(entry.name, []).append((index.rank, entry))
    tensors = {name: _joined(saved, name, of_ranks) for name, of_ranks in ranges.items()}
    return Stored(saved, tensors, [replace(index, entries=[], state=None) for index in files])


def _joined(saved: Saved, name: str, ranges: list[tuple[int, Entry]]) -> StoredTensor:
    """One tensor from its ranges, which must cover it once."""
    shape, dtype = ranges[0][1].shape, ranges[0][1].dtype
    pieces = [Piece(entry.start, entry.length, rank, entry.offset) for rank, entry in ranges if entry.length]
    pieces.sort(key=lambda piece: piece.start)
    covered = 0
    for piece in pieces:
        if piece.start != covered:
            break
        covered += piece.length
    if covered != math.prod(shape) or covered != sum(piece.length for piece in pieces):
        raise damaged(saved.path, f"tensor {name!r} is not covered once by what its ranks wrote")
    if any((entry.shape, entry.dtype) != (shape, dtype) for _, entry in ranges):
        raise damaged(saved.path, f"tensor {name!r} has several shapes or types")
    return StoredTensor(shape, dtype, tuple(pieces))
