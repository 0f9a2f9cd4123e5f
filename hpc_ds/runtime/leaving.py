"""A quick end for a rank that was told to stop: its grace period runs, and the next start waits for its end.

Python ends by collecting the cycles of everything that was ever imported; with torch that takes a second, for memory
which the system frees at once. So that is left out, after all that a script does at its end: blocks of ``finally``,
handlers of ``atexit``. What stands in a cycle is then not finalized, which Python never promised. Files are flushed
first, also those in a cycle, whose buffers Python's own end may lose.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Leaving:
    """Whether this rank leaves because it was told to."""

    def __init__(self) -> None:
        self._hurries = False
        atexit.register(self._skip_the_last_collection)  # handlers that are registered first run last

    def hurry(self) -> None:
        """From now on an end of this process is a quick one."""
        self._hurries = True

    def _skip_the_last_collection(self) -> None:
        if self._hurries:
            files = set(_with_subclasses(io.IOBase.__base__ or io.IOBase))  # the one in C, of which all files are
            for thing in [thing for thing in gc.get_objects() if type(thing) in files]:
                with contextlib.suppress(OSError, ValueError):  # closed, or not to be written to
                    thing.flush()
            gc.freeze()


def _with_subclasses(kind: type) -> Iterator[type]:
    """Found from above: there are hundreds of thousands of objects to compare with."""
    yield kind
    subclasses: list[type] = type.__subclasses__(kind)
    for below in subclasses:
        yield from _with_subclasses(below)


leaving = Leaving()
