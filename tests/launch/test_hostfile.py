"""Hostfiles: DeepSpeed's form read and written, and the hosts a Slurm environment describes.

The environments are those of real jobs of Slurm 22.05, cut to the variables that matter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.cli.hostfile import hostfile
from hpc_ds.errors import HostfileError, NodeListError
from hpc_ds.launch.hostfile import Host, hosts_from_list, hosts_from_slurm, parse, render, write

if TYPE_CHECKING:
    from pathlib import Path

PARSED = {
    "n1 slots=4\n": "n1:4",
    "n2 slots=4\nn1 slots=2": "n2:4 n1:2",
    "\n# two nodes\n\n  n1\t slots=4  \r\nn2 slots=4": "n1:4 n2:4",
    "n1 slots=4 max_slots=8\nn2 slots=4 # the slow one\nn3 slots=4#new": "n1:4 n2:4 n3:4",
    "gpu[01-03] slots=8": "gpu01:8 gpu02:8 gpu03:8",
    "n1,n[3-4]-ib slots=2": "n1:2 n3-ib:2 n4-ib:2",
    "me@n1 slots=1\n10.0.0.2 slots=1\nfe80::1 slots=1": "me@n1:1 10.0.0.2:1 fe80::1:1",
}

NOT_PARSED = {
    "": "f: no hosts in it; write one 'NAME slots=N' a line",
    "# n1 slots=4\n\n": "f: no hosts in it",
    "n1": "f, line 1: 'n1' is not a host; write 'NAME slots=N'",
    "n1:4": "f, line 1: 'n1:4' is not a host",
    "\nn1 slots = 4": "f, line 2: 'n1 slots = 4' is not a host",
    "n1 SLOTS=4": "f, line 1: 'n1 SLOTS=4' is not a host",
    "n1 gpus slots=4": "f, line 1: 'n1 gpus slots=4' is not a host",
    "n1 slots=": "f, line 1: slots ''; give 1 to 65536",
    "n1 slots=a": "f, line 1: slots 'a'; give",
    "n1 slots=-1": "f, line 1: slots '-1'; give",
    "n1 slots=4x": "f, line 1: slots '4x'; give",
    "n1 slots=0": "f, line 1: slots '0'; give",
    "n1 slots=\N{SUPERSCRIPT TWO}": "f, line 1: slots",
    f"n1 slots={'9' * 5000}": "f, line 1: slots '999",
    "n1 slots=4\n\nn2 slots=4\nn1 slots=4": "f, line 4: host 'n1' twice; it is on line 1 too; give each host one line",
    "n[1-2] slots=4\nn2 slots=4": "f, line 2: host 'n2' twice; it is on line 1 too",
    "n[1,1] slots=4": "f, line 1: host 'n1' twice; it is on line 1 too",
    "n1 slots=1\nn[1- slots=4": "f, line 2: node list 'n[1-', column 2: '[' is never closed",
    "-oProxyCommand=x slots=1": "f, line 1: node list '-oProxyCommand=x', column",
}

NOT_NAMES = ("", "n 1", "n1\n", "#n", "-n", "n[1]", "n1,n2")

BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
# A step on one node of a job on three, with one GPU of the two that the job has on each.
SMALL_STEP = {
    "SLURM_GPUS_ON_NODE": "1",
    "SLURM_GPUS_PER_NODE": "2",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NNODES": "1",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1",
}
# The shell of `salloc -N2 --ntasks-per-node=2 --gpus-per-node=2` with LaunchParameters=use_interactive_step.
INTERACTIVE = {
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_GPUS_PER_NODE": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
FULL_STEP = {
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4,2,1",
    "SLURM_TASKS_PER_NODE": "4,2,1",
}

FROM_SLURM = {
    "batch": (BATCH, "n1:1 n2:1"),
    "batch, unequal tasks": ({**BATCH, "SLURM_TASKS_PER_NODE": "3,1"}, "n1:3 n2:1"),
    "batch, gpus per node": ({**BATCH, "SLURM_GPUS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, "n1:4 n2:4"),
    "batch, typed gpus": ({**BATCH, "SLURM_GPUS_PER_NODE": "a100:4"}, "n1:4 n2:4"),
    "batch, gpus of two types": ({**BATCH, "SLURM_GPUS_PER_NODE": "a100:2,v100:1"}, "n1:3 n2:3"),
    "batch, --gres": ({**BATCH, "SLURM_GPUS_ON_NODE": "2"}, "n1:2 n2:2"),
    "batch, --exclusive has more than it asked": (
        {**BATCH, "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"},
        "n1:1 n2:1",
    ),
    "batch, gpus per task packed unevenly": (
        {**BATCH, "SLURM_TASKS_PER_NODE": "3,1", "SLURM_GPUS_PER_TASK": "a100:2", "SLURM_GPUS_ON_NODE": "6"},
        "n1:6 n2:2",
    ),
    "batch, total that divides": ({**BATCH, "SLURM_GPUS": "8", "SLURM_GPUS_ON_NODE": "4"}, "n1:4 n2:4"),
    "batch, no tasks but gpus": (
        {"SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "2"},
        "n1:2",
    ),
    "batch, no gpus asked": ({**BATCH, "SLURM_GPUS_ON_NODE": "0"}, "n1:1 n2:1"),
    "batch step": ({**BATCH, "SLURM_STEP_ID": "4294967291"}, "n1:1 n2:1"),
    "salloc on one node, a total": (
        {"SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "1", "SLURM_GPUS": "a100:4"},
        "n1:4",
    ),
    "step smaller than its job": (SMALL_STEP, "n1:1"),
    "step smaller than its job, by a total": ({**SMALL_STEP, "SLURM_GPUS": "6"}, "n1:1"),
    "full step": (FULL_STEP, "n1:4 n2:2 n3:1"),
    "full step with gpus": ({**FULL_STEP, "SLURM_GPUS_ON_NODE": "2"}, "n1:2 n2:2 n3:2"),
    "interactive step": (INTERACTIVE, "n1:2 n2:2"),
}

# sbatch of two components; the first one's variables are there without a number too.
HET = {
    **BATCH,
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_TASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
    "SLURM_TASKS_PER_NODE_HET_GROUP_0": "1",
    "SLURM_GPUS_PER_NODE_HET_GROUP_0": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "n[2-3]",
    "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2",
    "SLURM_TASKS_PER_NODE_HET_GROUP_1": "3,1",
}
# `srun --het-group=0,1` in it: one step over all its nodes.
HET_STEP = {
    **HET,
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1,3,1",
}
FROM_SLURM |= {
    "components": (HET, "n1:2 n2:3 n3:1"),
    "components under salloc": ({name: value for name, value in HET.items() if "HET" in name}, "n1:2 n2:3 n3:1"),
    "components by their older name": (
        {name.replace("_HET_GROUP_", "_PACK_GROUP_"): value for name, value in HET.items()},
        "n1:2 n2:3 n3:1",
    ),
    "components, GPUs in the second": ({**HET, "SLURM_GPUS_PER_NODE_HET_GROUP_1": "a100:4"}, "n1:2 n2:4 n3:4"),
    "a step over components": ({**HET_STEP, "SLURM_GPUS_ON_NODE": "0"}, "n1:1 n2:3 n3:1"),
    "one component": ({**BATCH, "SLURM_HET_SIZE": "1"}, "n1:1 n2:1"),
}

NOT_FROM_SLURM = {
    "components on one node": (
        {**HET, "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]"},
        "SLURM_HET_SIZE '2': host 'n1' 2 times",
    ),
    "components that differ": (
        {**HET, "SLURM_TASKS_PER_NODE_HET_GROUP_1": "3"},
        r"SLURM_JOB_NODELIST 'n\[2-3\]', SLURM_JOB_NUM_NODES '2', SLURM_TASKS_PER_NODE '3': they differ",
    ),
    "no number of components": ({**HET, "SLURM_HET_SIZE": "two"}, "SLURM_HET_SIZE 'two': not a number of components"),
    "no job": ({"PATH": "/bin"}, r"SLURM_JOB_NODELIST: not set, .* \(seen: no SLURM_ variable\); give a node list"),
    "half a job": ({"SLURM_JOB_ID": "7"}, r"\(seen: SLURM_JOB_ID\); give a node list"),
    "empty list": ({**BATCH, "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST: not set"),
    "wrong list": ({**BATCH, "SLURM_JOB_NODELIST": "n[1-"}, r"SLURM_JOB_NODELIST: node list 'n\[1-', column 2"),
    "wrong counts": ({**BATCH, "SLURM_TASKS_PER_NODE": "1x2"}, "SLURM_TASKS_PER_NODE: node list '1x2', column 1"),
    "wrong gpus": ({**BATCH, "SLURM_GPUS_PER_NODE": "a100"}, "SLURM_GPUS_PER_NODE 'a100': not a number of GPUs"),
    "fewer counts than nodes": (
        {**BATCH, "SLURM_TASKS_PER_NODE": "4"},
        r"SLURM_JOB_NODELIST 'n\[1-2\]', SLURM_JOB_NUM_NODES '2', SLURM_TASKS_PER_NODE '4': they differ in the number",
    ),
    "more nodes than said": ({**BATCH, "SLURM_JOB_NUM_NODES": "1"}, "SLURM_JOB_NUM_NODES '1'.*: they differ"),
    "step that differs": (
        {**FULL_STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
        "SLURM_STEP_TASKS_PER_NODE '1.x2.': they",
    ),
    "total that does not divide": (
        {**BATCH, "SLURM_GPUS": "5", "SLURM_GPUS_ON_NODE": "4"},
        "SLURM_GPUS '5', SLURM_GPUS_ON_NODE '4': 2 nodes may have unlike numbers of GPUs; ask with --gpus-per-node",
    ),
    "total and nothing else": ({**BATCH, "SLURM_GPUS": "4"}, "SLURM_GPUS '4': 2 nodes may have unlike"),
    "neither tasks nor gpus": ({"SLURM_JOB_NODELIST": "n1"}, "SLURM_TASKS_PER_NODE: not set, nor any of SLURM_GPUS_"),
    "no task on a node": ({**BATCH, "SLURM_TASKS_PER_NODE": "1,0"}, "slots=0 for host 'n2'"),
    "a node twice": ({**BATCH, "SLURM_JOB_NODELIST": "n1,n1"}, "SLURM_JOB_NODELIST 'n1,n1': host 'n1' 2 times"),
    "half a heterogeneous job": (
        {**BATCH, "SLURM_HET_SIZE": "2"},
        "SLURM_JOB_NODELIST_HET_GROUP_1: not set, while SLURM_HET_SIZE '2'",
    ),
}


def hosts(text: str) -> list[Host]:
    pairs = [word.rsplit(":", 1) for word in text.split()]
    return [Host(name, int(slots)) for name, slots in pairs]


@pytest.mark.parametrize(("text", "expected"), PARSED.items())
def test_reads_what_deepspeed_reads(text: str, expected: str) -> None:
    assert parse(text) == hosts(expected)


@pytest.mark.parametrize(("text", "message"), NOT_PARSED.items(), ids=lambda value: str(value)[:30])
def test_a_wrong_line_is_refused_with_its_number(text: str, message: str) -> None:
    with pytest.raises(HostfileError) as caught:
        parse(text, source="f")
    assert str(caught.value).startswith(message)
    assert caught.value.file == "f"


def test_renders_one_host_a_line() -> None:
    assert render([Host("n2", 4), Host("n1", 8)]) == "n2 slots=4\nn1 slots=8\n"


FORMS = {
    "deepspeed": "n2 slots=4\nme@n1 slots=8\n",
    "openmpi": "n2 slots=4\nme@n1 slots=8\n",
    "mpich": "n2:4\nme@n1:8\n",
    "plain": "n2\nme@n1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_renders_what_others_read(form: str) -> None:
    assert render([Host("n2", 4), Host("me@n1", 8)], form) == FORMS[form]


def test_a_form_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        HostfileError, match="form 'slurm': not a form of hostfiles; use deepspeed, openmpi, mpich, plain"
    ):
        render([Host("n1", 1)], "slurm")
    with pytest.raises(HostfileError, match="form 'mpich': 'fe80::1' has a ':', which parts name and number there"):
        render([Host("fe80::1", 1)], "mpich")


@given(st.text(alphabet="n1 slots=0#[]-,@:\n\r\t\x0b\u2028\uff12", max_size=40))
def test_any_text_is_taken_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except HostfileError:
        return
    assert parse(render(found)) == found


@given(
    st.lists(
        st.builds(Host, st.from_regex(r"[a-z0-9_.][a-z0-9_.:@-]{0,8}", fullmatch=True), st.integers(1, 65_536)),
        min_size=1,
        max_size=8,
        unique_by=lambda host: host.name,
    )
)
def test_parse_undoes_render(hosts: list[Host]) -> None:
    assert parse(render(hosts)) == hosts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "hostfile: no hosts in it; name at least one"),
        ([Host("n1", 1), Host("n2", 1), Host("n1", 2)], "hostfile: host 'n1' 2 times; name each host once"),
        ([Host("n1", 0)], "hostfile: slots=0 for host 'n1'; give 1 to 65536"),
        ([Host("n1", 65_537)], "hostfile: slots=65537 for host 'n1'"),
        *[
            ([Host(name, 1)], f"hostfile: {name!r} is not the name of one host")
            for name in ("", "n 1", "#n", "-n", "n[1]")
        ],
    ],
)
def test_what_would_not_be_read_is_not_rendered(bad: list[Host], message: str) -> None:
    with pytest.raises(HostfileError) as caught:
        render(bad)
    assert str(caught.value).startswith(message)


def test_hosts_of_a_list_have_the_same_slots() -> None:
    assert hosts_from_list("gpu[02,01]", 8) == [Host("gpu02", 8), Host("gpu01", 8)]


@pytest.mark.parametrize(
    ("text", "slots", "message"),
    [("n1,n1", 1, "host 'n1' 2 times"), ("", 1, "no hosts in it"), ("n1", 0, "slots=0 for host 'n1'")],
)
def test_a_list_that_makes_no_hostfile_is_refused(text: str, slots: int, message: str) -> None:
    with pytest.raises(HostfileError, match=message):
        hosts_from_list(text, slots)


def test_text_that_is_no_list_is_a_node_list_error() -> None:
    with pytest.raises(NodeListError, match="column 2"):
        hosts_from_list("n[1", 1)


@pytest.mark.parametrize("case", FROM_SLURM)
def test_hosts_of_a_slurm_environment(case: str) -> None:
    environ, expected = FROM_SLURM[case]
    assert hosts_from_slurm(environ) == hosts(expected)


@pytest.mark.parametrize("case", NOT_FROM_SLURM)
def test_an_environment_that_does_not_agree_is_refused_by_its_names(case: str) -> None:
    environ, message = NOT_FROM_SLURM[case]
    with pytest.raises(HostfileError, match=message):
        hosts_from_slurm(environ)


def test_given_slots_replace_what_slurm_says() -> None:
    environ = {**BATCH, "SLURM_GPUS": "5", "SLURM_GPUS_ON_NODE": "4"}
    assert hosts_from_slurm(environ, slots=2) == hosts("n1:2 n2:2")


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("old and longer than the new one\n")
    write(path, "n1 slots=1\n")
    assert path.read_text() == "n1 slots=1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_write_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "hostfile")
    write(tmp_path / "link", "n1 slots=1\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "hostfile").read_text() == "n1 slots=1\n"


def test_write_names_what_is_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match=r"no folder '.*/absent'; make it first"):
        write(tmp_path / "absent" / "hostfile", "")
    with pytest.raises(HostfileError, match="not a regular file; give another name"):
        write(tmp_path, "")
    with pytest.raises(HostfileError, match="File name too long; give a file in a folder you can write"):
        write(tmp_path / ("n" * 250), "")


def test_command_prints_a_hostfile(capsys: pytest.CaptureFixture[str]) -> None:
    hostfile("n[1-2]")
    hostfile("n3", slots=4)
    assert capsys.readouterr().out == "n1 slots=1\nn2 slots=1\nn3 slots=4\n"


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    hostfile("n[1-2]", slots=4, json_output=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "n1", "slots": 4}, {"name": "n2", "slots": 4}]


def test_command_writes_a_file_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostfile("n1", form="mpich", output=tmp_path / "forms")
    assert (tmp_path / "forms").read_text() == "n1:1\n"
    hostfile("n1", output=tmp_path / "hostfile")
    assert (tmp_path / "hostfile").read_text() == "n1 slots=1\n"
    assert capsys.readouterr().out == ""


def test_command_has_the_options_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    app.command("hostfile")(hostfile)
    app(["n[1-2]", "--slots", "4", "--json"], standalone_mode=False)
    app(["n3", "--form", "plain"], standalone_mode=False)
    printed, plain = capsys.readouterr().out.splitlines()
    assert json.loads(printed) == [{"name": "n1", "slots": 4}, {"name": "n2", "slots": 4}]
    assert plain == "n3"


def test_command_reads_the_slurm_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SMALL_STEP.items():
        monkeypatch.setenv(name, value)
    hostfile()
    hostfile(slots=3)
    assert capsys.readouterr().out == "n1 slots=1\nn1 slots=3\n"


def test_command_outside_slurm_asks_for_a_list() -> None:
    with pytest.raises(HostfileError, match="give a node list"):
        hostfile()


def test_command_loads_neither_torch_nor_pydantic() -> None:
    program = (
        "import sys; from hpc_ds.cli.hostfile import hostfile; hostfile('n1');"
        "sys.exit(bool({'torch', 'pydantic', 'mpi4py'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
