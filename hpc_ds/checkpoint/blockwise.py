"""Reading a data file block by block, comparing the checksum of each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hpc_ds.checkpoint.blocks import checksum, read_all
from hpc_ds.checkpoint.index import BLOCK_BYTES
from hpc_ds.checkpoint.layout import damaged, data_file

if TYPE_CHECKING:
    from hpc_ds.checkpoint.stored import Stored

HEADER = -1  # in place of the number of a block: the bytes before the data


class BlockReader:
    """Reads blocks of a checkpoint for one thread, with one file open at a time."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._rank = -1
        self._descriptor = -1

    def read(self, rank: int, block: int, into: memoryview) -> None:
        """Fill ``into`` with a block of the data file of a rank.

        Raises:
            DamagedError: the file cannot be read, or the block is not what was written.
        """
        index, name = self._stored.files[rank], data_file(rank)
        wanted = index.header if block == HEADER else index.blocks[block]
        offset = 0 if block == HEADER else index.data_start + block * BLOCK_BYTES
        try:
            self._open(rank)
            got = read_all(self._descriptor, into, offset)
        except OSError as error:
            raise damaged(self._stored.path, f"{name} cannot be read: {error.strerror}") from None
        if got < len(into):
            raise damaged(self._stored.path, f"{name} has {offset + got} bytes instead of {index.file_bytes}")
        if checksum(into) != wanted:
            where = f"bytes {offset} to {offset + len(into)}"
            raise damaged(self._stored.path, f"{name} does not have the bytes that were written, in {where}")

    def close(self) -> None:
        """Close the file that is open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _open(self, rank: int) -> None:
        if rank != self._rank or self._descriptor < 0:
            self.close()
            self._descriptor = os.open(self._stored.path / data_file(rank), os.O_RDONLY | os.O_CLOEXEC)
            self._rank = rank


def size_of(stored: Stored, rank: int, block: int) -> int:
    """Bytes of a block."""
    index = stored.files[rank]
    return index.data_start if block == HEADER else min(BLOCK_BYTES, index.data_bytes - block * BLOCK_BYTES)


def all_blocks(stored: Stored) -> list[tuple[int, int]]:
    """(rank, block) of everything in the data files."""
    return [(index.rank, block) for index in stored.files for block in range(HEADER, len(index.blocks))]
