"""What a rank raised, written where the supervisor finds it: the first failure of many is told by its time."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from hpc_ds.cluster.process import node_name
from hpc_ds.run_dir import write_json

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_LONGEST_MESSAGE = 4_000
_MOST_LINES = 400


class _Told:
    """The hook, in front of the one that was there."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.pid = os.getpid()
        self._next = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        at = time.time()
        main = threading.current_thread() is threading.main_thread() and os.getpid() == self.pid
        try:
            if main and issubclass(kind, Exception):
                self._write(at, traceback.TracebackException(kind, error, trace))
        finally:
            self._next(kind, error, trace)

    def _write(self, at: float, told: traceback.TracebackException) -> None:
        lines = "".join(told.format()).splitlines()
        failure = {
            "rank": self.rank,
            "host": node_name(),
            "time": at,
            "type": told.exc_type.__name__ if told.exc_type is not None else "",
            "message": str(told)[:_LONGEST_MESSAGE],
            "traceback": lines[-_MOST_LINES:],
        }
        with contextlib.suppress(OSError):  # a full disk: the log of the rank says the same
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"rank-{self.rank}.json", failure)


_told: _Told | None = None


def tell_of_errors(folder: Path, rank: int) -> None:
    """Write an error that ends this process to ``folder/rank-R.json``, from now on, and then treat it as before."""
    global _told  # noqa: PLW0603 - one a process
    if _told is None or _told.pid != os.getpid():
        sys.excepthook = _told = _Told(folder, rank)
    _told.folder, _told.rank = folder, rank
