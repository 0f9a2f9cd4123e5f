"""Which hosts a launch takes, with which devices, and what starts its ranks: by hostfile, by Slurm, on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.errors import ConfigError, HpcdsError
from hpc_ds.launch.plan import HostPlan, LaunchPlan
from hpc_ds.launch.resources import Resources, Wish, choose, is_this_machine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NONE = {"CUDA_VISIBLE_DEVICES": ""}
FOUR = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
UUIDS = {"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b,GPU-c"}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "4",
    **FOUR,
}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "4",
}
WIDE_STEP = {
    **STEP,
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MACHINES = "absent1.invalid slots=4\nabsent2.invalid slots=2\n"

# environment, wish, and: launcher, then a host a word as name:ranks or name:ranks=devices
HERE = {
    "no device": (NONE, Wish(), "local localhost:1"),
    "no device, N ranks": (NONE, Wish(num_gpus=3), "local localhost:3"),
    "no device, one node": (NONE, Wish(num_nodes=1, num_gpus=2), "local localhost:2"),
    "all devices are left as they are": (FOUR, Wish(), "local localhost:4"),
    "as many as there are": (FOUR, Wish(num_gpus=4), "local localhost:4"),
    "some are picked out of the visible": (FOUR, Wish(num_gpus=2), "local localhost:2=4,5"),
    "included": (FOUR, Wish(include="localhost:1,3"), "local localhost:2=5,7"),
    "all included": (FOUR, Wish(include="localhost"), "local localhost:4"),
    "excluded": (FOUR, Wish(exclude="localhost:0"), "local localhost:3=5,6,7"),
    "ids that are no numbers": (UUIDS, Wish(include="localhost:0,1"), "local localhost:2=GPU-a,MIG-b"),
    "multi by force": (FOUR, Wish(force_multi=True), "ssh localhost:4=4,5,6,7"),
    "multi by force, no device": (NONE, Wish(force_multi=True, launcher="openmpi", num_gpus=2), "openmpi localhost:2="),
    "another launcher is of no use": (FOUR, Wish(launcher="pdsh"), "local localhost:4"),
    "no ssh": (FOUR, Wish(only_node=0), "local localhost:4"),
}
BY_SLURM = {
    "batch": (BATCH, Wish(), "slurm n1:4 n2:4"),
    "batch, some": (BATCH, Wish(num_nodes=1, num_gpus=2), "slurm n1:2"),
    "batch, filtered": (BATCH, Wish(include="n2:0,1@n1"), "slurm n1:4 n2:2"),
    "batch, no GPU": ({**BATCH, "SLURM_GPUS_ON_NODE": "0"}, Wish(), "slurm n1:1 n2:1"),
    "batch, no GPU, N ranks": ({**BATCH, "SLURM_GPUS_ON_NODE": "0"}, Wish(num_gpus=3), "slurm n1:3 n2:3"),
    "batch, ssh": (BATCH, Wish(launcher="ssh", include="n2:0,2"), "ssh n2:2=0,2"),
    "batch, local": (BATCH, Wish(launcher="local", include="localhost:1,3"), "local localhost:2=5,7"),
    "batch, no ssh": (BATCH, Wish(only_node=1), "local n1:4 n2:4"),
    "batch script with the id of its step": ({**BATCH, "SLURM_STEP_ID": "4294967291"}, Wish(), "slurm n1:4 n2:4"),
    "a step of one task": ({**STEP, **FOUR}, Wish(), "local localhost:4"),
    "a step of one task, the first": ({**STEP, **FOUR}, Wish(num_gpus=2), "local localhost:2"),
    "a step of one task, no device": ({**STEP, **NONE}, Wish(num_gpus=2), "local localhost:2"),
    "a step of one task, slurm": ({**STEP, **FOUR}, Wish(launcher="slurm"), "slurm n1:4"),
    "a step of several tasks, no ssh": ({**WIDE_STEP, **FOUR}, Wish(only_node=1), "local n1:4 n2:4"),
    "a step of several tasks, no device": (
        {**WIDE_STEP, **NONE, "SLURM_GPUS_ON_NODE": "0"},
        Wish(only_node=1, num_gpus=3),
        "local n1:3 n2:3",
    ),
}
BY_HOSTFILE = {
    "several": (MACHINES, NONE, Wish(), "ssh absent1.invalid:4 absent2.invalid:2"),
    "filtered": (MACHINES, FOUR, Wish(include="absent1.invalid:0,3"), "ssh absent1.invalid:2=0,3"),
    "another launcher": (MACHINES, NONE, Wish(launcher="pdsh"), "pdsh absent1.invalid:4 absent2.invalid:2"),
    "a launcher that binds": (
        MACHINES,
        NONE,
        Wish(launcher="slurm", num_gpus=2),
        "slurm absent1.invalid:2 absent2.invalid:2",
    ),
    "no ssh": (MACHINES, NONE, Wish(only_node=1), "local absent1.invalid:4 absent2.invalid:2"),
    "no ssh, some devices of here": (
        MACHINES,
        FOUR,
        Wish(only_node=0, exclude="absent1.invalid:0,1@absent2.invalid:0"),
        "local absent1.invalid:2=6,7 absent2.invalid:1=1",
    ),
    "this machine": ("localhost slots=2", NONE, Wish(), "local localhost:2"),
    "this machine by its address": ("127.0.0.1 slots=4", FOUR, Wish(include="127.0.0.1:3"), "local 127.0.0.1:1=7"),
    "this machine by force": ("localhost slots=2", NONE, Wish(force_multi=True, launcher="pdsh"), "pdsh localhost:2="),
    "this machine and another": ("localhost slots=1\nabsent slots=1", NONE, Wish(), "ssh localhost:1 absent:1"),
    "this machine as somebody": ("me@localhost slots=1", NONE, Wish(), "ssh me@localhost:1"),
    "in its allocation": ("n2 slots=2\nn1 slots=1", BATCH, Wish(), "slurm n2:2 n1:1"),
    "outside of its allocation": ("n2 slots=2\nn3 slots=1", BATCH, Wish(), "ssh n2:2 n3:1"),
    "in half an allocation": ("n2 slots=2\nn3 slots=1", {"SLURM_JOB_ID": "7"}, Wish(), "ssh n2:2 n3:1"),
}

REFUSED = {
    "both filters": (NONE, Wish(include="a", exclude="b"), "--include and --exclude: both are given; use one of them"),
    "filter and number": (NONE, Wish(include="a", num_gpus=1), "--num_gpus: does not go with --include or --exclude"),
    "exclude and number": (NONE, Wish(exclude="a", num_nodes=1), "--num_nodes: does not go with"),
    "a launcher nobody knows": (
        NONE,
        Wish(launcher="io"),
        "--launcher 'io': not one that is known; use local, ssh, pdsh",
    ),
    "mvapich": (NONE, Wish(launcher="mvapich"), "--launcher 'mvapich': not one that is known; use mpich or slurm"),
    "slurm without Slurm": (NONE, Wish(launcher="slurm"), "--launcher 'slurm': there is no Slurm allocation here"),
    "more nodes": (NONE, Wish(num_nodes=2), "--num_nodes 2: there is one host; give a hostfile"),
    "more devices": (FOUR, Wish(num_gpus=5), "--num_gpus 5: host 'localhost' has 4"),
    "more ranks than anybody wants": (NONE, Wish(num_gpus=10**9), "--num_gpus 1000000000: host 'localhost' has 65536"),
    "no ranks": (NONE, Wish(num_gpus=0), "--num_gpus 0: not a number of any use"),
    "another host": (FOUR, Wish(include="n1"), "--include 'n1', column 1: no host 'n1'; there are localhost"),
    "no such node": (NONE, Wish(only_node=1), "--node_rank 1: there is one node; count from 0"),
    "a step of several tasks": (WIDE_STEP, Wish(), "SLURM_STEP_NUM_TASKS '2': srun has started 2 tasks, and each"),
    "a step of several tasks, local": (WIDE_STEP, Wish(launcher="local"), "SLURM_STEP_NUM_TASKS '2'"),
    "not the first in a step": (
        {**STEP, **FOUR},
        Wish(include="localhost:1,2"),
        "slots 1,2 of host 'localhost': Slurm binds devices, and only the first of them can be taken",
    ),
    "more than the GPUs of an allocation": (BATCH, Wish(num_gpus=5), "--num_gpus 5: host 'n1' has 4"),
    "more ranks than Slurm has": (
        {**BATCH, "SLURM_GPUS_ON_NODE": "0"},
        Wish(num_gpus=65537),
        "SLURM_JOB_NODELIST 'n[1-2]': slots=65537 for host 'n1'; give 1 to 65536",
    ),
    "not the first of an allocation": (BATCH, Wish(exclude="n2:0"), "slots 1,2,3 of host 'n2': Slurm binds devices"),
    "local for several": (BATCH, Wish(launcher="local", num_nodes=2), "--num_nodes 2: there is one host"),
}
REFUSED_HOSTFILE = {
    "empty": ("", NONE, Wish(), "no hosts in it"),
    "local for several": (MACHINES, NONE, Wish(launcher="local"), "--launcher 'local': there are 2 hosts; use ssh"),
    "local for another": (
        "absent.invalid slots=1",
        NONE,
        Wish(launcher="local"),
        "'absent.invalid' is another machine",
    ),
    "no such node": (MACHINES, NONE, Wish(only_node=2), "--node_rank 2: there are 2 nodes; count from 0"),
    "more slots than this machine has": (
        "localhost slots=8",
        FOUR,
        Wish(),
        "slot 7 of host 'localhost': this machine has 4 visible devices (CUDA_VISIBLE_DEVICES); use fewer slots",
    ),
    "several tasks": (MACHINES, WIDE_STEP, Wish(), "SLURM_STEP_NUM_TASKS '2'"),
    "too many ranks": (
        "n[1-65536] slots=65536",
        NONE,
        Wish(),
        "ranks 4294967296: more than 1048576 in one launch; take fewer hosts or slots",
    ),
}


def written(resources: Resources) -> str:
    """The launcher, and the hosts in short."""
    words = [resources.launcher]
    for host in resources.hosts:
        devices = "" if host.devices is None else f"={','.join(host.devices)}"
        words.append(f"{host.name}:{host.ranks}{devices}")
    return " ".join(words)


def choose_by(text: str, wish: Wish, environ: Mapping[str, str], folder: Path) -> Resources:
    (folder / "hostfile").write_text(text)
    return choose(wish._replace(hostfile=str(folder / "hostfile")), environ)


@pytest.mark.parametrize("case", {**HERE, **BY_SLURM})
def test_what_is_taken(case: str, tmp_path: Path) -> None:
    environ, wish, expected = {**HERE, **BY_SLURM}[case]
    assert written(choose(wish, environ, str(tmp_path / "absent"))) == expected


@pytest.mark.parametrize("case", BY_HOSTFILE)
def test_what_is_taken_of_a_hostfile(case: str, tmp_path: Path) -> None:
    text, environ, wish, expected = BY_HOSTFILE[case]
    assert written(choose_by(text, wish, environ, tmp_path)) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    environ, wish, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        choose(wish, environ, str(tmp_path / "absent"))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("case", REFUSED_HOSTFILE)
def test_what_cannot_be_of_a_hostfile_is_refused(case: str, tmp_path: Path) -> None:
    text, environ, wish, message = REFUSED_HOSTFILE[case]
    with pytest.raises(ConfigError) as caught:
        choose_by(text, wish, environ, tmp_path)
    assert message in str(caught.value)


def test_a_hostfile_that_was_named_must_be_there(tmp_path: Path) -> None:
    """DeepSpeed goes on with this machine alone, and its user finds out hours later."""
    with pytest.raises(ConfigError, match=r"hostfile '.*absent': No such file or directory; name one that can be read"):
        choose(Wish(hostfile=str(tmp_path / "absent")), NONE)
    with pytest.raises(ConfigError, match="Is a directory"):
        choose(Wish(hostfile=str(tmp_path)), NONE)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text; name one"):
        choose(Wish(hostfile=str(tmp_path / "binary")), NONE)


def test_a_standing_hostfile_counts_where_nothing_else_is_said(tmp_path: Path) -> None:
    standing = tmp_path / "hostfile"
    standing.write_text(MACHINES)
    assert written(choose(Wish(num_nodes=1), NONE, str(standing))) == "ssh absent1.invalid:4"
    assert written(choose(Wish(launcher="local"), NONE, str(standing))) == "local localhost:1"
    assert written(choose(Wish(), BATCH, str(standing))) == "slurm n1:4 n2:4"


def test_ranks_go_through_the_hosts(tmp_path: Path) -> None:
    hosts = choose_by("a slots=3\nb slots=1\nc slots=2\n", Wish(exclude="a:1"), NONE, tmp_path).hosts
    assert hosts == (
        HostPlan("a", 0, ("0", "2"), 2, 0),
        HostPlan("b", 2, None, 1, 1),
        HostPlan("c", 3, None, 2, 2),
    )


def test_what_a_person_should_know_is_noted() -> None:
    assert choose(Wish(), NONE).notes == (
        "no GPU is visible here: one rank is started; --num_gpus N starts N ranks without GPUs",
    )
    assert choose(Wish(launcher="openmpi"), FOUR).notes == (
        "one host, which is this machine: its ranks are started locally; --force_multi uses openmpi",
    )
    assert choose(Wish(), FOUR).notes == ()


def test_hip_is_told_of_the_devices_too() -> None:
    environ = {"HIP_VISIBLE_DEVICES": "2,3"}
    taken = choose(Wish(include="localhost:1"), environ)
    assert (taken.hosts[0].devices, taken.env) == (("3",), {"HIP_VISIBLE_DEVICES": "3"})


def test_this_machine_is_known_by_its_names_and_addresses() -> None:
    assert all(map(is_this_machine, ["localhost", "127.0.0.1", "127.0.0.9", "::1", os.uname().nodename]))
    assert not any(map(is_this_machine, ["absent.invalid", "192.0.2.1", "me@localhost", "x" * 300, "a..b", "-"]))


def test_ranks_are_told_who_they_are() -> None:
    hosts = (HostPlan("a", 0, None, 2, 0), HostPlan("b", 2, ("4", "GPU-x", "6"), 3, 1))
    plan = LaunchPlan(hosts, ("python", "-u", "train.py", "--lr"), "/", local_rank_at=3)
    assert plan.world_size == 5
    assert plan.rank_environment(hosts[0], 1) == {
        "RANK": "1", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
        "GROUP_RANK": "0", "CROSS_RANK": "0", "CROSS_SIZE": "2",
    }  # fmt: skip
    told = plan.rank_environment(hosts[1], 2)
    assert (told["RANK"], told["GROUP_RANK"], told["CUDA_VISIBLE_DEVICES"]) == ("4", "1", "4,GPU-x,6")
    assert plan.rank_command(2) == ("python", "-u", "train.py", "--local_rank=2", "--lr")
    assert LaunchPlan(hosts, ("true",), "/").rank_command(1) == ("true",)
    sourced = LaunchPlan(hosts, ("true",), "/", venv_script="activate").rank_command(0)
    assert (sourced[:2], sourced[3:]) == (("bash", "-c"), ("./activate", "true"))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "SLURM_JOB_ID": st.just("7"),
            "SLURM_JOB_NODELIST": st.sampled_from(["n[1-2]", "n1", "n[", "", "n[1-2],n2"]),
            "SLURM_JOB_NUM_NODES": st.sampled_from(["1", "2", "x"]),
            "SLURM_TASKS_PER_NODE": st.text(alphabet="12x(),", max_size=6),
            "SLURM_STEP_TASKS_PER_NODE": st.text(alphabet="12x(),", max_size=6),
            "SLURM_STEP_ID": st.sampled_from(["0", "4294967291", "x"]),
            "SLURM_STEP_NODELIST": st.sampled_from(["n[1-2]", "n1", "n["]),
            "SLURM_STEP_NUM_TASKS": st.sampled_from(["1", "2", ""]),
            "SLURM_GPUS_ON_NODE": st.text(alphabet="012:a,", max_size=4),
            "SLURM_GPUS_PER_TASK": st.text(alphabet="012:a,", max_size=4),
            "SLURM_HET_SIZE": st.sampled_from(["1", "2", "x", ""]),
            "SLURM_JOB_NODELIST_HET_GROUP_1": st.sampled_from(["m1", "m[", "n1"]),
            "SLURM_TASKS_PER_NODE_HET_GROUP_1": st.sampled_from(["1", "2(x1)", "y"]),
            "CUDA_VISIBLE_DEVICES": st.text(alphabet="01,-G", max_size=5),
        },
    ),
    st.builds(
        Wish,
        include=st.sampled_from(["", "n1", "n2:0", "localhost:0"]),
        num_gpus=st.sampled_from([None, 1, 2, 0]),
        num_nodes=st.sampled_from([None, 1, 2]),
        launcher=st.sampled_from([None, "local", "slurm", "ssh"]),
        only_node=st.sampled_from([None, 0, 1]),
        force_multi=st.booleans(),
    ),
)
def test_any_environment_is_taken_or_refused(environ: dict[str, str], wish: Wish) -> None:
    try:
        taken = choose(wish, environ, "/absent")
    except HpcdsError:
        return
    firsts = [host.first_rank for host in taken.hosts]
    assert firsts == [sum(host.ranks for host in taken.hosts[:place]) for place in range(len(taken.hosts))]
    assert all(host.ranks > 0 for host in taken.hosts)
