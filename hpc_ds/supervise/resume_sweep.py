"""Continue the runs of a sweep that stopped: those that are held are released, the others queued as one array."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.cluster.queue import Queue
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.config.load import load_site
from hpc_ds.errors import RunError, SchedulerError
from hpc_ds.script.sweep import queue_sweep
from hpc_ds.supervise.ledger import read_ledger
from hpc_ds.supervise.resume import resume

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir
    from hpc_ds.sweep_dir import SweepDir


def resume_sweep(sweep: SweepDir) -> list[tuple[RunDir, str]]:
    """Queue the stopped runs of a sweep again; those that finished or go on are left alone.

    Returns:
        Each run that was queued or released, and its job id.

    Raises:
        RunError: none has stopped.
        SchedulerError: the scheduler does not answer, or refused.
    """
    runs = [run for run in sweep.runs() if not _finished(run)]
    stopped, done = [], []
    for run, answer in zip(runs, Queue().answers(runs), strict=True):
        if isinstance(answer, SchedulerError):
            raise SchedulerError(str(answer))
        if isinstance(answer, JobState) and answer.active:
            if answer.held:
                done.append((run, resume(run)))
        else:
            stopped.append(run)
    if stopped:
        site = load_site(str(stopped[0].site))
        job_id = queue_sweep(sweep, site, [int(run.root.name) for run in stopped])
        done += [(run, f"{job_id}_{run.root.name}") for run in stopped]
    if not done:
        raise RunError(f"sweep {str(sweep.root)!r}: every run finished or goes on; there is nothing to resume")
    return done


def _finished(run: RunDir) -> bool:
    attempts = read_ledger(run)
    return bool(attempts) and attempts[-1].cause == "finished"
