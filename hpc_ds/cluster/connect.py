"""Which scheduler a site means, and which site this machine is."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from hpc_ds.cluster.local import Local
from hpc_ds.cluster.shell import run as run_program
from hpc_ds.cluster.slurm import Slurm
from hpc_ds.errors import CommandError

if TYPE_CHECKING:
    from hpc_ds.cluster.scheduler import Scheduler
    from hpc_ds.run_dir import RunDir


def scheduler_named(name: str, run: RunDir) -> Scheduler:
    """The scheduler of a site, seen from one run."""
    return Local(run) if name == "local" else Slurm()


def detect_site() -> str:
    """``slurm`` where a Slurm answers on this machine, else ``local``."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return "local"
    try:
        answers = run_program(["sinfo", "--noheader", "--format=%R"], timeout_s=10.0)
    except CommandError:
        return "local"
    return "slurm" if answers.stdout.strip() else "local"
