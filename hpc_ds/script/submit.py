"""From a checked job to a run folder and a queued job; nothing is left half-made."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.cluster.connect import scheduler_named
from hpc_ds.cluster.precheck import Answer, ask
from hpc_ds.config.load import resolved
from hpc_ds.config.paths import check_paths
from hpc_ds.errors import HpcdsError, RunError, SchedulerError, SubmitError
from hpc_ds.run_dir import RunDir, as_text, read_object, write_atomic, write_json
from hpc_ds.script.job_file import note_job
from hpc_ds.script.plan import Plan, plan_of
from hpc_ds.script.provenance import take_snapshot, write_provenance
from hpc_ds.script.render import environment_file, render
from hpc_ds.script.waiting import Wait, dependency, redirect, write_waits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is queued.

    Attributes:
        run: its folder.
        job_id: the scheduler's.
        warnings: what is worth a look.
    """

    run: RunDir
    job_id: str
    warnings: list[str]


def preview(job: JobConfig, site: SiteConfig, runs: Path, *, check: bool = True) -> tuple[str, Plan]:
    """The script that ``submit`` would hand to the scheduler, and the plan; nothing is made.

    Raises:
        ConfigError: the job does not fit the site, or names files that are not there.
        SubmitError: the scheduler says that it could never start.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    text = render(job, site, RunDir(runs.resolve() / f"{job.name}-{stamp}"))
    if not check:
        return text, plan_of(job, site, check=False)
    check_paths(job)
    plan_of(job, site)  # refuses what the site would: no reason to ask Slurm
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.sbatch"
        script.write_text(text, encoding="utf-8")
        return text, plan_of(job, site, ask_scheduler(script, job, site))


def submit(
    job: JobConfig,
    site: SiteConfig,
    runs: Path,
    *,
    waits: Sequence[Wait] = (),
    sources: Mapping[str, str] | None = None,
    check: bool = True,
) -> Submitted:
    """Make the run folder and queue its job.

    Args:
        job: what is asked for.
        site: where.
        runs: where the run folder is made.
        waits: other runs that must be over first.
        sources: where each value of the job comes from.
        check: first hold it against the site's limits, its files, and what the scheduler says of it.

    Raises:
        ConfigError: the job does not fit the site or this shell.
        RunError: no folder can be made in ``runs``.
        SubmitError: the scheduler refused the job. The folder is removed again.
    """
    plan = plan_of(job, site, check=check)
    if check:
        check_paths(job)
    run = prepare(job, site, runs, sources or {})
    try:
        if check:
            plan = plan_of(job, site, ask_scheduler(run.script, job, site))
        if waits:
            write_waits(run, waits)
        job_id = queue(run, site, dependency(waits))
    except SubmitError:
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    except SchedulerError as error:  # the job may be queued, and would need its folder
        raise SchedulerError(f"{error}; its run folder {str(run.root)!r} is kept") from error
    run.remember()
    return Submitted(run, job_id, [*plan.warnings, *unverified(plan)])


def submit_chain(
    jobs: Sequence[tuple[JobConfig, SiteConfig, Mapping[str, str]]],
    runs: Path,
    *,
    waits: Sequence[Wait] = (),
    check: bool = True,
) -> list[Submitted]:
    """Queue jobs that start one after the other, each when the one before has finished. All are checked first.

    Raises:
        ConfigError, RunError, SubmitError: see ``submit``. What was queued by then is cancelled again.
    """
    if check:
        for job, site, _ in jobs:
            preview(job, site, runs)
    done: list[Submitted] = []
    for job, site, sources in jobs:
        before = [Wait(done[-1].run.root, done[-1].job_id, "ok")] if done else waits
        try:
            done.append(submit(job, site, runs, waits=before, sources=sources, check=False))
        except HpcdsError:
            for one in reversed(done):
                scheduler_named(site.scheduler, one.run).cancel(one.job_id)
            raise
    return done


def variables_of(job: JobConfig, site: SiteConfig) -> str:
    """The text of ``env.sh`` as this shell has it.

    Raises:
        ConfigError: a variable that the job asks for is not set in it.
    """
    return environment_file(job, site, dict(os.environ))


def ask_scheduler(script: Path, job: JobConfig, site: SiteConfig) -> Answer:
    """What the scheduler says of a script that is not queued yet.

    Raises:
        SubmitError: the job could never start, or would be refused.
    """
    if site.scheduler != "slurm":
        return Answer()
    return ask(script, job.resources.nodes, job.resources.partition)


def unverified(plan: Plan) -> list[str]:
    """A warning that names what of the site nobody has checked."""
    names = ", ".join(plan.unverified)
    return [f"site {plan.site}: not verified: {names}; look whether they are so"] if names else []


def prepare(job: JobConfig, site: SiteConfig, runs: Path, sources: Mapping[str, str]) -> RunDir:
    """Make the run folder of a job, with everything in it but a queued job.

    Raises:
        ConfigError: the job does not fit the site or this shell.
        RunError: no folder can be made in ``runs``.
    """
    variables = variables_of(job, site)
    run = RunDir.create(runs, job.name)
    try:
        snapshot = None
        if job.snapshot:
            job, snapshot = take_snapshot(job, run.code)
        write_atomic(run.script, render(job, site, run), mode=0o755)
        write_atomic(run.env, variables, mode=0o600)
        write_json(run.site, site.model_dump(mode="json"))
        write_provenance(run.root, job, sources, snapshot)
        write_json(run.config, resolved(job))
    except BaseException as error:
        shutil.rmtree(run.root, ignore_errors=True)
        if isinstance(error, (OSError, UnicodeError)):
            words = error.strerror if isinstance(error, OSError) else "its path is not UTF-8 text"
            raise RunError(f"run folder {str(run.root)!r}: cannot be written: {words}; choose another") from None
        raise
    return run


def queue(run: RunDir, site: SiteConfig, after: str | None = None) -> str:
    """Hand the script of a run to its scheduler and write down the job id; also for a run that goes on.

    ``after`` is what it waits for, in Slurm's words.
    """
    scheduler = scheduler_named(site.scheduler, run)
    before = str(read_object(run.job).get("job_id", ""))
    job_id = scheduler.submit(run, after)
    note_job(run, site, job_id)
    redirect(run, before, job_id, scheduler)
    return job_id


def changed_files(run: RunDir, job: JobConfig, site: SiteConfig) -> dict[Path, str]:
    """The texts of the files of a run that another job for it would have; nothing is written.

    The environment is taken from this shell only where the job asks for another one than before.

    Raises:
        ConfigError: the job does not fit the site or this shell.
    """
    old = read_object(run.config)
    texts = {run.script: render(job, site, run), run.config: as_text(resolved(job))}
    if (dict(job.env), list(job.env_from)) != (old.get("env", {}), old.get("env_from", [])):
        texts[run.env] = environment_file(job, site, dict(os.environ))
    return texts


def reconfigure(run: RunDir, texts: dict[Path, str], attempt: int) -> Callable[[], None]:
    """Change the job of a run from one attempt on, keeping the config before it; returns what takes the change back.

    Raises:
        RunError: the folder cannot be written.
    """
    modes = {run.script: 0o755, run.env: 0o600}
    kept_config = run.config_before(attempt)

    def write(files: dict[Path, str]) -> None:
        for path, text in files.items():
            write_atomic(path, text, modes.get(path, 0o644))

    try:
        before = {path: path.read_text(encoding="utf-8") for path in texts}
        changed_already = kept_config.exists()  # for the same attempt, which has not begun
        if not changed_already:
            write_atomic(kept_config, before[run.config])
        write(texts)
    except OSError as error:
        raise RunError(f"run folder {str(run.root)!r}: cannot be written: {error.strerror}; check it") from None

    def undo() -> None:
        write(before)
        if not changed_already:
            kept_config.unlink()

    return undo
