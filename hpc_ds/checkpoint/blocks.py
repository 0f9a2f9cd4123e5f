"""A rank's data file, block by block: written past the page cache where the filesystem lets us, hashed on the way.

Two lanes, each a thread, take turns: block 0, 2, 4 ... and block 1, 3, 5 ... A lane asks for the bytes of its block,
hashes and writes them; both release the interpreter, so one lane's hash and copy hide behind the other's write, and the
disk has two requests to work on. Memory comes in whole pages and is not inherited by forked children: a child would
get its own copy of each page that is written after the fork, and O_DIRECT and fork do not mix (open(2), NOTES).

A filesystem without O_DIRECT (tmpfs, some NFS) says EINVAL, when the file is opened or at the first write; it is then
written through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING, Protocol

import xxhash

from hpc_ds.checkpoint.index import ALIGNMENT, blocks_of
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LANES = 2


class Source(Protocol):
    """Where the bytes of a data file come from."""

    def block(self, lane: int, start: int, stop: int) -> memoryview:
        """Bytes ``start`` to ``stop`` of the data, in page-aligned memory and followed by padding up to the alignment.

        They stay as they are until the same lane asks for its next block.
        """


class Aligned:
    """Page-aligned memory of this process alone.

    Attributes:
        view: all of it.
    """

    def __init__(self, size: int) -> None:
        self.size = max(padded(size), ALIGNMENT)
        memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)


def padded(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def checksum(data: bytes | memoryview) -> str:
    """XXH3-128 in hexadecimal. It finds damage, not malice: a forger can compute it too."""
    return xxhash.xxh3_128_hexdigest(data)


class DataFile:
    """A data file while it is written: made by ``start``, complete and durable once ``finish`` returns.

    Nothing is done before ``start``, and what goes wrong after it is raised by ``finish``.

    Attributes:
        header: checksum of the bytes before the data.
        blocks: checksums of the data's blocks.
        size_bytes: of the data.
    """

    def __init__(self, path: Path, header: bytes, size: int, source: Source) -> None:
        self._path = path
        self._header = header
        self.size_bytes = size
        self._source = source
        self.header = checksum(header)
        self._blocks = blocks_of(size)
        self.blocks = [""] * len(self._blocks)
        self._written = [0] * LANES
        self._failures: list[BaseException] = []
        self._descriptor = -1
        self._lanes: list[threading.Thread] = []

    @property
    def written_bytes(self) -> int:
        """How much has been written so far."""
        return sum(self._written)

    def start(self) -> None:
        """Make the file and let the lanes run. Threads cannot be started while the interpreter is ending, so it is done at once."""
        try:
            self._descriptor = _create(self._path)
        except OSError as failure:
            self._failures.append(failure)
            return
        for lane in range(min(LANES, max(1, len(self._blocks)))):
            name = f"hpc_ds checkpoint lane {lane}"
            self._lanes.append(threading.Thread(target=self._run, args=(lane,), name=name, daemon=False))
            self._lanes[-1].start()

    def finish(self) -> None:
        """Wait until the file is durable. To be called once, after ``start``; an OSError of a lane is raised here."""
        try:
            for lane in self._lanes:
                lane.join()
            for failure in self._failures:
                raise failure
            os.ftruncate(
                self._descriptor, len(self._header) + self.size_bytes
            )  # the last block was written with its padding
            os.fsync(self._descriptor)
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)

    def cancel(self) -> None:
        """Write no further block; ``finish`` then raises."""
        self._failures.append(CheckpointError("it was given up for a newer one"))

    def _run(self, lane: int) -> None:
        try:
            if lane == 0:
                header = Aligned(len(self._header))
                header.view[: len(self._header)] = self._header
                write_all(self._descriptor, header.view[: len(self._header)], 0)
            for number in range(lane, len(self._blocks), LANES):
                if self._failures:
                    return
                start, stop = self._blocks[number]
                data = self._source.block(lane, start, stop)
                self.blocks[number] = checksum(data[: stop - start])
                write_all(self._descriptor, data[: padded(stop - start)], len(self._header) + start)
                self._written[lane] += stop - start
        except BaseException as failure:  # noqa: BLE001 - raised again by finish, in the thread that waits
            self._failures.append(failure)


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
    path.unlink(missing_ok=True)  # some kernels make the file before they refuse
    return os.open(path, flags, 0o644)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, without O_DIRECT from where it is refused."""
    refused = False
    while data:
        try:
            count = os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or refused:
                raise
            refused = True  # once, also where the other lane was faster to leave O_DIRECT
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        data, offset = data[count:], offset + count


def read_all(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill ``into`` from ``offset``; returns how many bytes there were."""
    count = 0
    while count < len(into):
        got = os.preadv(descriptor, [into[count:]], offset + count)
        if got == 0:
            break
        count += got
    return count


def each_in_lanes(count: int, lanes: int, do: Callable[[int, int], None]) -> None:
    """Call ``do(lane, number)`` for all numbers below ``count``, spread over threads; the first failure is raised."""
    failures: list[BaseException] = []

    def run(lane: int) -> None:
        try:
            for number in range(lane, count, lanes):
                if failures:
                    return
                do(lane, number)
        except BaseException as failure:  # noqa: BLE001 - raised again below, in the thread that waits
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(1, min(lanes, count))]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure
