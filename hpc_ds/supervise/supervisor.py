"""One attempt of a run, seen from the batch host: start the ranks, learn why they stopped, act on it.

The supervisor takes the place of the job script, so the scheduler's signals to the batch shell reach it. It never
asks the ranks to save: the scheduler signals them itself. It closes the ledger before it asks for a requeue, because
a requeue ends it.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.cluster.process import node_name
from hpc_ds.compat.environment import variables_of_the_startup
from hpc_ds.config.load import load_resolved, load_site
from hpc_ds.errors import RefusedError, RunError
from hpc_ds.launch.allocation import components_of
from hpc_ds.launch.container import prepare_container, rank_command
from hpc_ds.launch.failure import Failure, first_failure
from hpc_ds.launch.local import LocalRunner
from hpc_ds.launch.node_list import fold
from hpc_ds.launch.runner import CHECKPOINTED
from hpc_ds.launch.srun import SrunRunner, step_command
from hpc_ds.script.job_file import note_job
from hpc_ds.script.waiting import redirect
from hpc_ds.supervise import preflight
from hpc_ds.supervise.ledger import Attempt, close_attempt, note_preflight, open_attempt, outcome, read_ledger
from hpc_ds.supervise.notify import Notice
from hpc_ds.supervise.policy import Ended, action_after, after_preflight, cause_of, excluded_nodes
from hpc_ds.supervise.preflight import Preflight
from hpc_ds.supervise.progress import Progress
from hpc_ds.supervise.say import say
from hpc_ds.supervise.talk import Talk
from hpc_ds.supervise.watch import DEAF_TO, WAKE, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hpc_ds.cluster.scheduler import JobState, Scheduler
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.launch.runner import Runner
    from hpc_ds.run_dir import RunDir

_ANSWER_AT_START_S = 10.0
_ANSWER_AT_END_S = 1800.0
_HELD_STILL_FOR_S = 300.0
_ENDED_WITHIN_S = 40.0
_NOT_INHERITED = (
    "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "HPCDS_RANK_PROCESS",
)  # fmt: skip


def supervise(run: RunDir) -> int:
    """Run one attempt; returns the exit code of the job script.

    Raises:
        RunError: this process is not a job, or another job runs that run.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKE | DEAF_TO)
    job, site = load_resolved(run.config), load_site(str(run.site))
    job_id = _job_id(run, site)
    return Supervisor(run, job, site, job_id, scheduler_named(site.scheduler, run)).attempt()


def _job_id(run: RunDir, site: SiteConfig) -> str:
    """Of this job. A task of an array is named by array and task: the number of its last task is that of them all."""
    environ = os.environ
    if site.scheduler == "slurm" and environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    name = "HPCDS_LOCAL_JOB" if site.scheduler == "local" else "SLURM_JOB_ID"
    job_id = environ.get(name)
    if not job_id:
        raise RunError(f"run {str(run.root)!r}: {name} is not set; supervise runs inside the job, start it with submit")
    return job_id


@dataclass(frozen=True)
class _Step:
    """What is started in an attempt: its ranks, or the preflight before them."""

    runner: Runner
    watch: Watch
    progress: Progress
    preflight: Preflight | None = None


