"""How far an attempt has come, from the events that its rank 0 writes, read as they are written."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from hpc_ds.tail import Tail

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir

_RECENT_STEPS = 200
_RECENT_SAVES = 5


class Progress:
    """The steps and saves of one attempt.

    Attributes:
        first_step, last_step: optimizer steps it took; None before the first.
        saved_step: of the last save that rank 0 has told of.
        first_step_at: when the first one was done, in rank 0's seconds since the epoch.
        seen_at: when the last event was written, by the same clock; None before the first.
    """

    def __init__(self, run: RunDir, number: int, *, from_begin: bool = False) -> None:
        """Args: from_begin: read what was written so far too, for an attempt that is over."""
        self._number = number
        size = run.events.stat().st_size if run.events.exists() else 0
        self._tail = Tail(run.events, at=0 if from_begin else size)
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._saves: deque[float] = deque(maxlen=_RECENT_SAVES)
        self._unsaved: dict[int, float] = {}  # seconds of the steps since the last save
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.saved_step: int | None = None
        self.first_step_at: float | None = None
        self.seen_at: float | None = None

    def update(self) -> None:
        """Take note of what has been written since the last time."""
        for event in self._tail.new():
            if event.get("attempt") == self._number:
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, step = event.get("event"), event.get("step")
        self.seen_at = event.get("time", self.seen_at)
        if kind == "saved" and isinstance(step, int):
            self.saved_step = step
            self._saves.append(float(event.get("seconds") or 0.0))
            self._unsaved = {number: seconds for number, seconds in self._unsaved.items() if number > step}
        if kind != "step" or not isinstance(step, int):
            return
        seconds = float(event.get("seconds") or 0.0)
        if self.first_step is None:
            self.first_step, self.first_step_at = step, self.seen_at
        else:
            self._recent.append(seconds)  # the first one waits for caches and compilers
        self.last_step = step
        self._unsaved[step] = seconds

    @property
    def step_s(self) -> float | None:
        """The longest of the recent steps in seconds; None before the second one."""
        return max(self._recent, default=None)

    @property
    def save_s(self) -> float | None:
        """The longest of the recent saves in seconds, until it was durable; None before the first."""
        return max(self._saves, default=None)

    def lost_s(self, saved_step: int | None) -> float:
        """Seconds that went into steps after ``saved_step``, which are taken again."""
        return sum(seconds for step, seconds in self._unsaved.items() if saved_step is None or step > saved_step)
