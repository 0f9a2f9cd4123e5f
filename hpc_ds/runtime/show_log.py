"""Our log on rank 0's stderr, where the script has set up none: progress that nobody sees is no progress.

Levels and handlers of the script's own are left alone, whenever it makes them.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

log = logging.getLogger("hpc_ds")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg] # in Python 3.10 it takes no parameter
    """Silent as soon as a handler of the script's own sees our records."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Whatever it is now: notebooks replace it."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        if not _handlers_of_script():
            super().emit(record)


def show_log(rank: int, level: str | None = None) -> None:
    """Let rank 0's log be seen from INFO up.

    Args:
        rank: of this process; the others show warnings only, as Python does by itself.
        level: of our log, instead of the script's own, on every rank.
    """
    if level is not None:
        log.setLevel(level.upper())
    elif rank == 0 and log.level == logging.NOTSET and not _handlers_of_script():
        log.setLevel(logging.INFO)
    if rank == 0 and not any(isinstance(handler, _Stderr) for handler in log.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s hpc_ds: %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


def _handlers_of_script() -> bool:
    own = (handler for handler in log.handlers if not isinstance(handler, _Stderr))
    return bool(logging.getLogger().handlers) or any(True for _ in own)
