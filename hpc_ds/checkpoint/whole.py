"""Whole tensors of a checkpoint, read a few MB at a time and verified on the way. Needs no torch.

A block is compared with its checksum when it is first touched; after that only the bytes needed are read, so that small
tensors that many ranks hold pieces of do not cost a block each time. No element stands on both sides of a block's end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hpc_ds.checkpoint.blocks import read_all
from hpc_ds.checkpoint.blockwise import BlockReader, size_of
from hpc_ds.checkpoint.index import BLOCK_BYTES, ITEM_BYTES
from hpc_ds.checkpoint.layout import damaged, data_file
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.checkpoint.stored import Stored, StoredTensor

MODEL = "model."  # before the name of a parameter or buffer


class WholeTensors:
    """The tensors of one checkpoint, for one thread. To be closed."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._reader = BlockReader(stored)
        self._verified: set[tuple[int, int]] = set()
        self._block = (-1, -1)
        self._buffer = bytearray(BLOCK_BYTES)

    def close(self) -> None:
        """Close the file that is open."""
        self._reader.close()

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor in order; each chunk holds whole elements and is valid until the next is asked for.

        Raises:
            DamagedError: a file does not hold what was written.
        """
        tensor = self._stored.tensors[name]
        for piece in tensor.pieces:
            position, end = piece.offset, piece.offset + piece.length * ITEM_BYTES[tensor.dtype]
            while position < end:
                block = position // BLOCK_BYTES
                stop = min(end, (block + 1) * BLOCK_BYTES)
                yield self._bytes(piece.rank, block, position - block * BLOCK_BYTES, stop - block * BLOCK_BYTES)
                position = stop

    def _bytes(self, rank: int, block: int, start: int, stop: int) -> memoryview:
        if (rank, block) != self._block and (rank, block) in self._verified:
            return self._part(rank, block, start, stop)
        if (rank, block) != self._block:
            self._block = (-1, -1)
            size = size_of(self._stored, rank, block)
            self._reader.read(rank, block, memoryview(self._buffer)[:size])
            self._block = (rank, block)
            self._verified.add(self._block)
        return memoryview(self._buffer)[start:stop]

    def _part(self, rank: int, block: int, start: int, stop: int) -> memoryview:
        path, into = self._stored.path / data_file(rank), memoryview(bytearray(stop - start))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                offset = self._stored.files[rank].data_start + block * BLOCK_BYTES + start
                got = read_all(descriptor, into, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise damaged(self._stored.path, f"{path.name} cannot be read: {error.strerror}") from None
        if got < len(into):
            raise damaged(self._stored.path, f"{path.name} has become shorter")
        return into


def weights_in(stored: Stored) -> dict[str, StoredTensor]:
    """Parameters and buffers under the names of the module's ``state_dict``, tied ones under each of theirs.

    Raises:
        CheckpointError: the checkpoint has none.
    """
    found = {name.removeprefix(MODEL): tensor for name, tensor in stored.tensors.items() if name.startswith(MODEL)}
    if not found:
        raise CheckpointError(f"checkpoint {str(stored.path)!r}: it holds no weights; give another", str(stored.path))
    return found | {name: found[tied] for name, tied in tied_names(stored).items() if tied in found}


def tied_names(stored: Stored) -> dict[str, str]:
    """The other names of parameters that a module uses under several: name -> the one that the checkpoint has."""
    tied = stored.state.get("tied")
    return {str(name): str(of) for name, of in tied.items()} if isinstance(tied, dict) else {}
