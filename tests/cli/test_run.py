"""``hpcds run``: its command line, what it warns of, and what ``--dry-run`` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.cli.main import app
from hpc_ds.cli.run import run
from hpc_ds.cli.run_options import OPTIONS, help_text, parse, swallowed
from hpc_ds.errors import ConfigError, HpcdsError

if TYPE_CHECKING:
    from pathlib import Path

LINES = {
    "train.py": {},
    "--num_gpus 2 --num_nodes=1 train.py": {"num_gpus": 2, "num_nodes": 1},
    "--num-gpus 2 --master-port=0 train.py": {"num_gpus": 2, "master_port": 0},
    "--num_accelerators 2 train.py": {"num_gpus": 2},
    "-H hosts -i a:0 train.py": {"hostfile": "hosts", "include": "a:0"},
    "-Hhosts -e=b -q train.py": {"hostfile": "hosts", "exclude": "b", "quiet": True},
    "-qi a train.py": {"quiet": True, "include": "a"},
    "--num_gpus 2 --num_gpus 3 train.py": {"num_gpus": 3},
    "--num_gpus -1 train.py": {"num_gpus": -1},
    "--env A=1 --env B=2 --env-file f train.py": {"env": ["A=1", "B=2"], "env_file": ["f"]},
    "--host hosts --save --inc a train.py": {"hostfile": "hosts", "save_pid": True, "include": "a"},
    "--as-deepspeed --num_gpus 2 train.py": {"as_deepspeed": True, "num_gpus": 2},
    "--launcher_args -v --module -- train.py": {"launcher_args": "-v", "module": True},
    "--grace 2.5 --dry-run --json train.py": {"grace": 2.5, "dry_run": True, "json": True},
    "--include= --enable_each_rank_log None train.py": {"include": "", "enable_each_rank_log": "None"},
}
NOT_LINES = {
    "--nodes 2 train.py": "--nodes: no such option; options of the script go behind the script",
    "-x train.py": "-x: no such option; hpcds run --help lists them",
    "--num 2 train.py": "--num: may be --num_nodes, --num_gpus; write it out",
    "--num_gpus": "--num_gpus: its value is missing; write --num_gpus N",
    "--num_gpus two train.py": "--num_gpus 'two': not a whole number; write one",
    "--num_gpus 2.0 train.py": "--num_gpus '2.0': not a whole number",
    f"--num_gpus {'9' * 5000} train.py": "not a whole number",
    "--quiet=1 train.py": "--quiet '1': takes no value; write --quiet alone",
    "--grace soon train.py": "--grace 'soon': not a number of seconds",
    "--grace -1 train.py": "--grace '-1': not a number of seconds",
    "--grace nan train.py": "--grace 'nan': not a number of seconds",
}
REFUSED = {
    "": "script: missing; write hpcds run [OPTIONS] SCRIPT [ARGS]",
    "--autotuning run train.py": "--autotuning: not supported; DeepSpeed's autotuner is not here",
    "--elastic_training train.py": "--elastic_training: not supported; DeepSpeed has removed it",
    "--module --no_python train.py": "--module and --no_python: both are given; use one of them",
    "--json train.py": "--json: is for --dry-run; add that, or leave it out",
    "--log_level loud train.py": "--log_level 'loud': not a level; use debug, info",
    "--no_ssh train.py": "--no_ssh: which of the hosts is this; add --node_rank N",
    "--no_ssh --node_rank 0 --master_port 0 train.py": "--master_port 0: hosts with --no_ssh cannot agree",
    "--master_port 65536 train.py": "--master_port 65536: not a port; give 0 to 65535",
    "--ssh_port 0 train.py": "--ssh_port 0: not a port; give 1 to 65535",
    "absent.py": "script 'absent.py': no such file; name one, or use --module or --no_python",
    "--launcher_args '\"a' train.py": "--launcher_args '\"a': no closing quotation; quote it as a shell does",
    "--enable_each_rank_log train.py train.py": "--enable_each_rank_log 'train.py': not a folder; name one",
    "--env A train.py": "--env 'A': is not a variable",
    "-H absent train.py": "hostfile 'absent': No such file or directory",
    "--num_gpus 2 -i localhost train.py": "--num_gpus: does not go with --include or --exclude",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a script and a hostfile, on a machine without devices."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/p")
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "hosts").write_text("w1.invalid slots=2\nw2.invalid slots=4\n")
    return tmp_path


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``--dry-run --json`` says of a command line."""
    assert run(["--dry-run", "--json", *words]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


@pytest.mark.parametrize("text", LINES)
def test_options_are_those_of_deepspeed(text: str) -> None:
    line = parse(text.split())
    assert line.values == LINES[text]
    assert (line.script, line.args) == ("train.py", [])


@pytest.mark.parametrize("text", NOT_LINES)
def test_a_wrong_option_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text.split())
    assert NOT_LINES[text] in str(caught.value)


