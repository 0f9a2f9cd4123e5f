"""What schedulers say of many runs, asked for together and seldom.

All jobs of all runs are asked for by one squeue, at most every 10 s; while nothing changes, or while Slurm does not
answer, the pause grows to 30 s. In between the last answer stands. A run of site local is read from its file, whenever
it is asked for. Of a job that slurmctld has forgotten though its run says that an attempt goes on, sacct is asked, once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpc_ds.cluster.local import Local
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.cluster.shell import Shell
from hpc_ds.cluster.shell import run as run_program
from hpc_ds.cluster.slurm import Slurm
from hpc_ds.errors import SchedulerError
from hpc_ds.run_dir import read_object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hpc_ds.run_dir import RunDir

SHORTEST_PAUSE_S, LONGEST_PAUSE_S, _GROWTH = 10.0, 30.0, 1.5

Answer = JobState | SchedulerError | None
"""What a scheduler says of a job: its state, that there is none (any more), or why it says nothing."""


class Queue:
    """The schedulers, seen from a person's command: one object for as long as the command runs."""

    def __init__(self, shell: Shell = run_program, clock: Callable[[], float] = time.monotonic) -> None:
        self._slurm = Slurm(shell)
        self._clock = clock
        self._asked: float | None = None
        self._pause_s = SHORTEST_PAUSE_S
        self._said: dict[str, JobState] = {}
        self._known: set[str] = set()  # asked for last time
        self._silence: SchedulerError | None = None
        self._accounted: dict[str, JobState | None] = {}

    def answers(self, runs: Sequence[RunDir]) -> list[Answer]:
        """What is known of the job of each run."""
        jobs = [(run, str(read_object(run.job).get("job_id", ""))) for run in runs]
        local = [str(read_object(run.site).get("scheduler", "")) == "local" for run in runs]
        self._ask({job_id for (_, job_id), here in zip(jobs, local, strict=True) if job_id and not here})
        return [
            self._local(run, job_id) if here else self._remote(job_id)
            for (run, job_id), here in zip(jobs, local, strict=True)
        ]

    def expect_news(self) -> None:
        """Something happened to a run: the scheduler is worth asking soon."""
        self._pause_s = SHORTEST_PAUSE_S

    def last_words(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """How jobs ended that slurmctld has forgotten, as far as there is accounting; each is asked for once."""
        unknown = [job_id for job_id in job_ids if job_id not in self._accounted]
        if unknown:
            states = {one.job_id: JobState(one.state, nodes=one.nodes) for one in self._slurm.accounts(unknown)}
            self._accounted |= {job_id: states.get(job_id) for job_id in unknown}
        found = {job_id: self._accounted[job_id] for job_id in job_ids}
        return {job_id: state for job_id, state in found.items() if state is not None and not state.active}

    def _ask(self, job_ids: set[str]) -> None:
        now = self._clock()
        if not job_ids or (self._asked is not None and now - self._asked < self._pause_s):
            return
        before = self._said
        try:
            self._said = self._slurm.show_many(sorted(job_ids))
            self._known, self._silence = job_ids, None
            quiet = self._asked is not None and before == self._said
        except SchedulerError as error:
            self._silence, quiet = error, True
        self._asked = now
        self._pause_s = min(self._pause_s * _GROWTH, LONGEST_PAUSE_S) if quiet else SHORTEST_PAUSE_S

    def _remote(self, job_id: str) -> Answer:
        if not job_id:
            return None
        if self._silence is not None:
            return self._silence
        if job_id not in self._known:
            return SchedulerError(f"job {job_id}: not asked for yet; look again in {SHORTEST_PAUSE_S:g} s")
        return self._said.get(job_id)

    @staticmethod
    def _local(run: RunDir, job_id: str) -> Answer:
        try:
            return Local(run).show(job_id) if job_id else None
        except SchedulerError as error:
            return error
