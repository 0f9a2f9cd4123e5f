"""What a run is doing, put together from its folder and its scheduler.

Of the events only the end is read (hpc_ds/tail.py), so a run of a million steps is as fast to look at as one of ten;
what they told before stands in the ledger.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.layout import newest_step
from hpc_ds.cluster.queue import Queue
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.errors import SchedulerError
from hpc_ds.report.beats import Pulse, quiet_ranks
from hpc_ds.report.history import lost_after
from hpc_ds.report.progress import progress, samples_per_step, steps_in_all
from hpc_ds.run_dir import read_object
from hpc_ds.supervise.ledger import read_ledger, saved_step
from hpc_ds.supervise.policy import excluded_nodes
from hpc_ds.tail import end_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hpc_ds.cluster.queue import Answer
    from hpc_ds.report.progress import Progress
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt

OVER = frozenset({"finished", "held", "cancelled", "failed"})
"""States in which a run does nothing more by itself."""

_TRACEBACK_LINES = 12
_DEFAULT_EXCLUDED = 3  # restart.max_excluded_nodes


@dataclass(frozen=True, slots=True)
class Status:
    """A run at one moment. docs/runs.md describes every field for those who read it as JSON.

    Attributes:
        state: waiting, running, ending, finished, held, cancelled, failed, or unknown (the scheduler does not answer).
        reason: one sentence for a person.
        step, loss: of the last optimizer step; None before the first.
        steps_lost: steps that had to be taken again, over all attempts.
        queue_state, queue_reason: the scheduler's words; None where it has none.
        expected_start: when a waiting run is expected to start, ends_at: when a running job reaches its limit; seconds
            since the epoch, None where nobody knows.
        steps: how many the run takes in all; None where neither the job's ``steps`` nor its schedule says.
        steps_per_s, samples_per_s: over the last 50 steps of the last attempt; None before it took two.
        eta_s: seconds until the last step of a running run at that rate; None where not known, or a rank is quiet.
        failure: the rank that failed first, of a run that is held or failed.
        quiet_ranks: ranks that are silent or still for long.
    """

    run_dir: str
    name: str
    site: str
    job_id: str
    state: str
    reason: str
    step: int | None
    loss: float | None
    saved_step: int | None
    steps_lost: int
    queue_state: str | None = None
    queue_reason: str | None = None
    expected_start: float | None = None
    ends_at: float | None = None
    nodes: str = ""
    excluded_nodes: list[str] = field(default_factory=list)
    step_at: float | None = None
    steps: int | None = None
    steps_per_s: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    submitted: float | None = None
    failure: dict[str, Any] | None = None
    quiet_ranks: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the run does nothing more by itself."""
        return self.state in OVER

    def as_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def status_of(run: RunDir, queue: Queue | None = None) -> Status:
    """Look at a run."""
    return statuses_of([run], queue or Queue())[0]


def statuses_of(
    runs: Sequence[RunDir], queue: Queue, pulses: dict[tuple[Path, int], Pulse] | None = None
) -> list[Status]:
    """Look at several runs; their schedulers are asked together, and only of runs whose ledger does not say all.

    Args:
        runs: which ones.
        queue: asked for their jobs; the same one each time, of whoever looks again.
        pulses: run and attempt -> what was seen of its beats before, of whoever looks again.
    """
    ledgers = [read_ledger(run) for run in runs]
    open_ones = [place for place, ledger in enumerate(ledgers) if not (ledger and ledger[-1].cause == "finished")]
    answers: dict[int, Answer] = dict(zip(open_ones, queue.answers([runs[place] for place in open_ones]), strict=True))
    _ask_the_accounts(runs, ledgers, answers, queue)
    return [
        _status(run, ledger, answers.get(place), pulses)
        for place, (run, ledger) in enumerate(zip(runs, ledgers, strict=True))
    ]


def _ask_the_accounts(
    runs: Sequence[RunDir], ledgers: Sequence[list[Attempt]], answers: dict[int, Answer], queue: Queue
) -> None:
    """Where the queue has forgotten a job whose supervisor could not say how it ended, accounting may know."""
    forgotten = {}
    for place, answer in answers.items():
        unexplained = not ledgers[place] or ledgers[place][-1].cause is None
        job_id = str(read_object(runs[place].job).get("job_id", ""))
        local = read_object(runs[place].site).get("scheduler") == "local"
        if answer is None and unexplained and job_id and not local:
            forgotten[place] = job_id
    words = queue.last_words(list(forgotten.values())) if forgotten else {}
    answers.update({place: words[job_id] for place, job_id in forgotten.items() if job_id in words})


