"""The Slurm allocation that this process is in, part by part, as its variables describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.errors import LaunchError, NodeListError
from hpc_ds.launch.node_list import expand, expand_counts

if TYPE_CHECKING:
    from collections.abc import Mapping

CPUS_PER_TASK = ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK")
"""Where a job's ``--cpus-per-task`` is found; the second is there for steps of Slurm 22.05 to 23.02."""

# Steps that are the shell of their job and describe only themselves: the interactive step, the batch script.
_SHELLS = ("4294967290", "4294967291")


class Component(NamedTuple):
    """An allocation, or a component of a heterogeneous one.

    Attributes:
        group: its number; None: the job has no components.
        nodes: in Slurm's order.
        cpus: of each node.
        cpus_per_task: what the job asked for; None: nothing.
    """

    group: int | None
    nodes: list[str]
    cpus: list[int]
    cpus_per_task: int | None


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether this process belongs to a task that srun started, and not to the shell of a job."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and step not in _SHELLS


def components_of(environ: Mapping[str, str]) -> int:
    """Components of the heterogeneous job that this allocation is; 1 of any other."""
    size = environ.get("SLURM_HET_SIZE", "1")
    return max(int(size), 1) if size.isascii() and size.isdigit() and len(size) < 4 else 1


def components(environ: Mapping[str, str]) -> list[Component]:
    """The allocation, part by part.

    Raises:
        LaunchError: its variables are not there, or not in their form.
    """
    number = components_of(environ)
    if number == 1:
        return [_component(environ, None, "")]
    return [_component(environ, group, f"_HET_GROUP_{group}") for group in range(number)]


def _component(environ: Mapping[str, str], group: int | None, ending: str) -> Component:
    node_list, counts = (
        environ.get(f"{name}{ending}", "") for name in ("SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE")
    )
    try:
        nodes, cpus = (expand(node_list) if node_list else []), (expand_counts(counts) if counts else [])
    except NodeListError as error:
        raise LaunchError(f"SLURM_JOB_NODELIST{ending}: {error}") from None
    if not nodes:
        raise LaunchError(
            f"SLURM_JOB_NODELIST{ending}: not set, so there is no allocation here; call hpcds run under salloc or sbatch"
        )
    own = next(
        (environ[f"{name}{ending}"] for name in CPUS_PER_TASK if environ.get(f"{name}{ending}", "").isdecimal()), None
    )
    return Component(group, nodes, cpus if len(cpus) == len(nodes) else [], None if own is None else int(own))
