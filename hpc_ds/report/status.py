"""What a run is doing, put together from its folder and its scheduler."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.errors import SchedulerError
from hpc_ds.run_dir import read_lines, read_object
from hpc_ds.supervise.ledger import read_ledger, saved_step

if TYPE_CHECKING:
    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt

OVER = frozenset({"finished", "held", "cancelled", "failed"})
"""States in which a run does nothing more by itself."""


@dataclass(frozen=True, slots=True)
class Status:
    """A run at one moment.

    Attributes:
        state: waiting, running, ending, finished, held, cancelled, failed, or unknown (the scheduler does not answer).
        reason: one sentence for a person.
        step, loss: of the last optimizer step; None before the first.
        steps_lost: steps that had to be taken again, over all attempts.
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
    attempts: list[Attempt] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def status_of(run: RunDir) -> Status:
    """Look at a run."""
    job_file, attempts = read_object(run.job), read_ledger(run)
    site, job_id = read_object(run.site), str(job_file.get("job_id", ""))
    state, reason = _state(run, str(site.get("scheduler", "")), job_id, attempts)
    events = read_lines(run.events)
    steps = [event for event in events if event.get("event") == "step"]
    return Status(
        run_dir=str(run.root),
        name=str(read_object(run.config).get("name", "")),
        site=str(site.get("name", "")),
        job_id=job_id,
        state=state,
        reason=reason,
        step=steps[-1]["step"] if steps else None,
        loss=_finite(steps[-1]["loss"]) if steps else None,
        saved_step=saved_step(run),
        steps_lost=steps_lost(events),
        attempts=attempts,
    )


def _finite(loss: float | None) -> float | None:
    """A loss that JSON can hold; a script may have kept it to itself."""
    return loss if loss is not None and math.isfinite(loss) else None


def steps_lost(events: list[dict[str, Any]]) -> int:
    """Steps taken more than once: how far behind its predecessor each attempt began."""
    lost = reached = 0
    attempt = None
    for event in events:
        if event.get("event") == "step":
            if event.get("attempt") != attempt and attempt is not None:
                lost += max(reached - event["step"] + 1, 0)
            attempt, reached = event.get("attempt"), event["step"]
    return lost


def _state(run: RunDir, scheduler: str, job_id: str, attempts: list[Attempt]) -> tuple[str, str]:
    last = attempts[-1] if attempts else None
    if last is not None and last.cause == "finished":
        return "finished", f"finished in attempt {last.number}"
    try:
        job = scheduler_named(scheduler, run).show(job_id) if job_id else None
    except SchedulerError as error:
        return "unknown", str(error)
    if job is not None and job.active:
        return _active(job, last)
    if last is None:
        return "failed", "the job ended before its first attempt began; look into logs/scheduler.log"
    if last.cause == "cancelled" or (job is not None and job.state == "CANCELLED"):
        return "cancelled", "cancelled; `hpcds resume` continues it"
    if last.action == "hold":
        return "held", last.detail
    return (
        "failed",
        last.detail or "its supervisor was killed, and nothing started it again; `hpcds resume` continues it",
    )


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
