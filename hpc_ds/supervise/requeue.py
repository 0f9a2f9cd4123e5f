"""End a start of a run now and queue it again: what an administrator's ``scontrol requeue`` does, by a person's word."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.errors import RunError
from hpc_ds.run_dir import read_object

if TYPE_CHECKING:
    from hpc_ds.cluster.scheduler import JobState, Scheduler
    from hpc_ds.run_dir import RunDir

_SEEN_WITHIN_S = 5.0
_LOOK_EVERY_S = 0.5


def requeue(run: RunDir) -> tuple[str, bool]:
    """Queue a running run again; the ranks get the signals of the end of a job, and save if there is time.

    Returns:
        The job id, and whether the scheduler was seen to have done it.

    Raises:
        RunError: it does not run.
    """
    job_id = str(read_object(run.job).get("job_id", ""))
    scheduler = scheduler_named(str(read_object(run.site).get("scheduler")), run)
    job = scheduler.show(job_id) if job_id else None
    what = f"run {str(run.root)!r}: job {job_id or 'none'}"
    if job is None or not job.active:
        ended = "is not active" if job is None else f"is {job.state.lower()}"
        raise RunError(f"{what} {ended}, so there is nothing to queue again; `hpcds resume` continues the run")
    if job.held:
        raise RunError(f"{what} is held; `hpcds resume` releases it")
    if job.state == "COMPLETING":
        raise RunError(f"{what} is ending; look at `hpcds status` in a moment")
    if job.state != "RUNNING":
        raise RunError(f"{what} is {job.state.lower()}: it is in the queue already; wait for it")
    scheduler.requeue(job_id)
    return job_id, _seen(scheduler, job_id, job)


def _seen(scheduler: Scheduler, job_id: str, before: JobState) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while True:
        job = scheduler.show(job_id)
        if job is not None and (job.restarts > before.restarts or job.state in {"PENDING", "COMPLETING"}):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
