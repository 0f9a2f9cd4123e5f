"""The deadline file: when ranks must begin to save, and when the job ends. Ranks read it; the supervisor keeps it true.

``<begin> <end> <final|-> <lead of the signal>``: seconds since the epoch, and seconds. ``final`` says that the scheduler
has begun to end the job, so ``end`` is better knowledge than a guess from the signal.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hpc_ds.config.job import lead_s, time_limit_s
from hpc_ds.run_dir import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hpc_ds.config.job import JobConfig
    from hpc_ds.run_dir import RunDir

_SAVES, _STEPS, _MARGIN_S = 1.5, 2.0, 20.0
_LONGEST_SHARE = 0.5


def measured_lead_s(job: JobConfig, step_s: float | None, save_s: float | None) -> float:
    """Seconds before the time limit at which ranks must begin to save.

    Once a step and a save were measured: two steps, one and a half saves, and 20 s to end and be queued again; at most
    half of the time limit. A number in ``restart.lead`` is the user's word and stays.
    """
    asked = lead_s(job)
    if job.restart.lead != "auto" or step_s is None or save_s is None:
        return float(asked)
    lead = _STEPS * step_s + _SAVES * save_s + _MARGIN_S
    limit = job.resources.time
    return lead if limit is None else min(lead, _LONGEST_SHARE * time_limit_s(limit))


def longest(values: Iterable[float | None]) -> float | None:
    """The longest of those that are known."""
    return max((value for value in values if value is not None), default=None)


class Deadline:
    """The deadline file of one attempt.

    Attributes:
        end: when the job ends, as far as is known.
        limit: the same, by its time limit and not because the scheduler ends it before.
    """

    def __init__(self, run: RunDir, job: JobConfig) -> None:
        self._path = run.deadline
        self._job = job
        self._lead = float(lead_s(job))
        self._final = False
        self._written: str | None = None
        self.end: float | None = None
        self.limit: float | None = None

    @property
    def earliest_begin(self) -> float | None:
        """From when on a stop is one for the time limit: by the signal or by the measured lead, whichever is longer."""
        return None if self.limit is None else self.limit - max(self._lead, float(lead_s(self._job)))

    def learn(self, *, step_s: float | None, save_s: float | None) -> None:
        """Take up what steps and saves take now."""
        self._lead = measured_lead_s(self._job, step_s, save_s)
        self._write()

    def ends_at(self, end: float | None, *, final: bool = False) -> None:
        """Take up when the job ends; what the scheduler has said while it ends the job stays."""
        if self._final and not final:
            return
        self.end, self._final = end, final
        self.limit = self.limit if final else end
        self._write()

    def _write(self) -> None:
        if self.end is None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._written = None
            return
        words = f"{self.end - self._lead:.1f} {self.end:.1f} {'final' if self._final else '-'} {lead_s(self._job)}\n"
        if words != self._written:
            with contextlib.suppress(OSError):  # the warning signal says the same
                write_atomic(self._path, words)
                self._written = words
