"""The request to stop, as one rank hears it: signals, and the deadline that the supervisor writes.

| heard                                        | this rank stops                                                    |
|----------------------------------------------|--------------------------------------------------------------------|
| SIGTERM                                      | at the next boundary: the scheduler ends the job now               |
| the run's warning signal                     | at the next boundary                                               |
| the same, and it is the one of the time limit, and early | when the deadline says that saving should begin        |
| nothing, and the deadline says "begin"       | at the next boundary: the warning signal may be lost on its way    |

Slurm sends the warning signal up to 60 s before it was asked to; a minute of training on many nodes is worth a look at a file.
Signals come more than once and in any order (Slurm sends SIGCONT with each); repeats change nothing.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.run_dir import RunDir, read_object
from hpc_ds.runtime.descent import run_of_this_process

if TYPE_CHECKING:
    from types import FrameType

LOOK_EVERY_S = 5.0
_LOOK_SOON_S = 1.0  # once something was heard
_KILL_WAIT_S = 30.0
_STOPS, _GOES_ON, _UNDECIDED = 0, 1, 2  # what is made of what was heard; it only ever gets less
_EARLY_BY_S = 90.0  # a warning signal that comes earlier than this before its time was sent for another reason


@dataclass(frozen=True, slots=True)
class Deadline:
    """What the supervisor knows of the end, in seconds since the epoch: ``BEGIN END [final|-] [LEAD]``.

    Attributes:
        begin: when ranks should begin to save.
        end: when the job ends.
        final: the scheduler has said so after it began to end the job.
        lead_s: how long before the end the scheduler was asked to send the warning signal; None where it was not.
    """

    begin: float
    end: float
    final: bool = False
    lead_s: float | None = None

    @classmethod
    def read(cls) -> Deadline | None:
        """That of this run; None while there is none."""
        path = os.environ.get("HPCDS_DEADLINE")
        if path is None:
            return None
        try:
            words = Path(path).read_text(encoding="utf-8").split()
            begin, end = float(words[0]), float(words[1])
            lead = float(words[3]) if len(words) > 3 else None
        except (OSError, ValueError, IndexError):
            return None
        return cls(begin, end, words[2:3] == ["final"], lead)

    def leaves_time(self, now: float) -> bool:
        """Whether a warning signal heard just now is that of the time limit, and came before it was needed."""
        return self.lead_s is not None and self.end - self.lead_s - _EARLY_BY_S <= now < self.begin


def signals_of_run() -> set[signal.Signals]:
    """What the scheduler tells the ranks of this run with; nothing outside of a run, and below a rank."""
    return signals_of(run_of_this_process())


def signals_of(root: Path | None) -> set[signal.Signals]:
    """What the scheduler tells the ranks of a run with."""
    if root is None:
        return set()
    restart = read_object(RunDir(root).config).get("restart", {})
    return {signal.SIGTERM, signal.Signals[f"SIG{restart.get('signal', 'USR2')}"]}


class Request:
    """What this rank was told. Handlers and the watcher's thread write here, without a lock: what comes first counts.

    Attributes:
        by: the signal's name, or "deadline"; None while nothing was said.
        watched: a watcher looks at the clock.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self.watched = False
        self._made_of_it = _STOPS
        self._killed_at: float | None = None  # by a scheduler that sent SIGTERM
        self._looked_at = -math.inf
        self._before: dict[signal.Signals, Any] = {}  # handlers, before ours

    @property
    def signals(self) -> set[signal.Signals]:
        """Those that are listened to; not one that the script has a handler of its own for since."""
        return {number for number in self._before if signal.getsignal(number) == self.hear}

    def listen(self, numbers: set[signal.Signals]) -> None:
        """Take signals as a request to stop, from now on; once, and in the main thread only."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            self._before[number] = signal.signal(number, self.hear)
        if numbers:
            os.register_at_fork(after_in_child=self._leave_child_alone)

    def _leave_child_alone(self) -> None:
        """A forked child is no rank: SIGTERM ends it, as whoever forked it expects, and the warning does not."""
        self.watched = False
        for number in self.signals:
            before = self._before[number] or signal.SIG_DFL
            signal.signal(number, before if number == signal.SIGTERM else signal.SIG_IGN)

    def hear(self, number: int, _frame: FrameType | None = None) -> None:
        """Take note of a signal; nothing else is done in a handler."""
        ends_now = number == signal.SIGTERM
        killed_at = time.time() + _KILL_WAIT_S if ends_now else None
        if self.by is None:
            self._made_of_it, self._killed_at = _STOPS if ends_now else _UNDECIDED, killed_at
            self.by = signal.Signals(number).name
            return
        if ends_now:
            if self._made_of_it == _GOES_ON:
                self.by = "SIGTERM"
            self._made_of_it = _STOPS
        self._killed_at = self._killed_at or killed_at

    def is_due(self) -> bool:
        """Whether this rank should stop at the next boundary; without news, and with a watcher, a look at a flag."""
        if self._made_of_it != _STOPS or not self.watched:
            self.look_at_the_clock()
        return self.by is not None and self._made_of_it == _STOPS

    def look_at_the_clock(self) -> None:
        """Read the supervisor's deadline: now and then, and at once where a decision hangs on it."""
        heard = self.by is not None
        if heard and self._made_of_it == _STOPS:
            return
        now = time.monotonic()
        since = now - self._looked_at
        if since < (_LOOK_SOON_S if heard else LOOK_EVERY_S) and not (heard and self._made_of_it == _UNDECIDED):
            return
        self._looked_at = now
        deadline = Deadline.read()
        if heard:
            goes_on = deadline is not None and deadline.leaves_time(time.time())
            self._made_of_it = min(self._made_of_it, _GOES_ON if goes_on else _STOPS)
        elif self.by is None and deadline is not None and time.time() > deadline.begin:
            self.by = "deadline"

    def seconds_left(self) -> float:
        """Seconds until this rank may be killed; infinite where nobody knows.

        A scheduler that ends a job now sends SIGTERM and kills after ``KillWait``, 30 s unless an administrator has changed
        it; where it has named the end since, that is the better knowledge.
        """
        deadline = Deadline.read()
        end = None if deadline is None else deadline.end
        if self._killed_at is not None and not (deadline is not None and deadline.final):
            end = self._killed_at
        return math.inf if end is None else max(end - time.time(), 0.0)


request = Request()
