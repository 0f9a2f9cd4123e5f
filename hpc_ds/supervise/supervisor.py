"""One attempt of a run, seen from the batch host: start the ranks, learn why they stopped, act on it.

The supervisor takes the place of the job script, so the scheduler's signals to the batch shell reach it. It never
asks the ranks to save: the scheduler signals them itself. It closes the ledger before it asks for a requeue, because
a requeue ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.config.job import lead_s, python_of
from hpc_ds.config.load import load_resolved, load_site
from hpc_ds.errors import RunError, SchedulerError
from hpc_ds.launch.local import LocalRunner
from hpc_ds.launch.runner import Failure, in_words
from hpc_ds.launch.srun import SrunRunner, srun_command
from hpc_ds.run_dir import write_atomic
from hpc_ds.supervise.ledger import close_attempt, open_attempt, read_ledger, steps_of
from hpc_ds.supervise.policy import Ended, action_after, cause_of

if TYPE_CHECKING:
    from hpc_ds.cluster.scheduler import JobState, Scheduler
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.launch.runner import Runner
    from hpc_ds.run_dir import RunDir

_WAKE = {signal.SIGTERM, signal.SIGCHLD, signal.SIGINT}
_LOOK_EVERY_S = 1.0
_DEADLINE_EVERY_S = 60.0
_ASK_FOR_S = 20.0
_HELD_STILL_FOR_S = 300.0
_LOOKS = 15
_NOT_INHERITED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def supervise(run: RunDir) -> int:
    """Run one attempt; returns the exit code of the job script.

    Raises:
        RunError: this process is not the job of that run.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKE)
    job, site = load_resolved(run.config), load_site(str(run.site))
    job_id = _job_id(run, site)
    supervisor = Supervisor(run, job, site, job_id, scheduler_named(site.scheduler, run))
    return supervisor.attempt()


def _job_id(run: RunDir, site: SiteConfig) -> str:
    name = "HPCDS_LOCAL_JOB" if site.scheduler == "local" else "SLURM_JOB_ID"
    job_id = os.environ.get(name)
    if not job_id:
        raise RunError(f"run {str(run.root)!r}: {name} is not set; supervise runs inside the job, start it with submit")
    return job_id


