"""The supervisor's words, in the job's own log."""

from __future__ import annotations

import contextlib
import os
import time


def say(message: str) -> None:
    """One line in the job's own log."""
    with contextlib.suppress(OSError):  # a full disk must not keep the run from being queued again
        os.write(2, f"hpcds: {time.strftime('%H:%M:%S')} {message}\n".encode(errors="replace"))
