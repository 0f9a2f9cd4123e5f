"""Who am I: every row of the table of launchers, and every way in which their variables can be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.errors import HpcdsError, RankError
from hpc_ds.runtime.rank import (
    Rank,
    by_mpi,
    in_slurm_step,
    local_rank_from_environment,
    mpi_sign,
    rank_from_environment,
    refuse_alone,
)

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
# A step over one of three nodes: NTASKS and the node list of the job are of the job.
STEP = {
    "SLURM_JOB_ID": "25", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "25", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}
INTERACTIVE = {
    "SLURM_JOB_ID": "25", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "2",
}  # fmt: skip
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "7"}
MPICH = {**PMI, "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip

RANKS: dict[str, tuple[dict[str, str], Rank | None]] = {
    "nothing": ({}, None),
    "a shell": ({"PATH": "/bin", "HOME": "/root"}, None),
    "torchrun": (TORCHRUN, Rank(5, 1, 8, 4, "env")),
    "deepspeed": (DEEPSPEED, Rank(5, 1, 8, 4, "env")),
    "a step": (STEP, Rank(3, 1, 4, None, "slurm")),
    "a step of one": ({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
                      Rank(0, 0, 1, None, "slurm")),
    "a step, interleaved": ({**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, Rank(1, 0, 4, None, "slurm")),
    "the batch script": (BATCH, None),
    "the shell of salloc, which is no task": (INTERACTIVE, None),
    "Open MPI": (OPENMPI, Rank(2, 0, 4, 2, "openmpi")),
    "Open MPI in a batch script": ({**BATCH, **OPENMPI}, Rank(2, 0, 4, 2, "openmpi")),
    "PMI without a local rank": (PMI, Rank(2, 0, 4, None, "pmi", placed=False)),
    "MPICH, Intel MPI": (MPICH, Rank(2, 0, 4, 2, "pmi")),
    "Cray PALS": ({**PMI, "PALS_LOCAL_RANKID": "1", "PALS_RANKID": "2"}, Rank(2, 1, 4, None, "pmi")),
    "Cray PMI": ({**PMI, "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}, Rank(2, 1, 4, 2, "pmi")),
    "Flux": ({**PMI, "FLUX_TASK_RANK": "2", "FLUX_TASK_LOCAL_ID": "1"}, Rank(2, 1, 4, None, "pmi")),
    "MVAPICH2": (MVAPICH2, Rank(3, 1, 4, 2, "mvapich2")),
    "PMIx alone says no size": ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-1@1"}, None),
    "jsrun says it as Open MPI does": ({**OPENMPI, "JSM_NAMESPACE_RANK": "2"}, Rank(2, 0, 4, 2, "openmpi")),
    "ours, under mpirun": (
        {**OPENMPI, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, Rank(2, 0, 4, 2, "env"),
    ),
    "a launcher that mpirun starts once a node": (
        {**OPENMPI, "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, Rank(5, 1, 16, None, "env"),
    ),
    "a step with PMI": ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, Rank(3, 1, 4, None, "slurm")),
    "torchrun in a step": ({**STEP, **TORCHRUN}, Rank(5, 1, 8, 4, "env")),
    "ours, that agree with the step": (
        {**STEP, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        Rank(3, 1, 4, None, "env"),
    ),
    "torchrun with as many ranks as the step has tasks": (
        {**STEP, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
        Rank(1, 1, 4, None, "env"),
    ),
    "spaces around": ({"RANK": " 0 ", "LOCAL_RANK": "0", "WORLD_SIZE": "1\n"}, Rank(0, 0, 1, None, "env")),
    "empty is not set": ({"RANK": "", "WORLD_SIZE": "", "PMI_RANK": "", **BATCH}, None),
    "a leading zero": ({"RANK": "01", "LOCAL_RANK": "01", "WORLD_SIZE": "04"}, Rank(1, 1, 4, None, "env")),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "expected"), RANKS.values(), ids=RANKS)
def test_every_launcher_is_understood(environ: dict[str, str], expected: Rank | None) -> None:
    assert rank_from_environment(environ) == expected


INTRODUCED = {
    "by Open MPI": (OPENMPI, True),
    "by Open MPI, and RANK is set too": ({**OPENMPI, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, True),
    "by a launcher of several ranks on each of MPI's": (
        {**OPENMPI, "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, False,
    ),
    "by a step, which has a place of its own": (
        {**STEP, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "PMI_RANK": "3", "PMI_SIZE": "4"}, False,
    ),
    "by torchrun": (TORCHRUN, False),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "expected"), INTRODUCED.values(), ids=INTRODUCED)
def test_whether_mpi_can_introduce_the_ranks(environ: dict[str, str], expected: bool) -> None:
    me = rank_from_environment(environ)
    assert me is not None
    assert by_mpi(me, environ) == expected


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


# What is wrong -> how the message begins.
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "no RANK": (without(TORCHRUN, "RANK"), "RANK: not set, while WORLD_SIZE='8', LOCAL_RANK='1'"),
    "no WORLD_SIZE": (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE: not set, while RANK='5', LOCAL_RANK='1'"),
    "no LOCAL_RANK": (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK: not set, while RANK='5', WORLD_SIZE='8'"),
    "only LOCAL_RANK": ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE: not set, while LOCAL_RANK='0'"),
    "empty RANK": ({**TORCHRUN, "RANK": ""}, "RANK: not set"),
    "a step without a size": (without(STEP, "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS: not set, while "),
    "a step without local ids": (without(STEP, "SLURM_LOCALID"), "SLURM_LOCALID: not set, while "),
    "Open MPI without a size": (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE: not set, while "),
    "Open MPI without a local rank": (
        without(OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK"),
        "OMPI_COMM_WORLD_LOCAL_RANK: not",
    ),
    "PMI without a size": (without(PMI, "PMI_SIZE"), "PMI_SIZE: not set, while PMI_RANK='2'"),
    "PMI without a rank": (without(PMI, "PMI_RANK"), "PMI_RANK: not set, while PMI_SIZE='4'"),
    "RANK=abc": ({**TORCHRUN, "RANK": "abc"}, "RANK 'abc': not a whole number; seen: RANK='abc', "),
    "RANK=-1": ({**TORCHRUN, "RANK": "-1"}, "RANK '-1': not a whole number"),
    "RANK=1.0": ({**TORCHRUN, "RANK": "1.0"}, "RANK '1.0': not a whole number"),
    "RANK of one space": ({**TORCHRUN, "RANK": " "}, "RANK '': not a whole number"),
    "RANK of a superscript": ({**TORCHRUN, "RANK": "\u00b2"}, "RANK '\u00b2': not a whole number"),
    "WORLD_SIZE=x": ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE 'x': not a whole number"),
    "LOCAL_RANK=x": ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK 'x': not a whole number"),
    "LOCAL_WORLD_SIZE=x": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE 'x': not a whole number"),
    "PROCID=x": ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID 'x': not a whole number"),
    "MPI_LOCALRANKID=x": ({**MPICH, "MPI_LOCALRANKID": "x"}, "MPI_LOCALRANKID 'x': not a whole number"),
    "RANK as large as the world": ({**TORCHRUN, "RANK": "8"}, "RANK 8: does not fit RANK='8', WORLD_SIZE='8'"),
    "no world": ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "0"}, "RANK 0: does not fit "),
    "local rank as large as the node": ({**TORCHRUN, "LOCAL_RANK": "4"}, "RANK 5: does not fit "),
    "local rank as large as the world": ({**STEP, "SLURM_LOCALID": "4"}, "SLURM_PROCID 3: does not fit "),
    "RANK exported before srun": (
        {**STEP, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
        "RANK 0: contradicts SLURM_PROCID 3; unset RANK before srun",
    ),
    "RANK exported before mpirun": (
        {**OPENMPI, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
        "RANK 0: contradicts OMPI_COMM_WORLD_RANK 2; unset RANK before mpirun",
    ),
    "a world of one exported before mpiexec": (
        {**MPICH, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        "WORLD_SIZE 1: mpiexec started 4 tasks, which would each be a world of its own; unset RANK, WORLD_SIZE and LOCAL_RANK bef",
    ),
    "a world of one exported before srun": (
        {**STEP, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        "WORLD_SIZE 1: srun started 4 tasks",
    ),
    "MVAPICH2 without a local rank": (
        without(MVAPICH2, "MV2_COMM_WORLD_LOCAL_RANK"),
        "MV2_COMM_WORLD_LOCAL_RANK: not set",
    ),
    "a rank longer than any number": ({**TORCHRUN, "RANK": "9" * 5000}, "RANK "),
}


@pytest.mark.parametrize(("environ", "complaint"), WRONG.values(), ids=WRONG)
def test_what_is_half_there_or_contradicts_is_an_error(environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(RankError) as caught:
        rank_from_environment(environ)
    assert str(caught.value).startswith(complaint)
    assert caught.value.exit_code == 2


def test_the_message_lists_what_was_seen_and_nothing_else() -> None:
    with pytest.raises(RankError) as caught:
        rank_from_environment({**without(STEP, "SLURM_LOCALID"), "SECRET": "hunter2", "MASTER_PORT": "1"})
    assert caught.value.seen == {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "MASTER_PORT": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "4",
    }
    for name, value in caught.value.seen.items():
        assert f"{name}={value!r}" in str(caught.value)
    assert "hunter2" not in str(caught.value)


STEPS = {
    "a step": (STEP, True),
    "the batch script": (BATCH, False),
    "the shell of salloc": (INTERACTIVE, False),
    "an id that is none": ({**STEP, "SLURM_STEP_ID": "batch"}, False),
    "an id alone": ({"SLURM_STEP_ID": "0"}, False),
    "nothing": ({}, False),
}


@pytest.mark.parametrize(("environ", "inside"), STEPS.values(), ids=STEPS)
def test_a_step_is_what_srun_started(environ: dict[str, str], inside: bool) -> None:
    assert in_slurm_step(environ) is inside


SINGLE, ASKED = Rank(0, 0, 1, 1, "single"), Rank(0, 0, 1, 1, "mpi4py")
ALONE: dict[str, tuple[Rank, dict[str, str], str]] = {
    "a batch script without srun": (SINGLE, BATCH, "SLURM_NTASKS 4: this process was not started by srun, so the world is 1; "),
    "the shell of salloc": (SINGLE, INTERACTIVE, "SLURM_NTASKS 4: this process was not started by srun"),
    "several nodes, and no number of tasks": (
        SINGLE, {"SLURM_JOB_ID": "25", "SLURM_JOB_NUM_NODES": "2"}, "SLURM_JOB_NUM_NODES 2: this process was not started by srun",
    ),
    "an MPI that does not know srun": (ASKED, BATCH, "SLURM_NTASKS 4: MPI says that this process is the only one; srun needs"),
    "an MPI that does not know its starter": (ASKED, {"PMIX_RANK": "3"}, "PMIX_RANK 3: MPI says that this process is the only one"),
}  # fmt: skip


@pytest.mark.parametrize(("me", "environ", "complaint"), ALONE.values(), ids=ALONE)
def test_a_world_of_one_is_refused_where_more_were_asked_for(me: Rank, environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(RankError) as caught:
        refuse_alone(me, environ)
    assert str(caught.value).startswith(complaint)


FITTING: dict[str, tuple[Rank, dict[str, str]]] = {
    "no job": (SINGLE, {}),
    "a job of one task": (SINGLE, {**BATCH, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}),
    "one task, said so": (SINGLE, {"SLURM_JOB_ID": "25", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "2"}),
    "variables that no job left": (SINGLE, {"SLURM_NTASKS": "4"}),
    "one task of srun": (Rank(0, 0, 1, None, "slurm"), {**STEP, "SLURM_NTASKS": "4"}),
    "a launcher that says one": (Rank(0, 0, 1, 1, "env"), BATCH),
    "mpirun of one": (ASKED, {"PMIX_RANK": "0"}),
    "all that were asked for": (Rank(0, 0, 4, 4, "mpi4py"), BATCH),
}


@pytest.mark.parametrize(("me", "environ"), FITTING.values(), ids=FITTING)
def test_a_world_of_one_is_taken_where_one_was_asked_for(me: Rank, environ: dict[str, str]) -> None:
    refuse_alone(me, environ)


SIGNS = ["PMIX_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK", "FLUX_TASK_RANK", "ALPS_APP_PE"]


@pytest.mark.parametrize("name", SIGNS)
def test_other_starters_of_mpi_are_known_by_a_sign(name: str) -> None:
    assert rank_from_environment({name: "0"}) is None
    assert mpi_sign({name: "0", "PATH": "/bin"}) == name
    assert mpi_sign({name: "", "PATH": "/bin"}) == ""


def test_the_local_rank_alone_is_found_in_every_table() -> None:
    for environ, expected in ((TORCHRUN, 1), (STEP, 1), (OPENMPI, 0), (MPICH, 0), (MVAPICH2, 1)):
        assert local_rank_from_environment(environ) == expected
    assert local_rank_from_environment({**OPENMPI, "LOCAL_RANK": "3"}) == 3
    assert local_rank_from_environment(BATCH) is local_rank_from_environment(PMI) is None


NAMES = sorted({*TORCHRUN, *STEP, *OPENMPI, *MPICH, *MVAPICH2, *SIGNS})


@given(
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["0", "1", "2", "4", "", "x", "-1"]) | st.text(max_size=3))
)
def test_any_environment_gives_a_rank_none_or_an_error_of_ours(environ: dict[str, str]) -> None:
    try:
        found = rank_from_environment(environ)
        refuse_alone(found or SINGLE, environ)
        refuse_alone(found or ASKED, environ)
        local_rank_from_environment(environ)
    except HpcdsError:
        return
    if found is not None:
        assert 0 <= found.rank < found.world_size
        assert 0 <= found.local_rank < (found.local_world_size or found.world_size)
        assert found.placed or found.local_rank == 0
