"""Filling flat ranges of tensors from the data files of a checkpoint, by one process.

A block that goes to one range as it is, is read straight into it; any other is read into a buffer, checked, and then copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpc_ds.checkpoint.agree import own_rank, world_size
from hpc_ds.checkpoint.blocks import Aligned, each_in_lanes
from hpc_ds.checkpoint.blockwise import BlockReader, all_blocks, size_of
from hpc_ds.checkpoint.index import BLOCK_BYTES, ITEM_BYTES
from hpc_ds.checkpoint.shards import DTYPES, Shard, as_bytes
from hpc_ds.errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    from hpc_ds.checkpoint.stored import Stored

LANES = 4  # threads that read


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of a data file, and the range that they go to."""

    offset: int
    size: int
    dtype: torch.dtype
    into: torch.Tensor  # (elements,)


def check_range(stored: Stored, shard: Shard) -> None:
    """Refuse a range that is not in a checkpoint.

    Raises:
        CheckpointError: the checkpoint has no such tensor, or one of another shape.
    """
    entry = stored.tensors.get(shard.name)
    if entry is None:
        raise CheckpointError(f"it has no {shard.name!r}; load it into the model that it was saved from")
    if entry.shape != tuple(shard.shape):
        raise CheckpointError(
            f"{shard.name!r} has shape {entry.shape}, wanted is {tuple(shard.shape)}; load it into the model that it was "
            "saved from"
        )
    if shard.data.dim() != 1 or not shard.data.is_contiguous():
        raise TypeError(f"{shard.name}: a wanted range must be flat and contiguous")


def fill(stored: Stored, wanted: list[Shard], *, everything: bool) -> str | None:
    """Read what this rank wants.

    Args:
        stored: the checkpoint.
        wanted: ranges to fill in place.
        everything: whether to check this rank's share of the other bytes too.

    Returns:
        The damage found; what was to be filled is then undefined.

    Raises:
        CheckpointError: a range is not in the checkpoint.
    """
    for shard in wanted:
        check_range(stored, shard)
    jobs = _jobs(stored, wanted, everything=everything)
    order = sorted(jobs)
    lanes = min(LANES, len(order))
    largest = max((size_of(stored, *job) for job in order), default=0)
    readers = [BlockReader(stored) for _ in range(lanes)]
    buffers = [Aligned(largest).view for _ in range(lanes)]

    def read(lane: int, number: int) -> None:
        job = order[number]
        size, start = size_of(stored, *job), job[1] * BLOCK_BYTES
        straight = _straight(jobs[job], start, size)
        into = buffers[lane][:size] if straight is None else straight
        readers[lane].read(*job, into)
        for part in jobs[job] if straight is None else ():
            _copy(part, into, start)

    try:
        each_in_lanes(len(order), LANES, read)
    except DamagedError as error:
        return error.damage
    finally:
        for reader in readers:
            reader.close()
    return None


def _jobs(stored: Stored, wanted: list[Shard], *, everything: bool) -> dict[tuple[int, int], list[_Part]]:
    """The blocks to read, as (rank, block) -> what goes where."""
    jobs: dict[tuple[int, int], list[_Part]] = {}
    for rank, part in _parts(stored, wanted):
        for block in range(part.offset // BLOCK_BYTES, (part.offset + part.size - 1) // BLOCK_BYTES + 1):
            jobs.setdefault((rank, block), []).append(part)
    blocks = all_blocks(stored) if everything else []
    for job in blocks[len(blocks) * own_rank() // world_size() : len(blocks) * (own_rank() + 1) // world_size()]:
        jobs.setdefault(job, [])
    return jobs


def _parts(stored: Stored, wanted: list[Shard]) -> list[tuple[int, _Part]]:
    """Which bytes of which rank's data file go where."""
    found = []
    for shard in wanted:
        entry = stored.tensors[shard.name]
        item, stop = ITEM_BYTES[entry.dtype], shard.start + shard.data.numel()
        for piece in entry.pieces:
            first, last = max(piece.start, shard.start), min(piece.start + piece.length, stop)
            if first < last:
                into = shard.data.detach()[first - shard.start : last - shard.start]
                offset = piece.offset + (first - piece.start) * item
                found.append((piece.rank, _Part(offset, (last - first) * item, DTYPES[entry.dtype], into)))
    return found


def _straight(parts: list[_Part], start: int, size: int) -> memoryview | None:
    """The memory that a whole block goes to as it is, where there is such."""
    if len(parts) != 1:
        return None
    part = parts[0]
    inside = part.offset <= start and start + size <= part.offset + part.size
    if not inside or part.into.dtype != part.dtype or part.into.device.type != "cpu":
        return None
    first = start - part.offset
    return as_bytes(part.into)[first : first + size].numpy().data


def _copy(part: _Part, data: memoryview, start: int) -> None:
    """Copy what a block has of a part, converting its type where the wanted range has another."""
    first, last = max(part.offset, start), min(part.offset + part.size, start + len(data))
    source = np.frombuffer(data, dtype=np.uint8)[first - start : last - start]
    if part.into.dtype == part.dtype and part.into.device.type == "cpu":
        np.copyto(as_bytes(part.into).numpy()[first - part.offset : last - part.offset], source)
        return
    item = part.dtype.itemsize
    into = part.into[(first - part.offset) // item : (last - part.offset) // item]
    with torch.no_grad():
        into.copy_(torch.from_numpy(source).view(part.dtype))
