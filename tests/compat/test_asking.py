"""The ways to ask for the name ``deepspeed``: each leaves the same in the environment, and nothing where nobody asked."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Runs

from hpc_ds.cli.entry import main
from hpc_ds.cli.run import run
from hpc_ds.compat.environment import (
    in_front,
    variables_of_the_name,
    variables_of_the_rank,
    variables_of_the_startup,
)
from hpc_ds.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COMPAT = REPOSITORY / "hpc_ds" / "compat"
WRAPPER = [sys.executable, "-m", "hpc_ds.compat"]
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}

# What a program that was asked to run says of itself.
TELL = """
import importlib.metadata, json, os, shutil, sys
import deepspeed
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "HPCDS_PYTHON")
print(json.dumps({
    "package": deepspeed.__file__, "version": importlib.metadata.version("deepspeed"), "argv": sys.argv[1:],
    "commands": [shutil.which("deepspeed"), shutil.which("ds")], "torch": "torch" in sys.modules,
    "hooked": any(type(finder).__name__ == "HpcdsHook" for finder in sys.meta_path),
    "environ": {name: os.environ[name] for name in names if name in os.environ},
}))
"""


def told(*command: str, **environ: str) -> dict[str, Any]:
    done = said(*command, **environ)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def said(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    around = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **environ}
    return subprocess.run(command, env=around, capture_output=True, text=True, check=False)


def check(found: dict[str, Any]) -> None:
    """That the name means hpc_ds there, for this process and for what it starts."""
    assert found["package"] == str(COMPAT / "path" / "deepspeed" / "__init__.py")
    assert found["version"].endswith("+hpcds")
    assert found["commands"] == [str(COMPAT / "bin" / "deepspeed"), str(COMPAT / "bin" / "ds")]
    assert (found["hooked"], found["torch"], found["environ"]["HPCDS_PYTHON"]) == (True, False, sys.executable)


def test_a_program_that_is_wrapped_finds_it() -> None:
    found = told(*WRAPPER, sys.executable, "-c", TELL, "a b", "--x", "")
    check(found)
    assert found["argv"] == ["a b", "--x", ""]
    assert set(found["environ"]) == {"HPCDS_PYTHON"}


def test_a_script_that_activates_it_finds_it() -> None:
    twice = "import hpc_ds.compat\nhpc_ds.compat.activate()\nhpc_ds.compat.activate()\n"
    check(told(sys.executable, "-c", twice + TELL))
    below = f"{twice}import subprocess, sys\nsubprocess.run([sys.executable, '-c', {TELL!r}], check=True)\n"
    check(told(sys.executable, "-c", below))


def test_where_both_are_there_each_is_found_where_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("")
    (tmp_path / "deepspeed-0.19.8.dist-info").mkdir()
    (tmp_path / "deepspeed-0.19.8.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.19.8\n")
    path = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    theirs = told(sys.executable, "-c", f"import hpc_ds, hpc_ds.compat\n{TELL}", PYTHONPATH=path)
    assert (theirs["package"], theirs["version"]) == (str(tmp_path / "deepspeed" / "__init__.py"), "0.19.8")
    check(told(*WRAPPER, sys.executable, "-c", TELL, PYTHONPATH=path))
    check(told(sys.executable, "-c", f"import hpc_ds.compat\nhpc_ds.compat.activate()\n{TELL}", PYTHONPATH=path))


def test_a_real_one_that_is_loaded_stays(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("")
    late = "import deepspeed, hpc_ds.compat\ntry:\n hpc_ds.compat.activate()\nexcept hpc_ds.ConfigError as error:\n print(error)\n"
    done = said(sys.executable, "-c", late, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert done.stdout.startswith(
        f"deepspeed: the package at '{tmp_path}/deepspeed.py' is imported already; call hpc_ds"
    )


@pytest.mark.parametrize("shell", ["sh", "bash", pytest.param("fish", marks=pytest.mark.fish)])
def test_a_shell_that_reads_our_lines_finds_it(shell: str, tmp_path: Path) -> None:
    """Also where a folder has a name that a shell would read."""
    odd = tmp_path / "a  'b' \\ $HOME \"`x`"
    odd.mkdir()
    (tmp_path / "tell.py").write_text(TELL)
    of_shell = ["--shell", "fish"] if shell == "fish" else []
    lines = said(
        sys.executable, "-m", "hpc_ds", "compat", *of_shell, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{odd}"
    ).stdout
    (tmp_path / "lines").write_text(lines)
    program = (
        f". {tmp_path}/lines; . {tmp_path}/lines; {shlex.quote(sys.executable)} {tmp_path}/tell.py; printenv PYTHONPATH"
    )
    done = said(shell, "-c", program)
    found, path = done.stdout.splitlines()
    check(json.loads(found))
    assert path.split(os.pathsep) == [str(COMPAT / "path"), str(COMPAT / "startup"), str(REPOSITORY), str(odd)]


def test_a_shell_that_is_not_known_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hpcds", "compat", "--shell", "csh"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "hpcds: --shell 'csh': not a shell whose lines are known; use sh or fish\n"


NOT_RUN = {
    (): (2, "program: missing; write python -m hpc_ds.compat PROGRAM [ARGS]"),
    ("no-such-program", "x"): (127, "program 'no-such-program': not found; give its path, or have it on PATH"),
    ("./none",): (127, "program './none': not found"),
    ("/",): (126, "program '/': cannot be run: Permission denied; name one that can"),
    ("",): (126, "program '': cannot be run: "),
}


@pytest.mark.parametrize("words", NOT_RUN)
def test_a_program_that_cannot_be_run_is_one_line(words: tuple[str, ...]) -> None:
    code, line = NOT_RUN[words]
    done = said(*WRAPPER, *words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)
    assert done.stderr.startswith(f"hpc_ds.compat: {line}")


def test_the_exit_code_is_the_program_s() -> None:
    assert said(*WRAPPER, "sh", "-c", "exit 7").returncode == 7


RANKS = {
    "a Slurm step": (
        {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,2"},
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"},
    ),
    "a heterogeneous step": (
        {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_HET_SIZE": "2"},
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6"},
    ),
    "counts that are none": (
        {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x"},
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6"},
    ),
    "Open MPI": (
        {
            "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
    ),
    "a launcher that says all": ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, {}),
    "the deepspeed launcher": (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "2"},
    ),
    "a starter that does not say the place": ({"PMI_RANK": "2", "PMI_SIZE": "4"}, {}),
    "what contradicts itself": ({**STEP, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "6"}, {}),
    "half of it": ({"LOCAL_RANK": "0"}, {}),
    "nothing": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "expected"), RANKS.values(), ids=RANKS)
def test_who_a_rank_is_is_said_in_the_words_that_scripts_read(
    environ: dict[str, str], expected: dict[str, str]
) -> None:
    assert variables_of_the_rank(environ) == expected


def test_folders_come_first_and_once() -> None:
    assert in_front("", "/a", "/b") == "/a:/b"
    assert in_front("/x:/b::/y:/a", "/a", "/b") == "/a:/b:/x::/y"
    with pytest.raises(ConfigError, match="folder '/a:b': has a ':', so no path can hold it; install hpc_ds elsewhere"):
        in_front("/x", "/a:b")
    assert variables_of_the_name({})["PATH"].split(os.pathsep)[1:] == os.defpath.split(os.pathsep)
    assert variables_of_the_startup({"PYTHONPATH": "/x"}) == {"PYTHONPATH": f"{COMPAT / 'startup'}:/x"}


COMMANDS = {
    "train.py a": [*WRAPPER, sys.executable, "-u", "train.py", "--local_rank=0", "a"],
    "--module pkg.train a": [*WRAPPER, sys.executable, "-u", "-m", "pkg.train", "--local_rank=0", "a"],
    "--no_python ./prog a": [*WRAPPER, "./prog", "--local_rank=0", "a"],
    "--no_local_rank train.py a": [*WRAPPER, sys.executable, "-u", "train.py", "a"],
    "-H hosts --launcher pdsh train.py": [*WRAPPER, sys.executable, "-u", "train.py", "--local_rank=0"],
}


@pytest.mark.parametrize("text", COMMANDS)
def test_what_a_rank_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("train.py").write_text("")
    Path("hosts").write_text("w1.invalid slots=2\nw2.invalid slots=2\n")
    options = [] if "-H" in text else ["--num_gpus=1"]
    assert run(["--as-deepspeed", "--dry-run", "--json", *options, *text.split()]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hosts"][0]["ranks"][0]["command"] == COMMANDS[text]
    Path("activate").write_text("")
    assert run(["--as_deepspeed", "--dry-run", "--json", "--venv_script", "activate", *options, *text.split()]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hosts"][0]["ranks"][0]["command"][-len(COMMANDS[text]) :] == COMMANDS[text]


def test_a_file_that_accelerate_wrote_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes all of its environment there, also what a batch script has set for ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("train.py").write_text("")
    Path(".deepspeed_env").write_text("A=1\nMASTER_ADDR=n1\nRANK=0\nB=2\n")
    assert run(["--as-deepspeed", "--dry-run", "--json", "--num_gpus=1", "train.py"]) == 0
    said = capsys.readouterr()
    assert {"A": "1", "B": "2"}.items() <= json.loads(said.out)["environment"].items()
    assert said.err.splitlines() == [
        f"hpcds run: {tmp_path}/.deepspeed_env, line {line}: {name} is set by the launcher itself; passed over"
        for line, name in ((2, "MASTER_ADDR"), (3, "RANK"))
    ]
    with pytest.raises(ConfigError, match="line 2: MASTER_ADDR is set by the launcher; use --master_addr"):
        run(["--dry-run", "--num_gpus=1", "train.py"])


def test_the_command_deepspeed_is_hpcds_run() -> None:
    for command in ("deepspeed", "ds"):
        done = said(*WRAPPER, command)
        assert (done.returncode, done.stderr) == (
            2,
            "hpcds run: script: missing; write hpcds run [OPTIONS] SCRIPT [ARGS]\n",
        )
        assert "--as-deepspeed" in said(*WRAPPER, command, "--help").stdout


def test_a_module_of_the_current_folder_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Scripts are started from folders with files of any name."""
    for name in ("typer", "dataclasses", "hpc_ds"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of the current folder')")
    (tmp_path / "train.py").write_text("print('here')")
    environ = {**os.environ, **variables_of_the_name({"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)})}
    done = subprocess.run(
        ["deepspeed", "--help"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.local
def test_a_run_without_it_only_sees_other_libraries(tmp_path: Path) -> None:
    """Its ranks keep what the job says of PYTHONPATH, and find no deepspeed that they did not find before."""
    tell = (
        "import os, sys; print(os.environ['PYTHONPATH'], type(sys.meta_path[0]).__name__, 'HPCDS_PYTHON' in os.environ)"
    )
    job = {"command": [sys.executable, "-c", tell], "env": {"PYTHONPATH": f"/mine{os.pathsep}{REPOSITORY}"}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run = Runs(tmp_path, os.environ).submit(tmp_path / "job.json", "--site", "local")
    assert run.wait_until_over()["state"] == "finished", run.story()
    log = (run.folder / "logs" / "attempt-1" / "rank-0.log").read_text()
    assert log == f"{COMPAT / 'startup'}{os.pathsep}/mine{os.pathsep}{REPOSITORY} HpcdsHook False\n"