def test_all_that_follows_the_script_goes_to_it() -> None:
    behind = ["--", "--num_gpus", "3", "", "-q", "--lr=1", "--", "a b\n", "--help"]
    assert parse(["-q", "train.py", *behind]) == ({"quiet": True}, "train.py", behind)
    assert swallowed([*behind, "--master-port=3", "--num_gpus", "--deepspeed", "--json"]) == [
        "--num_gpus",
        "--master-port",
    ]


@given(st.lists(st.text(alphabet="-=_nuhqHe \0g1.", max_size=12), max_size=4))
def test_any_line_is_taken_or_refused(words: list[str]) -> None:
    try:
        line = parse(words)
    except HpcdsError:
        return
    assert list(line.args) == words[len(words) - len(line.args) :]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "-h"]) == 0
    text = capsys.readouterr().out
    assert text == help_text()
    for option in OPTIONS:
        assert f"--{option.name}" in text or f"--{option.name.replace('_', '-')}" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_started_is_refused(text: str, here: Path) -> None:
    import shlex

    with pytest.raises(ConfigError) as caught:
        run(shlex.split(text))
    assert str(caught.value).startswith(REFUSED[text])


def test_the_plan_of_this_machine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["--num_gpus", "2", "--env", "A=b c", "--env", "MY_TOKEN=x", "train.py", "--lr", "1e-3"], capsys)
    python = [sys.executable, "-u", "train.py"]
    assert plan == {
        "launcher": "local",
        "launcher_args": [],
        "world_size": 2,
        "cwd": str(here),
        "master_addr": None,
        "master_port": 0,
        "environment": {"PYTHONPATH": f"{here}:/p", "A": "b c", "MY_TOKEN": "***"},
        "hosts": [
            {
                "name": "localhost",
                "node_rank": 0,
                "devices": None,
                "ranks": [
                    {
                        "rank": rank,
                        "environment": {
                            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                            "LOCAL_SIZE": "2", "GROUP_RANK": "0", "CROSS_RANK": "0", "CROSS_SIZE": "1",
                        },
                        "command": [*python, f"--local_rank={rank}", "--lr", "1e-3"],
                    }
                    for rank in (0, 1)
                ],
            }
        ],
        "notes": [],
    }  # fmt: skip


