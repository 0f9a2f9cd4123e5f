"""Ranks in containers: what a rank runs, inside which program or under which options of srun.

The supervisor stays on the host, where Slurm's commands are. Ranks need the run folder, their working folder, and the
variables of the run; all four runtimes hand variables on, and each is told what to mount:

| kind      | how                                                                                   |
|-----------|---------------------------------------------------------------------------------------|
| apptainer | ``apptainer exec --bind=... IMAGE COMMAND``                                           |
| shifter   | ``shifter --image=IMAGE COMMAND``; the site's file systems are mounted by itself      |
| pyxis     | ``srun --container-image=IMAGE --container-mounts=...``                               |
| edf       | ``srun --environment=FILE``: a file in the run folder that builds on the user's own   |

Source: https://apptainer.org/docs/user/latest/, https://github.com/NVIDIA/pyxis/wiki/Usage,
https://github.com/NERSC/shifter, https://docs.cscs.ch/software/container-engine/edf
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from hpc_ds.config.job import python_of
from hpc_ds.errors import ConfigError, RunError
from hpc_ds.launch.environment import with_the_name
from hpc_ds.run_dir import write_atomic

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir

# What divides the parts of a mount, or is replaced in it, by one runtime or another.
_NOT_IN_MOUNTS = re.compile(r"[:,;$]")


def rank_command(job: JobConfig, site: SiteConfig, run: RunDir) -> list[str]:
    """What every rank is started as."""
    runtime = job.runtime
    python = runtime.python if runtime.in_container else python_of(job)
    program = list(job.command) if job.command is not None else [python, "-u", str(job.script)]
    front = with_the_name(python) if job.compat == "deepspeed" else []
    argv = [*front, *program, *job.args]
    options = _options(job, site)
    if runtime.kind == "apptainer":
        gpus = "--rocm" if site.gpu_vendor == "amd" else "--nv"
        binds = [f"--bind={mount}" for mount in mounts(job, run)]
        there = [gpus] if job.resources.gpus_per_node else []
        return ["apptainer", "exec", *there, *binds, f"--pwd={_workdir(job, run)}", *options, str(runtime.image), *argv]
    if runtime.kind == "shifter":
        volumes = [f"--volume={_two_sided(bind)}" for bind in runtime.binds]
        return ["shifter", f"--image={runtime.image}", f"--workdir={_workdir(job, run)}", *volumes, *options, *argv]
    return argv


def container_options(job: JobConfig, site: SiteConfig, run: RunDir) -> list[str]:
    """The options of srun that put ranks into a container; none for a runtime that is a program of its own."""
    if job.runtime.kind == "pyxis":
        both = ",".join(_two_sided(mount) for mount in mounts(job, run))
        image = [f"--container-image={job.runtime.image}", f"--container-mounts={both}"]
        return [*image, f"--container-workdir={_workdir(job, run)}", *_options(job, site)]
    if job.runtime.kind == "edf":
        return [f"--environment={run.environment_definition}", *_options(job, site)]
    return []


def environment_definition(job: JobConfig, run: RunDir) -> str:
    """The text of the environment file of kind edf: the user's own, and the mounts of the run on top of its mounts."""
    lines = {
        "base_environment": [job.runtime.image],
        "workdir": _workdir(job, run),
        "mounts": [_two_sided(mount) for mount in mounts(job, run)],
    }
    # Strings of JSON are strings of TOML.
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items())


def prepare_container(job: JobConfig, run: RunDir) -> None:
    """Make what containers of this run need: its environment file, and a folder of checkpoints that can be mounted.

    Raises:
        RunError: it cannot be written.
    """
    if not job.runtime.in_container:
        return
    try:
        if job.checkpoint.dir is not None:
            Path(job.checkpoint.dir).mkdir(parents=True, exist_ok=True)
        if job.runtime.kind == "edf":
            write_atomic(run.environment_definition, environment_definition(job, run))
    except OSError as error:
        raise RunError(f"run {str(run.root)!r}: {error.filename}: {error.strerror}; check it") from None


def mounts(job: JobConfig, run: RunDir) -> list[str]:
    """What ranks of this run need in their container: ``PATH``, or ``PATH:WHERE`` where the user says so.

    Raises:
        ConfigError: a folder has a name that no runtime can mount.
    """
    if not job.runtime.in_container:
        return []
    needed = [str(run.root), _workdir(job, run)]
    needed += [str(PurePath(job.script).parent)] if job.script is not None else []
    needed += [job.checkpoint.dir] if job.checkpoint.dir is not None else []
    for folder in needed:
        if _NOT_IN_MOUNTS.search(folder):
            raise ConfigError(
                f"runtime.kind {job.runtime.kind!r}: folder {folder!r} cannot be mounted, for its name has one of : , ; $; "
                "choose another",
                key="runtime.kind",
                value=job.runtime.kind,
            )
    outer = [folder for folder in dict.fromkeys(needed) if not any(_below(folder, other) for other in needed)]
    return [*outer, *job.runtime.binds]


def _below(folder: str, other: str) -> bool:
    return PurePath(other) in PurePath(folder).parents


def _two_sided(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"


def _options(job: JobConfig, site: SiteConfig) -> list[str]:
    of_site = {str(kind): options for kind, options in site.container_options.items()}.get(job.runtime.kind, [])
    return [*of_site, *job.runtime.options]


def _workdir(job: JobConfig, run: RunDir) -> str:
    return job.workdir or str(run.root)
