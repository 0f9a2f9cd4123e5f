"""Frames between the launcher and its agents: a head of JSON and a body of bytes, over a pair of byte streams.

What an agent sends begins with a mark: what a login shell prints before it is not ours, and is kept as *noise*.
Neither side ever blocks: what cannot be written yet is queued, and the owner of a channel asks for no more while much
is queued.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

LAUNCHER, TOKEN, NODE = "HPCDS_LAUNCHER", "HPCDS_TOKEN", "HPCDS_NODE"
"""Variables of an agent: where its launcher listens, the secret that opens it, and which host of the plan this is."""

_MARK = b"\0hpcds-agent\n"
_SIZES = struct.Struct(">II")
_AT_ONCE = 1 << 18
_MOST_NOISE = 1 << 16
_STRANGERS_FRAME, _LARGEST_FRAME = 1 << 16, 1 << 28


class Frame(NamedTuple):
    """One message: what it says under ``say`` and more keys, and bytes that are not text."""

    head: dict[str, Any]
    body: bytes


def to_wire(text: str) -> str:
    """Text of the operating system (an argument, a variable, a path) for a head, whatever bytes it stands for."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def from_wire(text: str) -> bytes:
    """The bytes of the operating system that ``to_wire`` made text of."""
    return text.encode("utf-8", "surrogateescape")


class Channel:
    """One end of a pair of byte streams.

    Attributes:
        noise: what came before the mark.
        ended: nothing more will come.
        queued: bytes that are not written yet.
        trusted: whether the other side may send large frames.
    """

    def __init__(self, reader: int, writer: int, *, from_agent: bool) -> None:
        self.reader, self.writer = reader, writer
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        self._queue: deque[memoryview] = deque()
        self._read = bytearray()
        self._marked = not from_agent
        self.noise = b""
        self.ended = False
        self.queued = 0
        self.trusted = True

    def mark(self) -> None:
        """Say that frames begin here: the first that an agent sends."""
        self._put(_MARK)

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        """Queue a frame, and write what can be written without waiting."""
        text = json.dumps(head, separators=(",", ":")).encode("ascii")
        self._put(_SIZES.pack(len(text), len(body)) + text, body)
        self.flush()

    def _put(self, *parts: bytes) -> None:
        if not self.ended:
            self._queue.extend(memoryview(part) for part in parts if part)
            self.queued += sum(len(part) for part in parts)

    def flush(self) -> None:
        """Write what can be written without waiting."""
        while self._queue:
            try:
                written = os.writev(self.writer, list(itertools.islice(self._queue, 64)))
            except BlockingIOError:
                return
            except OSError:  # the other side is gone: what it was told last may still be read
                self._queue.clear()
                self.queued = 0
                return
            self._forget(written)

    def _forget(self, written: int) -> None:
        self.queued -= written
        while written:
            first = self._queue.popleft()
            if len(first) > written:
                self._queue.appendleft(first[written:])
                return
            written -= len(first)

    def receive(self) -> list[Frame]:
        """Read once; the frames that are whole now. A stranger's nonsense ends the channel."""
        try:
            data = os.read(self.reader, _AT_ONCE)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.ended = not data
        self._read += data
        return self._frames() if self._marked or self._find_mark() else []

    def _find_mark(self) -> bool:
        before, mark, after = bytes(self._read).partition(_MARK)
        if mark:
            self.noise, self._read, self._marked = self.noise + before, bytearray(after), True
        elif self.ended or len(before) > _MOST_NOISE:
            self.noise = (self.noise + before)[-_MOST_NOISE:]
            self._read = bytearray()
        return self._marked

    def _frames(self) -> list[Frame]:
        frames, place = [], 0
        while len(self._read) - place >= _SIZES.size:
            head, body = _SIZES.unpack_from(self._read, place)
            start, end = place + _SIZES.size, place + _SIZES.size + head + body
            if end - start > (_LARGEST_FRAME if self.trusted else _STRANGERS_FRAME):
                self.ended = True
                break
            if end > len(self._read):
                break
            said = _parsed(self._read[start : start + head])
            if said is None:
                self.ended = True
                break
            frames.append(Frame(said, bytes(self._read[start + head : end])))
            place = end
        del self._read[:place]
        return frames

    def close(self) -> None:
        """Close both streams; the other side reads the end."""
        if self.reader >= 0:
            os.close(self.reader)
            if self.writer != self.reader:
                os.close(self.writer)
        self.reader = self.writer = -1
        self.ended = True
        self._queue.clear()
        self.queued = 0


def _parsed(head: bytearray) -> dict[str, Any] | None:
    try:
        said = json.loads(head)
    except ValueError:
        return None
    return said if isinstance(said, dict) and isinstance(said.get("say"), str) else None
