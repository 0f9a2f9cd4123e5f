"""Where the output of ranks goes: a thread that may wait for a slow reader, so that the launcher never does."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MUCH = 1 << 22
_AT_ONCE = 1 << 14  # a slow reader is to be told from one that does not read
# After the end of a line, where more follows; "\r\n" is one end.
_LINE_BEGINS = re.compile(rb"(?<=\n)(?=.)|(?<=\r)(?=[^\n])", re.DOTALL)


class Console:
    """Two streams, written in the order in which pieces come.

    Attributes:
        queued: bytes that are not written yet.
        written: bytes that are.
        broken: what went wrong when a stream was written to; None: nothing.
    """

    def __init__(self, out: int, err: int, *, prefix: bool, wake: Callable[[], None]) -> None:
        """Write to two descriptors; ``wake`` is called from a thread when there is room again, or all is written."""
        self._streams = {1: out, 2: err}
        same = os.fstat(out)[1:3] == os.fstat(err)[1:3]
        self._ends = {1: _Tail(), 2: _Tail()}
        if same:
            self._ends[2] = self._ends[1]
        self._prefix = prefix
        self._begun: set[tuple[int, int]] = set()  # (rank, stream) within a line
        self._wake = wake
        self._queue: deque[tuple[int, bytes]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._dropped = False
        self.queued = self.written = 0
        self.broken: OSError | None = None

    @property
    def has_room(self) -> bool:
        """Whether more should be read for it."""
        return self.queued < _MUCH

    def write(self, rank: int, stream: int, piece: bytes) -> None:
        """Write a piece of a rank's output; if another's line is unfinished, on a line of its own."""
        if not piece:
            return
        source, tail = (rank, stream), self._ends[stream]
        torn = tail.unfinished and tail.source != source
        finished = piece[-1:] in {b"\n", b"\r"}
        if self._prefix:
            mark = b"[rank %d] " % rank
            begins = torn or source not in self._begun
            piece = (mark if begins else b"") + _LINE_BEGINS.sub(mark, piece)
            (self._begun.discard if finished else self._begun.add)(source)
        if torn:
            self._begun.discard(tail.source)
        tail.source, tail.unfinished = source, not finished
        self._put(stream, b"\n" + piece if torn else piece)

    def say(self, text: str) -> None:
        """Write a line of the launcher's own on standard error."""
        tail = self._ends[2]
        before = b"\n" if tail.unfinished else b""
        tail.unfinished = False
        self._put(2, before + text.encode(errors="backslashreplace") + b"\n")

    def drop(self) -> None:
        """Forget what could not be written yet, and all that follows."""
        with self._changed:
            self._dropped = True
            self._queue.clear()
            self.queued = 0

    def _put(self, stream: int, data: bytes) -> None:
        with self._changed:
            if self._dropped:
                return
            self._queue.append((self._streams[stream], data))
            self.queued += len(data)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="console", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                stream, data = self._queue.popleft()
            self._write(stream, data)
            with self._changed:
                before = self.queued
                self.queued = 0 if self._dropped else before - len(data)
                telling = self.queued == 0 or self.queued < _MUCH // 2 <= before
            if telling:
                self._wake()

    def _write(self, stream: int, data: bytes) -> None:
        left = memoryview(data)
        while left and not (self.broken or self._dropped):
            try:
                count = os.write(stream, left[:_AT_ONCE])
                self.written += count
                left = left[count:]
            except BlockingIOError:
                _wait_for(stream)
            except OSError as error:
                self.broken = error
                self._wake()


class _Tail:
    """Whose piece came last, and whether its line is unfinished."""

    def __init__(self) -> None:
        self.source = (-1, 0)
        self.unfinished = False


def _wait_for(stream: int) -> None:
    import select

    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    poll.poll(1000)
