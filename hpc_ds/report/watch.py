"""Several runs, looked at again and again until all are over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpc_ds.cluster.queue import Queue
from hpc_ds.report.status import Status, statuses_of
from hpc_ds.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hpc_ds.report.beats import Pulse

_LOOK_EVERY_S, _PER_RUN_S = 2.0, 0.1
_STEPS_EVERY_S = 30.0


def watch(
    runs: Sequence[RunDir],
    queue: Queue | None = None,
    sleep: Callable[[float], None] = time.sleep,
    folder: Path | None = None,
) -> Iterator[list[Status]]:
    """How runs are, every two seconds and a little more for many; ends when all are over, after telling so.

    With a folder, runs that are made in it meanwhile are taken up.
    """
    queue = queue or Queue()
    runs, known = list(runs), set() if folder is None else {run.root for run in RunDir.all_in(folder)}
    pulses: dict[tuple[Path, int], Pulse] = {}
    before: list[int] = []
    while True:
        found = statuses_of(runs, queue, pulses)
        ended = [sum(attempt.cause is not None for attempt in one.attempts) for one in found]
        if before and ended != before:
            queue.expect_news()
        before = ended
        yield found
        if all(one.over for one in found):
            return
        sleep(_LOOK_EVERY_S + _PER_RUN_S * len(runs))
        if folder is not None:
            fresh = [run for run in RunDir.all_in(folder) if run.root not in known]
            known.update(run.root for run in fresh)
            runs += fresh


class News:
    """Which runs are worth a line again: those whose state or reason is another one, and every 30 s those with new steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, tuple[object, int | None, float]] = {}

    def of(self, found: Sequence[Status]) -> list[Status]:
        """Those of which there is something new to say."""
        now, fresh = self._clock(), []
        for one in found:
            words = (one.state, one.reason, [(rank["rank"], rank["how"]) for rank in one.quiet_ranks])
            told, step, at = self._told.get(one.run_dir, (None, None, 0.0))
            if told != words or (step != one.step and now - at >= _STEPS_EVERY_S):
                self._told[one.run_dir] = (words, one.step, now)
                fresh.append(one)
        return fresh
