"""GPUs of which only the scheduler tells. Its answers are those of Slurm 22.05, cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.cluster.shell import Completed
from hpc_ds.errors import CommandError
from hpc_ds.launch.gres import count_gpus, with_gpus
from hpc_ds.launch.hostfile import Host, hosts_from_slurm

SALLOC = {
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
HET = {
    "SLURM_JOB_ID": "5",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "n[2-3]",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
    "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2",
    "SLURM_TASKS_PER_NODE_HET_GROUP_0": "1",
    "SLURM_TASKS_PER_NODE_HET_GROUP_1": "3,1",
}
# The batch script has the variables of the first component without a number too.
HET_BATCH = {
    **HET,
    "SLURM_PROCID": "0",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_TASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "2",
}
ONE = "JobId=3 JobName=interactive NodeList=n[1-2] Command=/x TresPerNode=gres:gpu:9 Power= TresPerNode=gres:gpu:2 \n"
NO_GPU = "JobId=3 JobName=interactive NodeList=n[1-2] TRES=cpu=2,node=2 Command=bash\n"
BOTH = "JobId=5 HetJobId=5 HetJobOffset=0 NodeList=n1 TresPerNode=gres:gpu:1 \nJobId=6 HetJobId=5 HetJobOffset=1 NodeList=n[2-3]\n"
SECOND = "JobId=5 HetJobOffset=0 NodeList=n1\nJobId=6 HetJobOffset=1 NodeList=n[2-3] TresPerNode=gres/gpu:a100:4\n"

HOSTS = {
    "salloc --gres": (SALLOC, ONE, "n1:2 n2:2"),
    "salloc without GPUs": (SALLOC, NO_GPU, "n1:1 n2:1"),
    "salloc, and what is no answer": (SALLOC, "JobId=3 TresPerNode\nx", "n1:1 n2:1"),
    "salloc, two components": (HET, BOTH, "n1:1 n2:3 n3:1"),
    "salloc, GPUs in the second": (HET, SECOND, "n1:1 n2:4 n3:4"),
    "batch, two components": (HET_BATCH, BOTH, "n1:1 n2:3 n3:1"),
    "batch, GPUs in the second": ({**HET_BATCH, "SLURM_GPUS_ON_NODE": "0"}, SECOND, "n1:1 n2:4 n3:4"),
    "batch, GPUs asked per node": ({**HET_BATCH, "SLURM_GPUS_PER_NODE_HET_GROUP_0": "2"}, BOTH, "n1:2 n2:3 n3:1"),
    "older names": (
        {name.replace("HET_GROUP", "PACK_GROUP"): value for name, value in HET.items()},
        NO_GPU,
        "n1:1 n2:3 n3:1",
    ),
}
NOT_ASKED = {
    "no job": {},
    "GPUs are told": {**SALLOC, "SLURM_GPUS_PER_NODE": "2"},
    "a batch script": {**SALLOC, "SLURM_PROCID": "0"},
    "a step": {**SALLOC, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1"},
}
COUNTED = {
    "": 0,
    "gres:gpu:2": 2,
    "gres/gpu:a100:4": 4,
    "gres:gpu": 1,
    "gres/gpu:a100": 1,
    "gres/gpu=3": 3,
    "gres/gpu:a=1,gres/gpu:b=2,gres/nvme:7": 3,
    "gpu:2": 2,
    "gres:gpux:2": 0,
}


@pytest.mark.parametrize("case", HOSTS)
def test_what_gres_has_asked_for_is_found(case: str) -> None:
    environ, answer, expected = HOSTS[case]
    asked = []

    def scontrol(command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
        asked.append(command)
        return Completed(0, answer, "")

    hosts = hosts_from_slurm(with_gpus(environ, scontrol))
    assert [f"{name}:{slots}" for name, slots in hosts] == expected.split()
    assert asked == [["scontrol", "show", "job", "-o", environ["SLURM_JOB_ID"]]]


def fails(command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
    raise CommandError(command, 1, "Invalid job id specified")


@pytest.mark.parametrize("case", NOT_ASKED)
def test_it_is_asked_only_where_it_must(case: str) -> None:
    def never(command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
        raise AssertionError(command)

    assert with_gpus(NOT_ASKED[case], never) == NOT_ASKED[case]


def test_without_an_answer_nothing_changes() -> None:
    assert with_gpus(SALLOC, fails) == SALLOC
    assert hosts_from_slurm(with_gpus(SALLOC, fails)) == [Host("n1", 1), Host("n2", 1)]


@pytest.mark.parametrize("text", COUNTED)
def test_gpus_are_counted(text: str) -> None:
    assert count_gpus(text) == COUNTED[text]


@given(st.text(alphabet="JobIdHetOfs=gres:/pu2,TPNd \n", max_size=40))
def test_any_answer_is_read(answer: str) -> None:
    with_gpus(SALLOC, lambda *_args, **_kwargs: Completed(0, answer, ""))
