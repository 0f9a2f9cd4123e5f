r"""What ranks write, from their pipes to the launcher, in pieces that tear no line.

A piece ends with a line, wherever it can: at ``\n``, or at ``\r`` when more follows. The rest is passed on when its
rank has been silent for a while, when it is long, and at the end. A long line is passed on in pieces, and as long as it
goes on only its pipe is read: the others wait in theirs, and their ranks, if these are full, in ``write``.
"""

from __future__ import annotations

import os
import selectors
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_SILENCE_S = 0.3
_PIECE = 1 << 16
_LONGEST_HELD = 1 << 24  # a rank that writes without end and without lines must not silence the others for ever


class Send(Protocol):
    """Where pieces go."""

    def __call__(self, rank: int, stream: int, piece: bytes, *, goes_on: bool) -> None:
        """Pass a piece on; ``goes_on``: the rest of its line follows, and nothing may come between."""


class _Pipe:
    """The reading end of what one rank writes to one of its streams."""

    def __init__(self, reader: int, rank: int, stream: int) -> None:
        self.reader, self.rank, self.stream = reader, rank, stream
        self.rest = bytearray()
        self.read_at = 0.0
        self.held = 0  # bytes of the line that goes on


class Pump:
    """The pipes of the ranks of one agent."""

    def __init__(self, send: Send, has_room: Callable[[], bool]) -> None:
        self._send = send
        self._has_room = has_room
        self._selector = selectors.EpollSelector()
        self._pipes: dict[int, _Pipe] = {}
        self._waiting: dict[int, _Pipe] = {}  # those with the beginning of a line
        self._owner: _Pipe | None = None  # whose long line goes on

    @property
    def watched(self) -> int:
        """The descriptor that can be read when ``read`` has something to do."""
        return self._selector.fileno() if self._owner is None else self._owner.reader

    @property
    def empty(self) -> bool:
        """Whether all pipes are closed."""
        return not self._pipes

    def pipe(self, rank: int, stream: int) -> int:
        """A new pipe for a stream of a rank; returns the end to write to, for the caller to close."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._pipes[reader] = pipe = _Pipe(reader, rank, stream)
        self._selector.register(reader, selectors.EVENT_READ, pipe)
        return writer

    def read(self) -> None:
        """Read each pipe that has something, once, while there is room for it."""
        if self._owner is not None:
            self._read(self._owner)
            return
        for key, _ in self._selector.select(0):
            if self._owner is not None or not self._has_room():
                return
            self._read(key.data)

    def read_the_rest(self) -> None:
        """Read what there is when all who wrote are gone; a pipe that somebody still holds open is given up."""
        for pipe in [self._owner] if self._owner is not None else list(self._pipes.values()):
            while self._has_room() and pipe.reader in self._pipes:
                if not self._read(pipe):
                    self._close(pipe)

    def _read(self, pipe: _Pipe) -> bool:
        """Read a pipe once; whether there was anything."""
        try:
            data = os.read(pipe.reader, _PIECE)
        except BlockingIOError:
            return False
        if not data:
            self._close(pipe)
            return True
        pipe.read_at = time.monotonic()
        pipe.rest += data
        self._pass_on(pipe)
        return True

    def _pass_on(self, pipe: _Pipe) -> None:
        end = max(pipe.rest.rfind(b"\n"), pipe.rest.rfind(b"\r", 0, -1)) + 1
        if end:
            self._piece(pipe, end, goes_on=False)
        if len(pipe.rest) >= _PIECE:
            pipe.held += len(pipe.rest)
            self._piece(pipe, len(pipe.rest), goes_on=pipe.held < _LONGEST_HELD)
        if pipe.rest:
            self._waiting[pipe.reader] = pipe
        else:
            self._waiting.pop(pipe.reader, None)

    def _piece(self, pipe: _Pipe, end: int, *, goes_on: bool) -> None:
        piece = bytes(pipe.rest[:end])
        del pipe.rest[:end]
        self._owner = pipe if goes_on else None
        if not goes_on and piece[-1:] in {b"\n", b"\r"}:
            pipe.held = 0
        self._send(pipe.rank, pipe.stream, piece, goes_on=goes_on)

    def look_at_the_clock(self) -> float | None:
        """Pass on what has waited long enough; the seconds until this must be called again, if it must."""
        now = time.monotonic()
        for pipe in self._awaited():
            if now - pipe.read_at >= _SILENCE_S:
                self._piece(pipe, len(pipe.rest), goes_on=False)
                self._waiting.pop(pipe.reader, None)
        since = [pipe.read_at for pipe in self._awaited()]
        return max(min(since) + _SILENCE_S - now, 0.0) if since else None

    def _awaited(self) -> list[_Pipe]:
        return [self._owner] if self._owner is not None else list(self._waiting.values())

    def _close(self, pipe: _Pipe) -> None:
        if pipe.rest or self._owner is pipe:
            self._piece(pipe, len(pipe.rest), goes_on=False)
        self._waiting.pop(pipe.reader, None)
        self._selector.unregister(pipe.reader)
        del self._pipes[pipe.reader]
        os.close(pipe.reader)
