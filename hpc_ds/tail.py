"""JSON-lines files that grow while they are read: what came since the last look, and what stands at the end.

A run of a million steps has an events.jsonl of hundreds of megabytes. Whoever asks for its last step reads the last
64 KiB; whoever follows it reads each byte once.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

END_BYTES = 65536
_BLOCK_BYTES = 1 << 20


class Tail:
    """The objects of a JSON-lines file that came since the last look, by byte offset.

    A last line without its end is left until it has one. A file that is another one now, or shorter than it was, is
    read from its beginning; one that is not there has no lines.
    """

    def __init__(self, path: Path, *, at: int = 0) -> None:
        """Args: at: the byte to begin at, such as the size that the file had."""
        self._path = path
        self._offset = at
        self._file: int | None = None  # its inode

    def new(self) -> list[dict[str, Any]]:
        """What came since the last call."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size < self._offset or self._file not in {None, found.st_ino}:
                    self._offset = 0
                self._file = found.st_ino
                if found.st_size == self._offset:
                    return []
                file.seek(self._offset)
                fresh = file.read()
        except OSError:
            return []
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        return objects(whole)


def end_of(path: Path, size_bytes: int = END_BYTES) -> list[dict[str, Any]]:
    """The objects in the last ``size_bytes`` of a JSON-lines file; torn lines at both ends are left out."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            begin = max(file.tell() - size_bytes, 0)
            file.seek(begin)
            text = file.read(size_bytes)
    except OSError:
        return []
    return objects(text[text.find(b"\n") + 1 :] if begin else text)


def sample_of(path: Path, blocks: int = 256, block_bytes: int = 8192) -> list[dict[str, Any]]:
    """All objects of a short JSON-lines file; of a long one those in blocks at even distances, both ends included."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= blocks * block_bytes:
                file.seek(0)
                return objects(file.read())
            found = []
            for block in range(blocks):
                begin = block * (size - block_bytes) // (blocks - 1)
                file.seek(begin)
                text = file.read(block_bytes)
                found += objects(text[text.find(b"\n") + 1 if begin else 0 : text.rfind(b"\n") + 1])
            return found
    except OSError:
        return []


def each(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file one by one, however long it is."""
    try:
        with path.open("rb") as file:
            while lines := file.readlines(_BLOCK_BYTES):
                yield from objects(b"".join(lines))
    except OSError:
        return


def objects(text: bytes) -> list[dict[str, Any]]:
    """The JSON objects of a text, one a line; lines that are none are left out."""
    found = []
    for line in text.split(b"\n"):  # splitlines would also cut at characters that JSON leaves as they are
        with contextlib.suppress(ValueError):
            data = json.loads(line.decode(errors="replace"))
            if isinstance(data, dict):
                found.append(data)
    return found
