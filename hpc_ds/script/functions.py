"""``hpc_ds.submit``: a Python function as a job, by the same site files and rules as ``hpcds submit``.

For functions that return something, such as a preprocessing step or an evaluation. A training that must survive its
cluster is a script under ``hpcds submit``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.callables import COMMAND, Errand, why_it_cannot_travel
from hpc_ds.cluster.connect import detect_site
from hpc_ds.cluster.function_job import FunctionJob, OnSlurm, OnThisMachine
from hpc_ds.config.job import JobConfig, Resources, is_run_name, lead_s, python_of, time_limit_s
from hpc_ds.config.load import build_job, load_site
from hpc_ds.config.model import check, nearest
from hpc_ds.config.paths import check_paths
from hpc_ds.config.site_rules import check_job, fitted
from hpc_ds.errors import ConfigError, RunError, SchedulerError, SubmitError
from hpc_ds.launch.srun import site_options, step_options
from hpc_ds.run_dir import RunDir, new_folder, write_atomic
from hpc_ds.script.render import render_function
from hpc_ds.script.submit import ask_scheduler, variables_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hpc_ds.config.site import SiteConfig

KEYS = ("name", "workdir", "env", "env_from", "setup", "runtime", "restart", "templates")
"""Keys of a job file that a function's job has too, beside ``site`` and ``resources``."""

_OF_RESTART = ("lead", "max_restarts")
_OWN_PATTERNS = re.compile(r"[%\\]")  # srun and submitit read them in paths


def submit(
    function: Callable[..., Any],
    *args: Any,
    site: str = "auto",
    resources: Mapping[str, Any] | None = None,
    job: Mapping[str, Any] | None = None,
    folder: str | Path = "runs/functions",
    **kwargs: Any,
) -> FunctionJob:
    """Run ``function(*args, **kwargs)`` as a job, on every rank of it.

    Args:
        function: anything that cloudpickle can take along. One with a method ``checkpoint()``, as submitit documents it,
            goes on after a preemption or a time limit; so does one that leaves by ``hpc_ds.Preempted``.
        args: its arguments.
        site: the name of a site, the path of its file, or ``auto``: the cluster this machine belongs to.
        resources: keys of a job's ``resources`` section.
        job: further keys of a job file: ``name``, ``workdir``, ``env``, ``env_from``, ``setup``, ``runtime`` (no
            container), ``restart`` (``lead``, ``max_restarts``), ``templates``.
        folder: where a folder with script, pickles and logs is made; all nodes must see it.
        kwargs: its keyword arguments.

    Returns:
        Its job: ``result()``, ``results()``, ``done()``, ``cancel()``, ``state``, ``stdout()``, ``stderr()``.

    Raises:
        ConfigError: a key is not usable, the function cannot be pickled, or the site would refuse the job.
        RunError: nothing can be written in ``folder``.
        SubmitError: the scheduler refused the job.
    """
    config = job_of(function, resources or {}, job or {})
    where = load_site(detect_site() if site == "auto" else site)
    warnings = check_job(config, where)
    check_paths(config)
    name = config.name
    problem = why_it_cannot_travel(function, args, kwargs)
    if problem is not None:
        raise ConfigError(f"function {name!r}: cannot be pickled: {problem}; give it what can be")
    run = _prepare(config, where, Path(folder).expanduser())
    try:
        warnings += [warning for warning in [ask_scheduler(run.script, config, where).warning] if warning]
        started = _start(run, config, where, (function, args, kwargs))
    except SubmitError:
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    except SchedulerError as error:  # the job may be queued, and would need its folder
        raise SchedulerError(f"{error}; its folder {str(run.root)!r} is kept") from error
    started.warnings = warnings
    return started


def job_of(function: Callable[..., Any], resources: Mapping[str, Any], further: Mapping[str, Any]) -> JobConfig:
    """The job of a function, checked as a job file is.

    Raises:
        ConfigError: naming the key.
    """
    check(Resources, resources, "resources")
    for key in further:
        if key not in KEYS:
            raise ConfigError(f"job: {key}: not a key of a function's job; {nearest(key, KEYS)}", key=key)
    data = {"name": _name_of(function), **further, "resources": dict(resources), "command": ["submitit"]}
    job = build_job(data, file="job", base=Path.cwd())
    if job.runtime.in_container:
        raise ConfigError(
            f"job: runtime.kind {job.runtime.kind!r}: functions run in no container; use venv, conda or a script",
            key="runtime.kind",
            value=job.runtime.kind,
        )
    restart = further.get("restart") or {}
    for key in restart:
        if key not in _OF_RESTART:
            raise ConfigError(f"job: restart.{key}: not of a function's job; {nearest(key, _OF_RESTART)}", key=key)
    return job


def _name_of(function: Callable[..., Any]) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    name = getattr(inner, "__name__", type(inner).__name__).strip("<>")
    return name if is_run_name(name) else "function"


def script_of(job: JobConfig, site: SiteConfig, run: RunDir) -> str:
    """What sbatch gets; on site local what every process is started by.

    Raises:
        ConfigError, SiteError: see ``render``.
    """
    if site.scheduler == "local":
        return render_function(job, site, run, [], os.environ.get("CUDA_VISIBLE_DEVICES"))
    logs = run.root / "%j_%t_log"
    srun = ["srun", *step_options(fitted(job, site), end_with_the_first=True), *site_options(job, site)]
    srun += ["--unbuffered", f"--output={logs}.out", f"--error={logs}.err"]
    return render_function(job, site, run, [*srun, python_of(job), *COMMAND, str(run.root)])


def _prepare(job: JobConfig, site: SiteConfig, folder: Path) -> RunDir:
    """Make the folder of a function's job, with all in it but the pickle."""
    if _OWN_PATTERNS.search(str(folder.absolute())):
        raise RunError(f"folder {str(folder)!r}: has a % or \\, which Slurm reads as a pattern; choose another")
    variables = variables_of(job, site)
    run = RunDir(new_folder(folder, job.name))
    try:
        run.logs.mkdir()
        write_atomic(run.script, script_of(job, site, run), mode=0o755)
        write_atomic(run.env, variables, mode=0o600)
    except BaseException as error:
        shutil.rmtree(run.root, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"folder {str(run.root)!r}: cannot be written: {error.strerror}; choose another") from None
        raise
    return run


def _start(run: RunDir, job: JobConfig, site: SiteConfig, call: tuple[Callable[..., Any], Any, Any]) -> FunctionJob:
    limit, ranks = job.resources.time, job.resources.world_size
    minutes = None if limit is None else time_limit_s(limit) / 60
    errand = Errand(*call, run.script, ranks, minutes, lead_s(job), job.restart.max_restarts)
    if site.scheduler == "slurm":
        job_id = errand.send_to_slurm()
        return FunctionJob(job.name, run.root, job_id, ranks, OnSlurm(job_id))
    local = errand.send_to_this_machine()
    return FunctionJob(job.name, run.root, local.job_id, ranks, OnThisMachine(local))
