"""The request to stop: a signal sets a flag, and the ranks agree on it at the end of a step.

Nothing is done in a handler. Python runs handlers in the main thread between bytecodes only, a rank may be told a
step earlier than the others, and a save is a collective: so the handler sets a flag, the engine sums the flags of all
ranks in the one collective of its step, and all of them stop at the same boundary. One rank told is enough.

Signals come more than once and in any order (Slurm sends SIGCONT with each); repeats change nothing.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.run_dir import RunDir, read_object

if TYPE_CHECKING:
    from types import FrameType

EXIT_CODE = 75
_DEADLINE_EVERY_S = 5.0
_KILL_WAIT_S = 30.0


class Preempted(SystemExit):
    """The run was told to stop and has been saved: it ends with exit code 75, which means start me again."""

    def __init__(self, message: str = "") -> None:
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message or "checkpointed on request"


class _Request:
    """What this rank was told.

    Attributes:
        by: the signal's name, or "deadline"; None while nothing was said.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self.at = 0.0
        self.listening = False
        self._looked_at = 0.0

    def hear(self, number: int, _frame: FrameType | None) -> None:
        if self.by is None:
            self.by, self.at = signal.Signals(number).name, time.time()

    def look_at_the_clock(self) -> None:
        """Read the supervisor's deadline now and then: the warning signal may be lost on its way."""
        now = time.monotonic()
        if self.by is not None or now - self._looked_at < _DEADLINE_EVERY_S:
            return
        self._looked_at = now
        begin = _deadline()[0]
        if begin is not None and time.time() > begin:
            self.by, self.at = "deadline", time.time()


_request = _Request()


def listen() -> None:
    """Take SIGTERM and the run's warning signal as a request to stop, from now on. Only in a run of hpcds.

    Outside of one nobody would start the script again, so its signals keep their meaning.
    """
    if _request.listening or threading.current_thread() is not threading.main_thread():
        return
    for number in _signals():
        signal.signal(number, _request.hear)
        _request.listening = True


def _signals() -> set[signal.Signals]:
    """What the scheduler tells the ranks of this run with; nothing outside of a run."""
    run_dir = os.environ.get("HPCDS_RUN_DIR")
    if run_dir is None:
        return set()
    restart = read_object(RunDir(Path(run_dir)).config).get("restart", {})
    return {signal.SIGTERM, signal.Signals[f"SIG{restart.get('signal', 'USR2')}"]}


def told_to_stop() -> bool:
    """Whether this rank was told to stop. Others may not have been yet: agree before acting on it."""
    _request.look_at_the_clock()
    return _request.by is not None


def seconds_left() -> float:
    """Seconds until this rank may be killed, once it was told to stop; infinite where nobody knows.

    A scheduler that ends a job now sends SIGTERM and kills after ``KillWait``, 30 s unless an administrator has changed it.
    """
    end = _request.at + _KILL_WAIT_S if _request.by == "SIGTERM" else _deadline()[1]
    return math.inf if end is None else max(end - time.time(), 0.0)


def _deadline() -> tuple[float | None, float | None]:
    """When the supervisor wants a save to begin, and when the job ends, in seconds since the epoch."""
    path = os.environ.get("HPCDS_DEADLINE")
    if path is None:
        return None, None
    try:
        begin, end = map(float, Path(path).read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return None, None
    return begin, end


def told_by() -> str:
    """What told this rank: a signal's name, "deadline", or "another rank"."""
    return _request.by or "another rank"


def ignore_in_worker(_worker: int) -> None:
    """``worker_init_fn`` of data loaders: Slurm signals them too, and the rank ends them itself."""
    for number in _signals():
        signal.signal(number, signal.SIG_IGN)
