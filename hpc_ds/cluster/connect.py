"""Which scheduler a site means, and which site this machine is."""

from __future__ import annotations

import fnmatch
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.cluster.local import Local
from hpc_ds.cluster.parse import parse_config
from hpc_ds.cluster.process import node_name
from hpc_ds.cluster.shell import run as run_program
from hpc_ds.cluster.slurm import Slurm
from hpc_ds.config.load import clusters
from hpc_ds.errors import CommandError

if TYPE_CHECKING:
    from hpc_ds.cluster.scheduler import Scheduler
    from hpc_ds.cluster.shell import Shell
    from hpc_ds.config.site import Detect
    from hpc_ds.run_dir import RunDir


def scheduler_named(name: str, run: RunDir) -> Scheduler:
    """The scheduler of a site, seen from one run."""
    return Local(run) if name == "local" else Slurm()


@dataclass(frozen=True, slots=True)
class Detected:
    """Which site this machine belongs to.

    Attributes:
        site: its name.
        because: in words.
        cluster: Slurm's name of the cluster, where it was asked for.
    """

    site: str
    because: str
    cluster: str | None = None


def detect_site() -> str:
    """The known cluster that this machine belongs to; ``slurm`` where another Slurm answers, else ``local``."""
    return detect().site


def detect(shell: Shell = run_program) -> Detected:
    """Which site this machine belongs to, and why. Slurm is asked for its name only where a site file has one."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return Detected("local", "there is no sbatch here")
    try:
        answers = shell(["sinfo", "--noheader", "--format=%R"], timeout_s=10.0)
    except CommandError as error:
        return Detected("local", f"no Slurm answers: {error}")
    if not answers.stdout.strip():
        return Detected("local", "the Slurm that answers has no partition")
    known = clusters()
    cluster = cluster_name(shell) if any(by.cluster_names for by in known.values()) else None
    for site, by in known.items():
        because = _fits(by, cluster)
        if because is not None:
            return Detected(site, because, cluster)
    return Detected("slurm", "a Slurm answers, of a cluster that no site file names", cluster)


def cluster_name(shell: Shell = run_program) -> str | None:
    """What Slurm calls its cluster; None where it does not say."""
    inside = os.environ.get("SLURM_CLUSTER_NAME")
    if inside:
        return inside
    try:
        said = shell(["scontrol", "show", "config"], timeout_s=20.0).stdout
    except CommandError:
        return None
    return parse_config(said).get("ClusterName")


def _fits(by: Detect, cluster: str | None) -> str | None:
    """Why this machine belongs to the cluster that is known by these signs, or None."""
    for variable, values in by.variables.items():
        value = os.environ.get(variable)
        if value in values:
            return f"{variable} is {value}"
    if cluster is not None and cluster in by.cluster_names:
        return f"Slurm calls its cluster {cluster}"
    host = node_name()
    return next((f"this host is {host}" for pattern in by.hosts if fnmatch.fnmatchcase(host, pattern)), None)