def test_the_plan_of_several_hosts(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("MINE", "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (here / ".deepspeed_env").write_text("# mine\n\nNCCL_IB_HCA=mlx5_0,mlx5_1\nNCCL_DEBUG=WARN\n")
    plan = planned(
        ["-H", "hosts", "-e", "w2.invalid:0,1", "--launcher", "PDSH", "--launcher_args", "-f '1 0'", "train.py"], capsys
    )
    assert (plan["launcher"], plan["launcher_args"], plan["world_size"]) == ("pdsh", ["-f", "1 0"], 4)
    expected = {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_DEBUG": "WARN", "HF_TOKEN": "***"}
    assert expected.items() <= plan["environment"].items()
    assert plan["environment"]["PATH"] == os.environ["PATH"]
    assert not {"MINE", "HOME", "CUDA_VISIBLE_DEVICES"} & set(plan["environment"])
    assert [host["devices"] for host in plan["hosts"]] == [None, ["2", "3"]]
    last = plan["hosts"][1]["ranks"][-1]
    assert (last["rank"], last["environment"]["LOCAL_RANK"]) == (3, "1")
    assert last["environment"]["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_one_host_of_several_without_ssh(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["-H", "hosts", "--no_ssh", "--node_rank", "1", "train.py"], capsys)
    assert (plan["launcher"], plan["master_addr"], plan["master_port"]) == ("local", "w1.invalid", 29500)
    assert [(host["name"], host["ranks"][0]["rank"]) for host in plan["hosts"]] == [("w2.invalid", 2)]
    plan = planned(["--no_ssh", "--node_rank=0", "--master_addr", "m", "--master_port", "7", "train.py"], capsys)
    assert (plan["master_addr"], plan["master_port"]) == ("m", 7)


COMMANDS = {
    "--module pkg.train a": [sys.executable, "-u", "-m", "pkg.train", "--local_rank=0", "a"],
    "--no_python ./prog a": ["./prog", "--local_rank=0", "a"],
    "--no_local_rank train.py a": [sys.executable, "-u", "train.py", "a"],
    "--no_python --no_local_rank echo -n": ["echo", "-n"],
}


@pytest.mark.parametrize("text", COMMANDS)
def test_what_a_rank_runs(text: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["--num_gpus=1", *text.split()], capsys)
    assert plan["hosts"][0]["ranks"][0]["command"] == COMMANDS[text]


WARNED = {
    "train.py --master_port 3 --num-gpus=2": "--master_port, --num-gpus: stands behind 'train.py' and goes to it",
    "--node_rank 0 train.py": "--node_rank: counts only with --no_ssh; ignored",
    "--bind_core_list 0 train.py": "--bind_core_list: counts only with --bind_cores_to_rank; ignored",
    "--launcher_args -v train.py": "--launcher_args: ranks are started here, without a launcher; ignored",
    "train.py": "no GPU is visible here: one rank is started",
}


@pytest.mark.parametrize("text", WARNED)
def test_what_may_surprise_is_said(text: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--dry-run", *text.split()]) == 0
    assert f"hpcds run: {WARNED[text]}" in capsys.readouterr().err
    assert run(["--dry-run", "-q", *text.split()]) == 0
    assert capsys.readouterr().err == ""


def test_a_level_quietens_notes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--dry-run", "--log_level", "warning", "--node_rank", "0", "train.py"]) == 0
    assert capsys.readouterr().err == "hpcds run: --node_rank: counts only with --no_ssh; ignored\n"


def test_the_plan_as_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "-H",
        "hosts",
        "--include",
        "w2.invalid:1@w1.invalid:0,1",
        "--env",
        "A=b c",
        "--env",
        "A_KEY=k",
        "train.py",
        "x y",
    ]
    assert run(["--dry-run", "--launcher_args=-v", *words]) == 0
    text = capsys.readouterr().out
    python = f"{sys.executable} -u train.py"
    told = "LOCAL_WORLD_SIZE=2 LOCAL_SIZE=2 GROUP_RANK=0 CROSS_RANK=0 CROSS_SIZE=2"
    assert text.startswith(f"launcher ssh, 3 ranks on 2 hosts, in {here}\nlauncher_args -v\n")
    assert "\n  A='b c'\n  A_KEY='***'\n" in text
    assert text.endswith(
        "host w1.invalid: ranks 0-1, devices as they are\n"
        f"  RANK=0 WORLD_SIZE=3 LOCAL_RANK=0 {told}\n    {python} --local_rank=0 'x y'\n"
        f"  RANK=1 WORLD_SIZE=3 LOCAL_RANK=1 {told}\n    {python} --local_rank=1 'x y'\n"
        "host w2.invalid: rank 2, devices 1\n"
        "  RANK=2 WORLD_SIZE=3 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 LOCAL_SIZE=1 GROUP_RANK=1 CROSS_RANK=1 CROSS_SIZE=2 "
        f"CUDA_VISIBLE_DEVICES=1\n    {python} --local_rank=0 'x y'\n"
    )


def test_the_app_has_the_verb(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["run", "--dry-run", "--json", "--no-local-rank", "train.py", "--num_gpus", "--", "-x"])
    assert ended.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hosts"][0]["ranks"][0]["command"][2:] == ["train.py", "--num_gpus", "--", "-x"]


FRESH = """
import json, sys
from hpc_ds.cli.entry import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)
"""


def test_nothing_heavy_is_loaded(here: Path) -> None:
    """The ranks wait for whatever the launcher loads."""
    repository = os.path.dirname(os.path.dirname(sys.modules["hpc_ds"].__file__ or ""))  # noqa: PTH120
    environ = {**os.environ, "PYTHONPATH": repository}
    command = [sys.executable, "-c", FRESH, "run", "--dry-run", "-H", "hosts", "train.py"]
    fresh = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    code, loaded = json.loads(fresh.stderr)
    assert code == 0
    assert "hpc_ds.launch.plan" in loaded
    heavy = {"torch", "typer", "pydantic", "pydantic_core", "jinja2", "rich", "click", "numpy", "asyncio", "mpi4py"}
    assert sorted(heavy & set(loaded)) == []


TELLS = """
import json, os, pathlib, sys, time
rank = os.environ["RANK"]
told = {name: os.environ.get(name) for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "A", "B", "MINE", "PYTHONPATH")}
port = int(os.environ["MASTER_PORT"])
left = {path.name: path.read_text() for path in pathlib.Path(os.environ["TMPDIR"]).glob("*.deepspeed")}
pathlib.Path("half-" + rank).write_text(json.dumps([told, sys.argv[1:], os.getcwd(), port, left]))
os.rename("half-" + rank, "rank-" + rank)
while rank == "1" and not os.path.exists("rank-0"):  # else rank 0 is ended before it has said anything
    time.sleep(0.01)
sys.exit(3 if rank == "1" else 0)
"""


def test_ranks_start_and_their_exit_code_is_ours(here: Path) -> None:
    (here / "train.py").write_text(TELLS)
    (here / "tmp").mkdir()
    (here / "file").write_text("A=from, the 'file'\nB=b\n")
    repository = os.path.dirname(os.path.dirname(sys.modules["hpc_ds"].__file__ or ""))  # noqa: PTH120
    environ = {**os.environ, "PYTHONPATH": repository, "TMPDIR": str(here / "tmp"), "MINE": "x"}
    words = ["--num_gpus", "2", "--save_pid", "--env-file", "file", "--env", "B=b\nb", "train.py", "--x", "a b", ""]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "hpc_ds", "run", *words], env=environ, stderr=subprocess.PIPE, text=True
    )
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 3
    assert said.splitlines()[-1] == "hpcds run: rank 1 on localhost: exit code 3"
    assert list((here / "tmp").iterdir()) == []
    ports = set()
    for rank in (0, 1):
        told, args, folder, port, left = json.loads((here / f"rank-{rank}").read_text())
        ports.add(port)
        assert told == {
            "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "A": "from, the 'file'", "B": "b\nb",
            "MINE": "x", "PYTHONPATH": f"{here}:{repository}",
        }  # fmt: skip
        assert args == [f"--local_rank={rank}", "--x", "a b", ""]
        assert folder == str(here)
        assert left == {f"{launcher.pid}.deepspeed": str(launcher.pid)}
    assert len(ports) == 1
