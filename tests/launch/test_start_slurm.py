"""The command line of the one srun of a launch, whole; tests/slurm/test_slurm_launch.py runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hpc_ds.errors import LaunchError
from hpc_ds.launch.plan import HostPlan, LaunchPlan
from hpc_ds.launch.program import agent_command
from hpc_ds.launch.start_slurm import step_command, step_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

START = ["srun", "--export=ALL", "--kill-on-bad-exit=0", "--wait=0", "--chdir=/"]
JOB = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_CPUS_PER_NODE": "8(x2),4", "SLURM_JOB_ID": "7"}
HET = {
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "n[2-3]",
    "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "4",
    "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "2(x2)",
    "SLURM_CPUS_PER_TASK_HET_GROUP_0": "4",
}


def plan(*launcher_args: str, bind_cores: bool = False, **ranks: int) -> LaunchPlan:
    hosts, first = [], 0
    for node_rank, (name, number) in enumerate(ranks.items()):
        hosts.append(HostPlan(name, first, None, number, node_rank))
        first += number
    return LaunchPlan(
        tuple(hosts), ("python",), "/work", launcher="slurm", launcher_args=launcher_args, bind_cores=bind_cores
    )


def words(launch: LaunchPlan, environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The command without what is the same in each, and the files that it names."""
    files: list[str] = []

    def name_of(text: str) -> str:
        files.append(text)
        return f"/dev/fd/{len(files)}"

    command = step_command(launch, environ, name_of)
    agent = agent_command()
    assert command[: len(START)] == START
    assert command[-len(agent) :] == agent
    return command[len(START) : -len(agent)], files


@pytest.mark.parametrize(
    ("launch", "extra", "layout", "files"),
    [
        # The whole allocation, equally.
        (plan(n1=2, n2=2, n3=2), {}, ["--nodes=3", "--ntasks=6", "--ntasks-per-node=2", "--distribution=block"], []),
        # Some nodes, unequally, in another order.
        (
            plan(n1=2, n2=2),
            {},
            ["--nodes=2", "--ntasks=4", "--distribution=arbitrary", "--nodelist=/dev/fd/1"],
            ["n1\nn1\nn2\nn2\n"],
        ),
        (
            plan(n3=1, n1=2),
            {},
            ["--nodes=2", "--ntasks=3", "--distribution=arbitrary", "--nodelist=/dev/fd/1"],
            ["n3\nn1\nn1\n"],
        ),
        # What the job gives each task, where there is room for it.
        (
            plan("--mpi=pmi2", n1=2, n2=2, n3=2),
            {"SLURM_CPUS_PER_TASK": "2"},
            [
                "--nodes=3",
                "--ntasks=6",
                "--ntasks-per-node=2",
                "--distribution=block",
                "--cpus-per-task=2",
                "--mpi=pmi2",
            ],
            [],
        ),
        (
            plan(n1=4, n2=4, n3=4),
            {"SRUN_CPUS_PER_TASK": "2"},
            ["--nodes=3", "--ntasks=12", "--ntasks-per-node=4", "--distribution=block"],
            [],
        ),
        (
            plan(n1=6, n2=6, n3=6),
            {},
            ["--nodes=3", "--ntasks=18", "--ntasks-per-node=6", "--distribution=block", "--overcommit"],
            [],
        ),
        (
            plan(n1=1, n2=1, n3=1, bind_cores=True),
            {},
            ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--distribution=block", "--cpu-bind=none"],
            [],
        ),
    ],
)
def test_layout(launch: LaunchPlan, extra: dict[str, str], layout: list[str], files: list[str]) -> None:
    assert words(launch, {**JOB, **extra}) == (layout, files)


def test_heterogeneous() -> None:
    first = [
        "--het-group=0",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        "--distribution=block",
        "--cpus-per-task=4",
    ]
    both, files = words(plan("--mpi=none", n1=1, n2=1, n3=2), HET)
    second = [
        "--het-group=1",
        "--nodes=2",
        "--ntasks=3",
        "--distribution=arbitrary",
        "--nodelist=/dev/fd/1",
        "--mpi=none",
    ]
    assert both == [*first, "--mpi=none", *agent_command(), ":", *second]
    assert files == ["n2\nn3\nn3\n"]
    alone, _ = words(plan(n2=2, n3=2), HET)
    assert alone == ["--het-group=1", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--distribution=block"]
    with pytest.raises(LaunchError, match=r"host 'n2': comes after hosts of a later component|host 'n1': comes after"):
        words(plan(n2=1, n1=1), HET)


def test_what_is_no_allocation() -> None:
    with pytest.raises(LaunchError, match=r"host 'n9': not a node of this allocation \('n\[1-3\]'\)"):
        words(plan(n1=1, n9=1), JOB)
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST: not set, so there is no allocation here"):
        words(plan(n1=1), {})
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST: node list"):
        words(plan(n1=1), {"SLURM_JOB_NODELIST": "n[1"})


def test_what_the_job_wanted_of_its_own_tasks_is_not_the_steps() -> None:
    kept = {**JOB, "SLURM_GPUS_PER_NODE": "2", "SLURM_CONF": "/etc/slurm.conf", "SLURM_MPI_TYPE": "pmix", "A": "a,b"}
    layout = ["HOSTFILE", "DISTRIBUTION", "NTASKS", "NPROCS", "NTASKS_PER_NODE", "CPU_BIND", "CPU_BIND_LIST"]
    layout.append("NTASKS_PER_NODE_HET_GROUP_1")
    dropped = {f"SLURM_{name}": "1" for name in layout} | {"SLURM_CPUS_PER_TASK": "1", "SRUN_CPUS_PER_TASK": "1"}
    assert step_environment({**kept, **dropped, "SLURM_CPUS_PER_TASK_HET_GROUP_1": "2"}) == kept