class Supervisor:
    """One attempt, from open ledger to closed ledger and requeue."""

    def __init__(self, run: RunDir, job: JobConfig, site: SiteConfig, job_id: str, scheduler: Scheduler) -> None:
        self._run = run
        self._job = job
        self._site = site
        self._job_id = job_id
        self._scheduler = scheduler
        self._terminated = False
        self._told: JobState | None = None
        self._deadline_at = 0.0

    def attempt(self) -> int:
        """Open the ledger, run the ranks, close the ledger, act."""
        at_start = self._ask()
        restarts = at_start.restarts if at_start is not None else int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        nodes = at_start.nodes if at_start is not None else os.environ.get("SLURM_JOB_NODELIST", "")
        attempt = open_attempt(self._run, self._job_id, os.uname().nodename, nodes)
        self._write_deadline(at_start)
        _say(f"attempt {attempt.number} of {self._job.name}, job {self._job_id}, on {nodes or 'this machine'}")
        runner = self._runner(attempt.number)
        exit_code = self._run_ranks(runner)
        told = self._told if self._told is not None and self._told.state != "RUNNING" else self._ask()
        ended = Ended(exit_code, told, restarts, self._terminated, runner.due_to, lead_s(self._job), time.time())
        cause, steps = cause_of(ended), steps_of(self._run, attempt.number)
        if ended.requeued and cause != "finished":
            action, why = "leave", f"{cause}: the scheduler starts it again"
        elif told is not None and not told.active and cause != "finished":
            action, why = "leave", f"{cause}: the scheduler has given the job up; `hpcds resume` continues the run"
        else:
            before = read_ledger(self._run)[:-1]
            action, why = action_after(cause, steps["last_step"], before, self._job.restart, joined=self._joined())
        failure = runner.failure if cause == "crashed" else None
        detail = f"{why} ({_first(failure)})" if failure is not None else why
        close_attempt(
            self._run,
            attempt.number,
            cause=cause,
            action=action,
            exit_code=exit_code,
            detail=detail,
            failure=None if failure is None else asdict(failure),
            **steps,
        )
        _say(f"attempt {attempt.number} ended: {cause}, exit code {exit_code}; {detail}")
        self._act(action, restarts)
        return 0 if cause == "finished" else exit_code

    def _joined(self) -> bool:
        """Whether the run's program uses our engine, so that its steps can be counted."""
        return self._run.events.exists()

    def _runner(self, number: int) -> Runner:
        job, logs = self._job, self._run.attempt_logs(number)
        # What the submitting shell exported about another launch must not name these ranks.
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED or name in job.env}
        environ = {
            **inherited,
            "HPCDS_RUN_DIR": str(self._run.root),
            "HPCDS_ATTEMPT": str(number),
            "HPCDS_DEADLINE": str(self._run.deadline),
        }
        argv = self._argv()
        if self._site.scheduler == "local":
            return LocalRunner(argv, environ, job.resources.world_size, logs, self._run.local / "step.json")
        return SrunRunner(srun_command(argv, job.resources, self._site.srun), environ, logs)

    def _argv(self) -> list[str]:
        if self._job.command is not None:
            return [*self._job.command, *self._job.args]
        return [python_of(self._job), "-u", str(self._job.script), *self._job.args]

    def _run_ranks(self, runner: Runner) -> int:
        try:
            os.chdir(self._job.workdir or ".")  # ranks start there; this process started where no module is shadowed
            runner.start()
        except OSError as error:
            words = f"{error.strerror}: {error.filename}"
            runner.failure = Failure(None, os.uname().nodename, 127, f"cannot be started: {words}", [])
            return 127
        while (exit_code := runner.poll()) is None:
            woken = signal.sigtimedwait(_WAKE, _LOOK_EVERY_S)
            if woken is not None and woken.si_signo in {signal.SIGTERM, signal.SIGINT}:
                self._hear_the_end()
                if self._told is not None and not self._told.active:
                    runner.terminate()  # nobody else will: the scheduler has no such job any more
            if time.monotonic() - self._deadline_at > _DEADLINE_EVERY_S:
                self._refresh_deadline()
        return exit_code

    def _hear_the_end(self) -> None:
        """The scheduler told the whole job to end: ask why while it still knows."""
        self._terminated = True
        if self._told is None or self._told.state == "RUNNING":
            self._told = self._ask(patience_s=0)

    def _ask(self, patience_s: float = _ASK_FOR_S) -> JobState | None:
        """What the scheduler says of this job; None when it says nothing for a while."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self._scheduler.show(self._job_id)
            except SchedulerError as error:
                _say(f"the scheduler does not answer: {error}")
                if time.monotonic() > deadline:
                    return None
                time.sleep(1.0)

    def _refresh_deadline(self) -> None:
        """The limit can be changed meanwhile; a scheduler that does not answer has not changed it."""
        job = self._ask(patience_s=0)
        self._deadline_at = time.monotonic()
        if job is not None:
            self._write_deadline(job)

    def _write_deadline(self, job: JobState | None) -> None:
        self._deadline_at = time.monotonic()
        with contextlib.suppress(OSError):  # the warning signal says the same
            if job is not None and job.end_time is not None:
                write_atomic(self._run.deadline, f"{job.end_time - lead_s(self._job)} {job.end_time}\n")
            else:
                self._run.deadline.unlink(missing_ok=True)

    def _act(self, action: str, restarts: int) -> None:
        if action not in {"requeue", "hold"}:
            return
        ask = self._scheduler.requeue if action == "requeue" else self._scheduler.hold
        deadline = time.monotonic() + _ASK_FOR_S
        while True:
            try:
                ask(self._job_id)
                break
            except SchedulerError as error:
                _say(f"{action} failed: {error}")
                if self._queued_again(restarts):
                    break
                if time.monotonic() > deadline:
                    _say(f"{action} was given up; `hpcds resume {self._run.root}` continues the run")
                    return
                time.sleep(2.0)
        if self._queued_again(restarts):
            _say(f"{action}: the scheduler took it")
        else:
            _say(f"{action}: asked for, not yet seen")
            _hold_still()

    def _queued_again(self, restarts: int) -> bool:
        """Look for a moment whether the scheduler really did it: only then is it said."""
        for _ in range(_LOOKS):
            job = self._ask(patience_s=0)
            if job is not None and (job.restarts > restarts or job.held or job.state == "PENDING"):
                return True
            time.sleep(0.2)
        return False


def _hold_still() -> None:
    """Wait to be ended: leaving before the scheduler has taken a requeue would end the job instead."""
    deadline = time.monotonic() + _HELD_STILL_FOR_S
    while time.monotonic() < deadline:
        woken = signal.sigtimedwait(_WAKE, 1.0)
        if woken is not None and woken.si_signo == signal.SIGTERM:
            return


def _first(failure: Failure) -> str:
    """Who failed first, how, and the last thing it said."""
    if failure.rank is None:
        return failure.how
    said = [line.removeprefix(f"[rank{failure.rank}]: ").strip() for line in failure.last_lines if line.strip()]
    words = f", {said[-1][:200]}" if said else ""
    return f"rank {failure.rank} on {failure.host}: {in_words(failure.exit_code)}{words}"


def _say(message: str) -> None:
    """One line in the job's own log."""
    sys.stderr.write(f"hpcds: {time.strftime('%H:%M:%S')} {message}\n")
    sys.stderr.flush()
