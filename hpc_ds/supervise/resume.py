"""Continue a run that stopped: by a person's word, where the policy said no; and with other resources, where they say so."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.config.load import build_job, load_resolved, load_site, read_json
from hpc_ds.config.paths import check_paths
from hpc_ds.config.site_rules import check_job
from hpc_ds.errors import RunError, SchedulerError, SubmitError
from hpc_ds.run_dir import read_object
from hpc_ds.script.submit import ask_scheduler, changed_files, queue, reconfigure
from hpc_ds.script.waiting import dependency, read_waits
from hpc_ds.supervise.ledger import read_ledger
from hpc_ds.supervise.policy import excluded_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.cluster.scheduler import JobState, Scheduler
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir

_ENDS_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.5
_FIXED = ("site", "name")


def resume(run: RunDir, overrides: Sequence[str] = ()) -> str:
    """Queue a stopped run again in its own folder, or release it where it is held; returns the job id.

    With ``key=value`` overrides its job is another one from then on: checked as at submit, its script made anew, the
    old config kept as ``config-before-attempt-N.json``. A job that waits in the queue, or is held there, is cancelled
    for it and submitted anew.

    Raises:
        RunError: it is still going, or has finished.
        ConfigError: the overrides make no job that could run; nothing is changed.
        SubmitError: the scheduler refused the job; the run's config is what it was.
    """
    attempts = read_ledger(run)
    if attempts and attempts[-1].cause == "finished":
        raise RunError(f"run {str(run.root)!r}: finished in attempt {attempts[-1].number}; there is nothing to resume")
    site = load_site(str(run.site))
    scheduler, job_id = scheduler_named(site.scheduler, run), str(read_object(run.job).get("job_id", ""))
    job = _settled(scheduler, job_id) if job_id else None
    queued = job is not None and job.active and (job.held or (bool(overrides) and job.state == "PENDING"))
    if job is not None and job.active and not queued:
        change = "; `hpcds cancel` it first to change it" if overrides else "; it goes on by itself"
        raise RunError(f"run {str(run.root)!r}: job {job_id} is {job.state.lower()}{change}")
    if overrides:
        return _resume_changed(run, site, overrides, (scheduler, job_id, job))
    if job is not None and job.held and site.scheduler == "slurm":
        scheduler.release(job_id)
        return job_id
    return _queue(run, site)


def _settled(scheduler: Scheduler, job_id: str) -> JobState | None:
    """What the scheduler says of a job; of one that is just ending, what it says when that is done."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while (job := scheduler.show(job_id)) is not None and job.state == "COMPLETING":
        _wait_until(deadline, job_id)
    return job


def _wait_until(deadline: float, job_id: str) -> None:
    if time.monotonic() > deadline:
        raise RunError(f"job {job_id}: still ending after {_ENDS_WITHIN_S:g} s; resume the run in a moment")
    time.sleep(_LOOK_EVERY_S)


def _queue(run: RunDir, site: SiteConfig, after: str | None = None) -> str:
    """Queue the run; the new job keeps off the nodes that failed its earlier ones, where enough others are left."""
    job = load_resolved(run.config)
    job_id = queue(run, site, after)
    excluded = excluded_nodes(read_ledger(run), job.restart.max_excluded_nodes)
    if excluded and site.scheduler == "slurm":
        with contextlib.suppress(SchedulerError):
            scheduler_named(site.scheduler, run).exclude(job_id, [*job.resources.exclude, *excluded])
    return job_id


def _resume_changed(
    run: RunDir, site: SiteConfig, overrides: Sequence[str], old: tuple[Scheduler, str, JobState | None]
) -> str:
    for override in overrides:
        key = override.partition("=")[0]
        if key in _FIXED:
            raise RunError(f"--set {override!r}: a run keeps its {key}; submit a new run instead", value=override)
    data = read_json(run.config, "run config")
    job = build_job(data, overrides, file=str(run.config), base=run.root)
    check_paths(job)
    check_job(job, site)
    texts = changed_files(run, job, site)
    scheduler, job_id, state = old
    if state is not None and state.active and site.scheduler == "slurm":
        _end_waiting(scheduler, job_id)
    undo = reconfigure(run, texts, len(read_ledger(run)) + 1)
    try:
        ask_scheduler(run.script, job, site)
        waits = state is not None and state.reason == "Dependency"  # for other runs, and goes on waiting
        return _queue(run, site, dependency(read_waits(run)) if waits else None)
    except SubmitError:
        undo()
        raise


def _end_waiting(scheduler: Scheduler, job_id: str) -> None:
    """Cancel a job that waits; it may have begun just now, and two jobs must not have one run folder."""
    scheduler.cancel(job_id)
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while (job := scheduler.show(job_id)) is not None and job.active:
        _wait_until(deadline, job_id)
