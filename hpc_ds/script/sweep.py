"""A sweep: many runs of one shape as one job array, by one sbatch; on site local one after the other, or N at a time.

The script is rendered once, for a task whose number is a mark; the mark becomes ``$SLURM_ARRAY_TASK_ID`` in the array's
script, and a number in the script of each run, with which that run can be queued alone (``resume``, successors).
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hpc_ds.cluster.local import start_array
from hpc_ds.cluster.precheck import ask
from hpc_ds.cluster.slurm import Slurm
from hpc_ds.config.load import resolved
from hpc_ds.config.paths import check_paths
from hpc_ds.errors import RunError, SchedulerError, SubmitError
from hpc_ds.launch.node_list import ranges
from hpc_ds.run_dir import RunDir, as_text, new_folder, remember, write_atomic, write_json
from hpc_ds.script.job_file import note_job
from hpc_ds.script.plan import plan_of
from hpc_ds.script.provenance import take_snapshot, write_provenance
from hpc_ds.script.render import render
from hpc_ds.script.submit import unverified, variables_of
from hpc_ds.script.waiting import dependency, write_waits
from hpc_ds.sweep_dir import SweepDir

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.config.sweep import Point
    from hpc_ds.script.plan import Plan
    from hpc_ds.script.waiting import Wait

# The blank makes the shell's quoting put every word with the mark into single quotes, in which it is replaced.
_MARK = "task number"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep is to be.

    Attributes:
        base: the job without the points.
        points: what is different in each.
        jobs: the job of each point.
        throttle: how many run at a time; None: as many as the scheduler lets.
    """

    base: JobConfig
    points: Sequence[Point]
    jobs: Sequence[JobConfig]
    throttle: int | None


@dataclass(frozen=True, slots=True)
class SubmittedSweep:
    """A sweep that is queued: its folder, the array's job id, and what is worth a look."""

    sweep: SweepDir
    job_id: str
    warnings: list[str]