def _status(
    run: RunDir, attempts: list[Attempt], answer: Answer, pulses: dict[tuple[Path, int], Pulse] | None
) -> Status:
    config, job_file, site = read_object(run.config), read_object(run.job), read_object(run.site)
    job = answer if isinstance(answer, JobState) else None
    state, reason = _state(answer, attempts)
    events = end_of(run.events)
    done, steps = progress(events), steps_in_all(config)
    running = state == "running" and bool(attempts) and attempts[-1].cause is None
    batch = samples_per_step(config)
    ours = not attempts or done.attempt == attempts[-1].number
    rate = done.steps_per_s if ours else None
    quiet = _quiet(run, attempts[-1], rate, pulses) if running else []
    return Status(
        run_dir=str(run.root),
        name=str(config.get("name", "")),
        site=str(site.get("name", "")),
        job_id=str(job_file.get("job_id", "")),
        state=state,
        reason=reason,
        step=done.step,
        loss=done.loss,
        saved_step=_saved_step(run, config),
        steps_lost=sum(lost_after(attempts)),
        queue_state=None if job is None else job.state,
        queue_reason=None if job is None or job.reason == "None" else job.reason,
        expected_start=job.start_time if job is not None and state == "waiting" else None,
        ends_at=job.end_time if job is not None and state == "running" else None,
        nodes=_nodes(job, attempts, state),
        excluded_nodes=_excluded(config, attempts),
        step_at=done.step_at,
        steps=steps,
        steps_per_s=rate,
        samples_per_s=None if rate is None or batch is None else rate * batch,
        eta_s=_eta_s(done, steps, rate) if running and not quiet else None,
        submitted=read_object(run.provenance).get("submitted", job_file.get("submitted")),
        failure=_failure(attempts[-1]) if attempts and state in {"held", "failed"} else None,
        quiet_ranks=quiet,
        attempts=attempts,
    )


def _eta_s(done: Progress, steps: int | None, rate: float | None) -> float | None:
    return None if steps is None or done.step is None or rate is None else max(steps - done.step, 0) / rate


def _nodes(job: JobState | None, attempts: Sequence[Attempt], state: str) -> str:
    if job is not None and job.nodes and job.active:
        return job.nodes
    return attempts[-1].nodes if attempts and state in {"running", "ending"} else ""


def _excluded(config: Mapping[str, Any], attempts: Sequence[Attempt]) -> list[str]:
    """Nodes that the job does not want, and those that were found out."""
    asked = (config.get("resources") or {}).get("exclude") or []
    limit = (config.get("restart") or {}).get("max_excluded_nodes", _DEFAULT_EXCLUDED)
    return list(dict.fromkeys([*asked, *excluded_nodes(attempts, limit)]))


def _quiet(
    run: RunDir, attempt: Attempt, rate: float | None, pulses: dict[tuple[Path, int], Pulse] | None
) -> list[dict[str, Any]]:
    pulse = None if pulses is None else pulses.setdefault((run.root, attempt.number), Pulse())
    return quiet_ranks(run, attempt.number, 1 / rate if rate else None, pulse)


def _saved_step(run: RunDir, config: Mapping[str, Any]) -> int | None:
    """As the ledger has it, but manifests are read again only where something was renamed in or out since."""
    folder = Path((config.get("checkpoint") or {}).get("dir") or run.checkpoints)
    try:
        committed = _newest_step(folder, folder.stat().st_mtime_ns)
    except OSError:
        committed = None
    return committed if committed is not None else saved_step(run)


@lru_cache(maxsize=1024)
def _newest_step(folder: Path, _changed_ns: int) -> int | None:
    return newest_step(folder)


def _failure(attempt: Attempt) -> dict[str, Any] | None:
    """The rank that failed first, and the end of what it said."""
    if attempt.failure is None:
        return None
    said = attempt.failure.get("traceback") or attempt.failure.get("last_lines") or []
    lines = [line for text in said for line in text.rstrip("\n").split("\n")]
    return {**attempt.failure, "attempt": attempt.number, "traceback": lines[-_TRACEBACK_LINES:]}


def _state(answer: Answer, attempts: list[Attempt]) -> tuple[str, str]:
    last = attempts[-1] if attempts else None
    if last is not None and last.cause == "finished":
        return "finished", f"finished in attempt {last.number}"
    if isinstance(answer, SchedulerError):
        return "unknown", str(answer)
    job = answer
    if job is not None and job.active:
        return _active(job, last)
    if last is None:
        return "failed", "the job ended before its first attempt began; look into logs/scheduler.log"
    if last.cause == "cancelled" or (job is not None and job.state == "CANCELLED"):
        return "cancelled", "cancelled; `hpcds resume` continues it"
    if last.action == "hold":
        return "held", last.detail
    ended = f" ({job.state})" if job is not None and job.state not in {"COMPLETED", "FAILED"} else ""
    killed = f"its supervisor was killed{ended}, and nothing started it again; `hpcds resume` continues it"
    return "failed", last.detail or killed


def _active(job: JobState, last: Attempt | None) -> tuple[str, str]:
    if job.held:
        return "held", last.detail if last is not None and last.detail else "held; `hpcds resume` releases it"
    if job.state in {"PENDING", "CONFIGURING", "REQUEUED"}:
        return "waiting", f"in the queue ({job.reason})" if job.reason != "None" else "in the queue"
    if job.state == "COMPLETING":
        return "ending", last.detail if last is not None and last.detail else "being ended by the scheduler"
    if last is None or last.cause is not None:
        return "running", "an attempt begins"
    return "running", f"attempt {last.number} on {job.nodes}"
