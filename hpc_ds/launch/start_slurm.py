"""Agents started by srun inside an allocation, one a rank: one step over the hosts of the plan, in the plan's order.

srun gives a rank its share of the node (GPUs, cores, memory, the PMI of the site) and takes the environment along as it
is. Values never go through ``--export``, which splits them at commas.

| the plan takes                             | srun gets                                                              |
|--------------------------------------------|------------------------------------------------------------------------|
| all nodes, in their order, equally         | ``--nodes --ntasks --ntasks-per-node``, ``--distribution=block``       |
| some of them, unequally or in another order| ``--distribution=arbitrary`` and a file of one node a rank             |
| of a heterogeneous job                     | one such part for each component, parted by ``:``                      |

A job's ``--cpus-per-task`` is said again, which Slurm 22.05 to 23.02 do not pass on to steps; where the plan has more
ranks on a node than that leaves room for, ranks share its cores.

Source: https://slurm.schedmd.com/srun.html, https://slurm.schedmd.com/heterogeneous_jobs.html
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hpc_ds.errors import LaunchError
from hpc_ds.launch.allocation import CPUS_PER_TASK, components
from hpc_ds.launch.memory_file import memory_file
from hpc_ds.launch.program import Program, agent_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hpc_ds.launch.allocation import Component
    from hpc_ds.launch.plan import HostPlan, LaunchPlan
    from hpc_ds.launch.reception import Reception

# How the job itself wanted its tasks laid out; the plan says it of the step.
_LAYOUT = re.compile(
    r"SLURM_(?:HOSTFILE|DISTRIBUTION|NTASKS|NPROCS|NTASKS_PER_(?:NODE|GPU|SOCKET|CORE)|CPU_BIND\w*)(?:_HET_GROUP_\d+)?"
)
_NOT_ALL = re.compile(r"^srun: error: .*[Ll]aunch.* failed|^slurmstepd: error: execve")


class SlurmStarter:
    """One srun."""

    per_rank = True

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        """Start it."""
        with ExitStack() as files:
            opened: list[int] = []

            def name_of(text: str) -> str:
                opened.append(files.enter_context(memory_file(text)))
                return f"/dev/fd/{opened[-1]}"

            command = step_command(plan, os.environ, name_of)
            environ = {**step_environment(os.environ), **reception.variables}
            program = Program(command, "srun", env=environ, pass_fds=opened)
        program.alarm = _NOT_ALL
        program.cure = "see what squeue --steps shows of this job"
        yield program


def step_command(plan: LaunchPlan, environ: Mapping[str, str], name_of: Callable[[str], str]) -> list[str]:
    """The command line of srun.

    Args:
        plan: which ranks on which hosts.
        environ: the variables of the allocation.
        name_of: makes a file of a text and returns its name.

    Raises:
        LaunchError: a host is not in the allocation, or ranks are not in the order of its components.
    """
    parts = [(component, _hosts_in(component, plan)) for component in components(environ)]
    parts = [(component, hosts) for component, hosts in parts if hosts]
    known = [host for _, hosts in parts for host in hosts]
    for planned, found in zip(plan.hosts, [*known, *[None] * len(plan.hosts)], strict=False):
        if planned not in known:
            raise LaunchError(
                f"host {planned.name!r}: not a node of this allocation ({environ.get('SLURM_JOB_NODELIST')!r}); see "
                "hpcds hostfile"
            )
        if planned is not found:
            raise LaunchError(
                f"host {planned.name!r}: comes after hosts of a later component of this heterogeneous job; srun numbers "
                "ranks component by component: order the hostfile so"
            )
    # --wait=0: else ranks that still work when the first has finished would be killed.
    command = ["srun", "--export=ALL", "--kill-on-bad-exit=0", "--wait=0", "--chdir=/"]
    for place, (component, hosts) in enumerate(parts):
        if place:
            command.append(":")
        if component.group is not None:
            command.append(f"--het-group={component.group}")
        command += [*_layout(component, hosts, name_of), *_cores(component, hosts, plan), *plan.launcher_args]
        command += agent_command()
    return command


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of srun: the launcher's, without what the job wanted of its own tasks."""
    wanted = {name: value for name, value in environ.items() if not _LAYOUT.fullmatch(name)}
    return {name: value for name, value in wanted.items() if not name.startswith(CPUS_PER_TASK)}


def _hosts_in(component: Component, plan: LaunchPlan) -> list[HostPlan]:
    nodes = set(component.nodes)
    return [host for host in plan.hosts if host.name in nodes]


def _layout(component: Component, hosts: list[HostPlan], name_of: Callable[[str], str]) -> list[str]:
    """Which ranks are where."""
    options = [f"--nodes={len(hosts)}", f"--ntasks={sum(host.ranks for host in hosts)}"]
    counts = {host.ranks for host in hosts}
    if [host.name for host in hosts] == component.nodes and len(counts) == 1:
        return [*options, f"--ntasks-per-node={counts.pop()}", "--distribution=block"]
    lines = "".join(f"{host.name}\n" * host.ranks for host in hosts)
    return [*options, "--distribution=arbitrary", f"--nodelist={name_of(lines)}"]


def _cores(component: Component, hosts: list[HostPlan], plan: LaunchPlan) -> list[str]:
    """What each rank gets of its node's cores."""
    cpus = dict(zip(component.nodes, component.cpus, strict=False))
    each = component.cpus_per_task
    # Where ranks are to be bound by us, an agent must see all cores of the job on its node.
    options = ["--cpu-bind=none"] if plan.bind_cores else []
    if each is not None and all(host.ranks * each <= cpus.get(host.name, host.ranks * each) for host in hosts):
        return [f"--cpus-per-task={each}", *options]
    if any(host.ranks > cpus.get(host.name, host.ranks) for host in hosts):
        options.append("--overcommit")
    return options