def preview_sweep(wanted: Sweep, site: SiteConfig, runs: Path, *, check: bool = True) -> tuple[str, Plan]:
    """The script of the array (on site local: of its first run) and the plan; nothing is made.

    Raises:
        ConfigError: it does not fit the site, or names files that are not there.
    """
    if check:
        _check(wanted)
    marked = _marked(wanted, site, runs.resolve() / f"{wanted.base.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    text = _of_run(marked, 1) if site.scheduler == "local" else _of_array(marked, wanted)
    return text, plan_of(wanted.base, site, tasks=len(wanted.jobs), check=check)


def submit_sweep(
    wanted: Sweep,
    site: SiteConfig,
    runs: Path,
    *,
    waits: Sequence[Wait] = (),
    sources: Mapping[str, str] | None = None,
    check: bool = True,
) -> SubmittedSweep:
    """Make the folder of a sweep with all its runs, and queue them as one array.

    Raises:
        ConfigError: a job does not fit the site or this shell.
        RunError: no folder can be made in ``runs``.
        SubmitError: the scheduler refused the array. The folder is removed again.
    """
    plan = plan_of(wanted.base, site, tasks=len(wanted.jobs), check=check)
    if check:
        _check(wanted)
    sweep = _prepare(wanted, site, runs, sources or {})
    try:
        if check and site.scheduler == "slurm":
            resources = wanted.base.resources
            answer = ask(sweep.script, resources.nodes, resources.partition)
            plan = plan_of(wanted.base, site, answer, len(wanted.jobs))
        if waits:
            write_waits(RunDir(sweep.root), waits)
        job_id = queue_sweep(sweep, site, range(1, len(wanted.jobs) + 1), dependency(waits))
    except SubmitError:
        shutil.rmtree(sweep.root, ignore_errors=True)
        raise
    except SchedulerError as error:  # the array may be queued, and would need its folder
        raise SchedulerError(f"{error}; its folder {str(sweep.root)!r} is kept") from error
    remember(sweep.root)
    return SubmittedSweep(sweep, job_id, [*plan.warnings, *unverified(plan)])


def queue_sweep(sweep: SweepDir, site: SiteConfig, numbers: Sequence[int], after: str | None = None) -> str:
    """Queue some runs of a sweep as one array, and write down their job ids; returns the array's.

    Raises:
        SubmitError: the scheduler refused it.
    """
    data = sweep.data()
    if site.scheduler == "local":
        job_id = start_array(sweep, numbers, data.get("throttle") or 1, wait=after is not None)
    else:
        throttle = f"%{data['throttle']}" if data.get("throttle") else ""
        array = f"--array={ranges(numbers)}{throttle}"
        job_id = Slurm().submit_script(sweep.script, [array, *([f"--dependency={after}"] if after else [])])
        for number in numbers:
            note_job(sweep.run(number), site, f"{job_id}_{number}", durable=False)
    write_json(sweep.sweep, data | {"job_id": job_id, "submitted": time.time()})
    return job_id


def _check(wanted: Sweep) -> None:
    for job in wanted.jobs:
        check_paths(job)


def _marked(wanted: Sweep, site: SiteConfig, root: Path) -> str:
    return render(wanted.base, site, RunDir(root / _MARK))


def _of_run(marked: str, number: int) -> str:
    return marked.replace(_MARK, str(number))


def _of_array(marked: str, wanted: Sweep) -> str:
    """The script of the array: options have Slurm's own pattern for the task, the rest its variable."""
    throttle = f"%{wanted.throttle}" if wanted.throttle else ""
    first, *lines = marked.split("\n")
    lines = [
        line.replace(_MARK, "%a" if line.startswith("#SBATCH") else "'\"$SLURM_ARRAY_TASK_ID\"'") for line in lines
    ]
    return "\n".join([first, f"#SBATCH --array=1-{len(wanted.jobs)}{throttle}", *lines])


def _prepare(wanted: Sweep, site: SiteConfig, runs: Path, sources: Mapping[str, str]) -> SweepDir:
    variables = [variables_of(job, site) for job in wanted.jobs]
    sweep = SweepDir(new_folder(runs, wanted.base.name))
    try:
        snapshot = None
        if wanted.base.snapshot:
            base, snapshot = take_snapshot(wanted.base, sweep.root / "code")
            moved = {"workdir": base.workdir, "script": base.script}
            wanted = replace(wanted, base=base, jobs=[job.model_copy(update=moved) for job in wanted.jobs])
        write_provenance(sweep.root, wanted.base, sources, snapshot)
        origin = sweep.provenance.read_text(encoding="utf-8")
        marked = _marked(wanted, site, sweep.root)
        if site.scheduler == "slurm":
            write_atomic(sweep.script, _of_array(marked, wanted), mode=0o755)
        site_text = as_text(site.model_dump(mode="json"))
        for number, (job, text) in enumerate(zip(wanted.jobs, variables, strict=True), 1):
            run = sweep.run(number)
            run.root.mkdir()
            run.make_folders()
            write_atomic(run.script, _of_run(marked, number), mode=0o755, durable=False)
            write_atomic(run.env, text, mode=0o600, durable=False)
            write_atomic(run.site, site_text, durable=False)
            write_atomic(run.provenance, origin, durable=False)
            write_json(run.config, resolved(job), durable=False)
        tasks = [{"number": number, "values": point} for number, point in enumerate(wanted.points, 1)]
        data = {"name": wanted.base.name, "site": site.name, "throttle": wanted.throttle, "tasks": tasks}
        write_json(sweep.sweep, data)
    except BaseException as error:
        shutil.rmtree(sweep.root, ignore_errors=True)
        if isinstance(error, (OSError, UnicodeError)):
            words = error.strerror if isinstance(error, OSError) else "its path is not UTF-8 text"
            raise RunError(f"folder {str(sweep.root)!r}: cannot be written: {words}; choose another") from None
        raise
    return sweep
