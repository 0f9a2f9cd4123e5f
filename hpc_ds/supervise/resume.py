"""Continue a run that stopped: by a person's word, where the policy said no."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.config.load import load_site
from hpc_ds.errors import RunError
from hpc_ds.run_dir import read_object
from hpc_ds.script.submit import queue
from hpc_ds.supervise.ledger import read_ledger

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir


def resume(run: RunDir) -> str:
    """Queue a stopped run again in its own folder, or release it where it is held; returns the job id.

    Raises:
        RunError: it is still going, or has finished.
    """
    attempts = read_ledger(run)
    if attempts and attempts[-1].cause == "finished":
        raise RunError(f"run {str(run.root)!r}: finished in attempt {attempts[-1].number}; there is nothing to resume")
    site = load_site(str(run.site))
    scheduler, job_id = scheduler_named(site.scheduler, run), str(read_object(run.job).get("job_id", ""))
    job = scheduler.show(job_id) if job_id else None
    if job is not None and job.state == "COMPLETING":
        raise RunError(f"run {str(run.root)!r}: job {job_id} is ending; try again in a moment")
    if job is not None and job.active and not job.held:
        raise RunError(f"run {str(run.root)!r}: job {job_id} is {job.state.lower()}; it goes on by itself")
    if job is not None and job.held and site.scheduler == "slurm":
        scheduler.release(job_id)
        return job_id
    return queue(run, site)
