"""Whether the files that a job names are there, before it is queued."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.config.load import is_file
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig


def check_paths(job: JobConfig) -> None:
    """Refuse a job whose script, working folder, Python or inputs are not there.

    Raises:
        ConfigError: naming the first that is missing.
    """
    if job.script is not None and not is_file(Path(job.script)):
        raise ConfigError(f"script {job.script!r}: no such file; check the path", key="script", value=job.script)
    if job.workdir is not None and not _exists(job.workdir, folder=True):
        raise ConfigError(f"workdir {job.workdir!r}: no such folder; check the path", key="workdir", value=job.workdir)
    if job.runtime.path is not None and not _exists(f"{job.runtime.path}/bin/python"):
        raise ConfigError(
            f"runtime.path {job.runtime.path!r}: no bin/python in it; make the environment first",
            key="runtime.path",
            value=job.runtime.path,
        )
    image = job.runtime.image
    if image is not None and image.startswith("/") and not _exists(image):
        raise ConfigError(f"runtime.image {image!r}: no such file; check the path", key="runtime.image", value=image)
    for path in job.inputs:
        if not _exists(path):
            raise ConfigError(f"inputs {path!r}: no such file or folder; check the path", key="inputs", value=path)


def _exists(path: str, *, folder: bool = False) -> bool:
    try:
        return os.path.isdir(path) if folder else os.path.exists(path)  # noqa: PTH110, PTH112 - a NUL in it is no error
    except ValueError:
        return False
