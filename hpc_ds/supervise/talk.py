"""Patient talk with a scheduler that may be away for minutes: slurmctld restarts while its jobs go on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpc_ds.errors import NoProgramError, RefusedError, SchedulerError, SubmitError
from hpc_ds.supervise.say import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hpc_ds.cluster.scheduler import JobState, Scheduler
    from hpc_ds.run_dir import RunDir

_PATIENCE_S = 1800.0  # a job holds its nodes meanwhile, but without the scheduler it can neither end well nor go on
_LONGEST_PAUSE_S = 15.0
_LOOKS = 15


class Talk:
    """What the supervisor of one job asks of its scheduler."""

    def __init__(self, scheduler: Scheduler, job_id: str) -> None:
        self._scheduler = scheduler
        self._job_id = job_id
        self._silent = self._heard = False
        self.mute = False

    def show(self, patience_s: float = 0.0) -> JobState | None:
        """What the scheduler says of the job; None when it says nothing for so long, or has no such program here."""
        begin, pause = time.monotonic(), 1.0
        while not self.mute:
            try:
                job = self._scheduler.show(self._job_id)
            except SchedulerError as error:
                self._note_silence(error)
            else:
                if self._silent:
                    say("the scheduler answers again")
                self._silent, self._heard = False, True
                return job
            if time.monotonic() - begin > patience_s:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return None

    def _note_silence(self, error: SchedulerError) -> None:
        """Say it once. A program that was never there will not come; one that was is away while packages are updated."""
        if isinstance(error, NoProgramError) and not self._heard:
            self.mute = True
            say(f"{error}; the run goes on without the scheduler's word")
        elif not self._silent:
            self._silent = True
            say(f"the scheduler does not answer: {error}")

    def kill_wait_s(self) -> float:
        """Seconds between SIGTERM and SIGKILL at the end of the job."""
        return self._scheduler.kill_wait_s()

    def down(self, nodes: Sequence[str]) -> list[str]:
        """Those of some nodes that are known not to work."""
        return self._scheduler.down(nodes)

    def queue_again(self, action: str, restarts: int) -> bool:
        """Ask for ``requeue`` or ``hold``, until the scheduler has decided; whether it was seen to do it.

        Args:
            action: what to ask for.
            restarts: of the job before.

        Raises:
            RefusedError: it will not, or cannot be asked from here.
        """
        ask = self._scheduler.requeue if action == "requeue" else self._scheduler.hold

        def done() -> bool:
            return self._queued_again(restarts, looks=1)

        self._insist(action, lambda: ask(self._job_id), done)
        return self._queued_again(restarts, looks=_LOOKS)

    def submit_successor(self, run: RunDir, exclude: Sequence[str]) -> str:
        """Submit the run anew, to start when this job has ended; returns the new job's id.

        Raises:
            RefusedError: it will not, or cannot be asked from here.
        """
        ids: list[str] = []

        def submit() -> None:
            ids.append(self._scheduler.submit(run, self._job_id, exclude))

        self._insist("successor", submit, lambda: False)
        return ids[0]

    def exclude(self, nodes: Sequence[str]) -> bool:
        """Keep the queued job from nodes; whether the scheduler took it."""
        try:
            self._insist("exclude", lambda: self._scheduler.exclude(self._job_id, nodes), lambda: False)
        except RefusedError as error:
            say(f"nodes {', '.join(nodes)} are not excluded: {error}")
            return False
        return True

    def _insist(self, what: str, ask: Callable[[], None], done: Callable[[], bool]) -> None:
        """Ask until the scheduler has decided."""
        begin, pause = time.monotonic(), 1.0
        while True:
            try:
                ask()
            except (RefusedError, NoProgramError, SubmitError) as error:
                if done():
                    return
                raise RefusedError(str(error)) from error
            except SchedulerError as error:
                say(f"{what} failed: {error}")
                if done():
                    return
                if time.monotonic() - begin > _PATIENCE_S:
                    raise RefusedError(f"{what}: no answer in {_PATIENCE_S:g} s") from error
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                return

    def _queued_again(self, restarts: int, looks: int) -> bool:
        """Look for a moment whether the scheduler really did it: only then is it said."""
        for look in range(looks):
            job = self.show()
            if job is not None and (job.restarts > restarts or job.held or job.state == "PENDING"):
                return True
            if look + 1 < looks:
                time.sleep(0.2)
        return False