class Supervisor:
    """One attempt, from open ledger to closed ledger and requeue."""

    def __init__(self, run: RunDir, job: JobConfig, site: SiteConfig, job_id: str, scheduler: Scheduler) -> None:
        self._run = run
        self._job = job
        self._site = site
        self._job_id = job_id
        self._scheduler = scheduler
        self._talk = Talk(scheduler, job_id)

    def attempt(self) -> int:
        """Open the ledger, run the ranks, close the ledger, act."""
        earlier = read_ledger(self._run)
        if earlier and earlier[-1].cause == "finished":
            say(f"the run finished in attempt {earlier[-1].number}; there is nothing left to do")
            return 0
        self._refuse_a_second_job(earlier)
        self._note_job(self._job_id)
        at_start = self._talk.show(_ANSWER_AT_START_S)
        restarts = at_start.restarts if at_start is not None else int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        end_time = at_start.end_time if at_start is not None else _end_in_environment()
        attempt = self._open(at_start)
        say(f"attempt {attempt.number} of {self._job.name}, job {self._job_id}, on {attempt.nodes or 'this machine'}")

        def close(step: _Step, exit_code: int, patience_s: float) -> tuple[Attempt, Ended]:
            ended = self._ended(exit_code, step, restarts, patience_s)
            return self._close(attempt, ended, step), ended

        for step in self._steps(attempt, earlier):
            step.watch.begin(end_time, restarts, attempt.node_names if self._on_nodes else [], earlier)
            exit_code = self._run_ranks(step, lambda step=step: close(step, 128 + signal.SIGKILL, 0.0))  # type: ignore[misc]
            if step.preflight is not None:
                exit_code = self._judge(step, attempt, exit_code)
            if exit_code != 0:
                break
        # Without the scheduler's word neither the cause is known nor a requeue to be had: it is waited for.
        closed, ended = close(step, exit_code, _ANSWER_AT_END_S)
        notice = Notice(self._run, self._job, closed)
        self._act(closed, ended)
        notice.finish()
        return 0 if closed.cause == "finished" else exit_code

    def _refuse_a_second_job(self, earlier: list[Attempt]) -> None:
        """Two jobs in one run folder would train it twice and overwrite each other's steps."""
        last = earlier[-1] if earlier else None
        if last is None or last.cause is not None or last.job_id in {"", self._job_id}:
            return
        other = Talk(self._scheduler, last.job_id).show()
        if other is not None and other.state in {"RUNNING", "COMPLETING", "SUSPENDED"}:
            raise RunError(
                f"run {str(self._run.root)!r}: job {last.job_id} runs it already; cancel that job first, or this one"
            )

    @property
    def _on_nodes(self) -> bool:
        """Whether the scheduler has nodes of its own: site local is this machine."""
        return self._site.scheduler == "slurm"

    def _steps(self, attempt: Attempt, earlier: list[Attempt]) -> Iterator[_Step]:
        """What is started one after the other, as long as all goes well."""
        number = attempt.number
        if preflight.is_due(self._job, earlier, attempt.node_names):
            look = Preflight(self._run, self._job, self._site, number)
            progress = Progress(look.files, preflight.ATTEMPT)
            watch = Watch(look.files, self._job, preflight.ATTEMPT, self._talk, progress)
            yield _Step(self._runner(look.job, look.files, preflight.ATTEMPT), watch, progress, look)
        progress = Progress(self._run, number)
        watch = Watch(self._run, self._job, number, self._talk, progress)
        yield _Step(self._runner(self._job, self._run, number), watch, progress)

    def _judge(self, step: _Step, attempt: Attempt, exit_code: int) -> int:
        """Whether the ranks may start now: 0, or how the attempt ends without them."""
        look, watch = step.preflight, step.watch
        if look is None:
            return exit_code
        look.judge(step.runner, watch, attempt.node_names if self._on_nodes else [], components_of(os.environ))
        note_preflight(self._run, attempt.number, look.seconds)
        told = watch.told is not None and (watch.told.preempting or watch.told.state != "RUNNING")
        if exit_code == CHECKPOINTED or told or watch.terminated:
            return CHECKPOINTED  # something wants the job to end: the ranks would be told too late
        return 1 if look.failed or step.runner.lost_node or watch.hang is not None else 0

    def _open(self, at_start: JobState | None) -> Attempt:
        nodes = at_start.nodes if at_start is not None else os.environ.get("SLURM_JOB_NODELIST", "")
        groups = [f"SLURM_JOB_NODELIST_HET_GROUP_{group}" for group in range(components_of(os.environ))]
        if len(groups) > 1:  # the scheduler tells of the first component
            nodes = ",".join(os.environ[group] for group in groups if group in os.environ)
        return open_attempt(self._run, self._job_id, node_name(), nodes, down=self._talk.down)

    def _note_job(self, job_id: str) -> None:
        try:
            note_job(self._run, self._site, job_id)
        except OSError as error:
            say(f"{str(self._run.job)!r} is not written, it should name job {job_id}: {error.strerror}")

    def _ended(self, exit_code: int, step: _Step, restarts: int, patience_s: float) -> Ended:
        runner, watch = step.runner, step.watch
        near_limit = watch.near_limit  # before asking: that may take long
        told = watch.told if watch.told is not None and watch.told.state != "RUNNING" else None
        if told is None and exit_code != 0:
            told = self._talk.show(patience_s)
        elif told is None and not self._joined():
            told = self._talk.show(min(patience_s, _ANSWER_AT_START_S))
        due_to = runner.due_to or ("NODE FAILURE" if runner.lost_node else None)
        return Ended(
            exit_code, told or watch.told, restarts, watch.terminated, due_to,
            near_limit=near_limit, hung=watch.hang is not None, overdue=watch.overdue,
            joined=self._joined(), warning=signal.Signals[f"SIG{self._job.restart.signal}"],
            unfit=step.preflight is not None and exit_code != CHECKPOINTED and not runner.lost_node,
        )  # fmt: skip

    def _joined(self) -> bool:
        """Whether the run's program tells of its steps, in this attempt or one before."""
        return self._run.events.exists()

    def _close(self, attempt: Attempt, ended: Ended, step: _Step) -> Attempt:
        run, runner, watch, look, cause = self._run, step.runner, step.watch, step.preflight, cause_of(ended)
        achieved = outcome(run, attempt.opened, step.progress)
        action, why = self._decide(cause, ended, achieved, look)
        failure = look.failure if look is not None and cause == "preflight" else None
        if cause == "crashed":
            logs = run.attempt_logs(attempt.number)
            failure = runner.failure or first_failure(runner.ends, run.failures(attempt.number), logs)
        detail = f"{why} ({failure.in_a_sentence()})" if failure is not None else why
        if watch.hang is not None and cause == "hang":
            detail = f"{why} ({watch.hang.detail}; stacks are in {run.stacks(attempt.number)})"
        elif watch.overdue:
            detail = f"{why} (the ranks did not come to the end of a step; stacks are in {run.stacks(attempt.number)})"
        fields: dict[str, Any] = {
            "cause": cause,
            "action": action,
            "exit_code": ended.exit_code,
            "detail": detail,
            "failure": None if failure is None else asdict(failure),
            "node": "" if self._site.scheduler == "local" else _blamed(cause, failure, step),
            **achieved,
        }
        close_attempt(run, attempt.number, **fields)
        say(f"attempt {attempt.number} ended: {cause}, exit code {ended.exit_code}; {detail}")
        return replace(attempt, **fields)

    def _decide(self, cause: str, ended: Ended, achieved: dict[str, Any], look: Preflight | None) -> tuple[str, str]:
        """What follows, and why in words."""
        if ended.requeued and cause != "finished":
            return "leave", f"{cause}: the scheduler starts it again"
        before, limits = read_ledger(self._run)[:-1], self._job.restart
        if cause == "preflight" and look is not None:
            elsewhere = self._on_nodes and not self._pinned
            action, why = after_preflight(look.unfit, look.words, before, limits, elsewhere=elsewhere)
        else:
            last, saved = achieved["last_step"], achieved["saved_step"]
            action, why = action_after(cause, last, before, limits, joined=ended.joined, saved_step=saved)
        gone = ended.job is not None and not ended.job.active
        if gone and action in {"requeue", "hold"} and self._site.scheduler == "local":
            return "leave", f"{cause}: the scheduler has given the job up; `hpcds resume` continues the run"
        return action, why

    def _runner(self, job: JobConfig, files: RunDir, number: int) -> Runner:
        """Of the program of a job, with its logs and its meeting point in a run folder of its own or that of the run."""
        logs = files.attempt_logs(number)
        # What the submitting shell exported about another launch must not name these ranks.
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED or name in job.env}
        environ = {
            **inherited,
            "HPCDS_RUN_DIR": str(files.root),
            "HPCDS_ATTEMPT": str(number),
            "HPCDS_DEADLINE": str(files.deadline),
        }
        if job.compat is None and not job.runtime.in_container:
            environ |= variables_of_the_startup(environ)
        prepare_container(job, self._run)
        if self._site.scheduler == "local":
            argv = rank_command(job, self._site, self._run)
            return LocalRunner(argv, environ, job.resources.world_size, logs, self._run.local / "step.json")
        command = step_command(job, self._site, self._run, components_of(os.environ))
        return SrunRunner(command, environ, logs)

    def _run_ranks(self, step: _Step, close_early: Callable[[], object]) -> int:
        runner, look = step.runner, step.preflight
        try:
            if look is not None:
                look.prepare()
            os.chdir(self._job.workdir or ".")  # ranks start there; this process started where no module is shadowed
            runner.start()
        except OSError as error:
            words = f"{error.strerror}: {error.filename}"
            runner.failure = Failure(None, node_name(), 127, f"cannot be started: {words}", [])
            return 127
        try:
            return step.watch.until_ended(runner, close_early, None if look is None else look.limit_s)
        except Exception as error:  # noqa: BLE001 - whatever it was, the run must be closed and queued again
            say(traceback.format_exc())
            runner.failure = Failure(
                None, node_name(), 1, f"the supervisor failed: {type(error).__name__}: {error}", []
            )
            runner.terminate()
            deadline = time.monotonic() + _ENDED_WITHIN_S
            while runner.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            return 1

    def _act(self, attempt: Attempt, ended: Ended) -> None:
        """Let the run start again, or be held, and say so when that was seen."""
        excluded = excluded_nodes(read_ledger(self._run), self._job.restart.max_excluded_nodes)
        exclude = [*self._job.resources.exclude, *excluded] if excluded and not self._pinned else []
        if attempt.action in {"requeue", "hold"}:
            try:
                seen = self._queue_again(attempt, ended)
            except RefusedError as error:
                self._without_requeue(attempt, exclude, error)
                return
            say(f"{attempt.action}: {'the scheduler took it' if seen else 'asked for, not yet seen'}")
            if exclude and self._talk.exclude(exclude):
                twice = "" if attempt.cause == "preflight" else ", which failed twice or more"
                say(f"the next attempt avoids {', '.join(excluded)}{twice}")
            if not seen:
                _hold_still()
        elif exclude and ended.requeued:
            self._talk.exclude(exclude)

    @property
    def _pinned(self) -> bool:
        """Whether the job may run on certain nodes only: it would wait for ever for what it may not have."""
        return bool(self._job.resources.sbatch.get("nodelist"))

    def _queue_again(self, attempt: Attempt, ended: Ended) -> bool:
        if attempt.action == "requeue" and ended.job is not None and not ended.job.may_requeue:
            raise RefusedError(f"job {self._job_id}: was submitted with --no-requeue")
        return self._talk.queue_again(str(attempt.action), ended.restarts_before)

    def _without_requeue(self, attempt: Attempt, exclude: list[str], why: RefusedError) -> None:
        """The job cannot be queued again: a job of its own goes on with the run when this one has ended."""
        say(f"{attempt.action} is refused: {why}")
        if attempt.action == "hold":
            return  # the job ends, which is as good: the ledger says why, and `hpcds resume` goes on
        try:
            job_id = self._talk.submit_successor(self._run, exclude)
        except RefusedError as error:
            say(f"no successor either: {error}; `hpcds resume {self._run.root}` continues the run")
            close_attempt(self._run, attempt.number, action="leave", detail=f"{attempt.detail}; but: {why}")
            return
        self._note_job(job_id)
        for problem in redirect(self._run, self._job_id, job_id, self._scheduler):
            say(problem)
        close_attempt(self._run, attempt.number, action="successor", detail=f"{attempt.detail}; as job {job_id}")
        say(f"successor: job {job_id} goes on when this one has ended")


def _end_in_environment() -> float | None:
    """When Slurm 23.02 and later say that the job ends, where no scontrol can be asked."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def _blamed(cause: str, failure: Failure | None, step: _Step) -> str:
    """The node that an end is blamed on: that was lost, whose rank was silent or killed, or that the preflight named."""
    if cause == "node_failure":
        return step.runner.lost_node
    if cause == "preflight" and step.preflight is not None:
        return fold(step.preflight.unfit)
    if cause == "hang" and step.watch.hang is not None:
        return step.watch.hang.host
    return failure.host if failure is not None and failure.exit_code > 128 else ""


def _hold_still() -> None:
    """Wait to be ended: leaving before the scheduler has taken a requeue would end the job instead."""
    deadline = time.monotonic() + _HELD_STILL_FOR_S
    while signal.sigtimedwait(WAKE, 0.0) is not None:
        pass  # what came before is no answer to what was asked
    while time.monotonic() < deadline:
        woken = signal.sigtimedwait(WAKE, 1.0)
        if woken is not None and woken.si_signo == signal.SIGTERM:
            return
