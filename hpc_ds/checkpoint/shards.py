"""What one rank hands over to be written, and how it is laid out in the rank's data file.

A shard is a contiguous range of a flattened tensor, on any device. The larger types come first in the file, so that every
range is aligned to its elements and no element stands on both sides of a block's end.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpc_ds.checkpoint.blocks import LANES, Aligned, each_in_lanes, padded
from hpc_ds.checkpoint.index import ALIGNMENT, BLOCK_BYTES, ITEM_BYTES, Entry
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PIECE_BYTES = 64 << 20  # of one copy by one thread
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous range of a flattened tensor.

    Attributes:
        name: of the tensor, the same on every rank.
        shape: of the whole tensor.
        start: first element of the range in the flattened whole.
        data: (length,), its elements.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor


def own_share(name: str, tensor: torch.Tensor, rank: int, world_size: int) -> Shard:
    """The part of a tensor that ``rank`` writes, when every rank holds all of it."""
    flat, count = tensor.detach().reshape(-1), tensor.numel()
    start, stop = count * rank // world_size, count * (rank + 1) // world_size
    return Shard(name, tuple(tensor.shape), start, flat[start:stop])


def dtype_name(shard: Shard) -> str:
    """The name that safetensors has for a shard's type.

    Raises:
        CheckpointError: it has none.
    """
    name = _NAMES.get(shard.data.dtype)
    if name is None:
        raise CheckpointError(f"tensor {shard.name!r}: {shard.data.dtype} cannot be stored; convert it first")
    return name


def place(shards: Iterable[Shard]) -> list[tuple[Entry, torch.Tensor]]:
    """Where each shard goes in the data file, by offset.

    Raises:
        CheckpointError: a shard is not a range of its tensor, or of a type that cannot be stored.
    """
    named = [(dtype_name(shard), shard) for shard in shards]
    named.sort(key=lambda pair: -ITEM_BYTES[pair[0]])
    placed, offset = [], 0
    for dtype, shard in named:
        length = shard.data.numel()
        if shard.data.dim() != 1 or not 0 <= shard.start <= shard.start + length <= math.prod(shard.shape):
            raise CheckpointError(
                f"tensor {shard.name!r}: {tuple(shard.data.shape)} from {shard.start} is no range of {shard.shape}; "
                "hand over a flat range"
            )
        entry = Entry(shard.name, shard.shape, dtype, shard.start, length, offset)
        placed.append((entry, shard.data.detach().contiguous()))
        offset += entry.size_bytes
    return placed


def data_bytes(placed: Sequence[tuple[Entry, torch.Tensor]]) -> int:
    """Size of the data section."""
    return placed[-1][0].offset + placed[-1][0].size_bytes if placed else 0


def as_bytes(data: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as (bytes,), uint8, of the same memory."""
    return data.view(torch.uint8) if data.numel() else data.new_empty(0, dtype=torch.uint8)


class Staging:
    """Copies shards block by block into one buffer a lane: what a synchronous save writes from."""

    def __init__(self, placed: Sequence[tuple[Entry, torch.Tensor]]) -> None:
        _synchronize(placed)  # the threads that copy have streams of their own
        filled = [(entry, data) for entry, data in placed if entry.length]
        self._offsets = [entry.offset for entry, _ in filled]
        self._data = [as_bytes(data) for _, data in filled]
        self._host = [data.numpy() if data.device.type == "cpu" else None for data in self._data]
        size = min(BLOCK_BYTES, padded(data_bytes(placed)))
        self._buffers = [_host_memory(size, pinned=any(host is None for host in self._host)) for _ in range(LANES)]

    def block(self, lane: int, start: int, stop: int) -> memoryview:
        """See ``blocks.Source``."""
        buffer = self._buffers[lane]
        number = max(bisect_right(self._offsets, start) - 1, 0)
        while number < len(self._offsets) and self._offsets[number] < stop:
            offset = self._offsets[number]
            first, last = max(start - offset, 0), min(stop - offset, self._data[number].numel())
            target, host = slice(offset + first - start, offset + last - start), self._host[number]
            if host is not None:
                np.copyto(buffer[target], host[first:last])  # releases the interpreter, and asks no thread pool
            else:
                torch.from_numpy(buffer[target]).copy_(self._data[number][first:last])
            number += 1
        return buffer.data


class Arena:
    """A copy of shards in host memory, kept between saves: what an asynchronous save writes from."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._reserving: threading.Thread | None = None

    @property
    def size_bytes(self) -> int:
        """Of its memory."""
        return len(self._memory)

    def reserve(self, size: int, *, pinned: bool = False) -> None:
        """Get memory for a copy of ``size`` bytes in a thread: the first touch of each page costs more than the copy."""

        def touch() -> None:
            self._memory = _host_memory(size, pinned=pinned)
            self._memory[::ALIGNMENT] = 0

        self._reserving = threading.Thread(target=touch, name="hpc_ds checkpoint memory", daemon=True)
        self._reserving.start()

    def snapshot(self, placed: Sequence[tuple[Entry, torch.Tensor]]) -> None:
        """Copy everything; on return the shards may change."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        size = data_bytes(placed)
        if padded(size) > len(self._memory):
            self._memory = np.empty(0, dtype=np.uint8)  # let go of the old one first
            self._memory = _host_memory(size, pinned=any(data.device.type != "cpu" for _, data in placed))
        pieces = [piece for entry, data in placed if entry.length for piece in self._pieces(entry, as_bytes(data))]
        each_in_lanes(len(pieces), torch.get_num_threads(), lambda _, number: _copy(*pieces[number]))
        _synchronize(placed)

    def _pieces(self, entry: Entry, data: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(place in the copy, bytes), so small that all threads have some."""
        places = torch.from_numpy(self._memory[entry.offset : entry.offset + entry.size_bytes])
        if data.device.type != "cpu":
            return [(places, data)]
        return list(zip(places.split(_PIECE_BYTES), data.split(_PIECE_BYTES), strict=True))

    def block(self, lane: int, start: int, stop: int) -> memoryview:  # noqa: ARG002 - one of a Source's
        """See ``blocks.Source``."""
        return self._memory[start : start + padded(stop - start)].data


def _copy(place: torch.Tensor, data: torch.Tensor) -> None:
    if data.device.type == "cpu":
        # The C library's copy: where it writes past the caches, it is nearly twice as fast as torch's.
        np.copyto(place.numpy(), data.numpy())
    else:
        place.copy_(data, non_blocking=True)


def _synchronize(placed: Sequence[tuple[Entry, torch.Tensor]]) -> None:
    """Wait for all that devices were told to do."""
    for device in {data.device for _, data in placed if data.device.type != "cpu"}:
        torch.accelerator.synchronize(device)


def _host_memory(size: int, *, pinned: bool) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """(size up to the next multiple of the alignment,), page-aligned; pinned memory is copied to at full speed."""
    if pinned:
        return torch.empty(max(padded(size), 1), dtype=torch.uint8, pin_memory=True).numpy()
    return np.frombuffer(Aligned(size).view, dtype=np.uint8)
