"""Bad input on the command line: an exit code, one line on stderr, no traceback, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from fakes import fake_program
from whole_runs import Runs

if TYPE_CHECKING:
    from pathlib import Path

JOB = {"name": "gpt", "command": ["true"]}


def prepared(folder: Path) -> Runs:
    """A folder with a job, and a PATH without Slurm."""
    (folder / "job.json").write_text(json.dumps(JOB))
    (folder / "bad.json").write_text('{"command": ["true"],\n "nodes" 2}')
    (folder / "sizes.json").write_text('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}')
    (folder / "train.py").write_text("")
    (folder / "folder").mkdir()
    (folder / "bin").mkdir()
    return Runs(folder, {"PATH": str(folder / "bin"), "HOME": str(folder), "LC_ALL": "C.UTF-8"})


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return prepared(tmp_path)


SLURM = ("--site", "slurm")

# Words -> exit code, and how the one line on stderr begins.
BAD: dict[tuple[str, ...], tuple[int, str]] = {
    ("submit", "none.json"): (2, "job file 'none.json': no such file; check the path"),
    ("submit", "bad.json"): (2, "job file 'bad.json', line 2, column 10: not JSON: expecting ':' delimiter"),
    ("submit", "folder"): (2, "folder: script '"),
    ("submit", "none.py"): (2, "none.py: script '"),
    ("hostfile", "n1", "--form", "slurm"): (2, "form 'slurm': not a form of hostfiles; use deepspeed, openmpi"),
    ("submit", "a" * 300 + ".py"): (2, ""),
    ("submit", "a" * 300 + ".json"): (2, "job file 'aaa"),
    ("submit", "~nobody-of-this-name/train.py"): (2, ""),
    ("submit", "job.json", "--site", "nowhere"): (2, "site 'nowhere': unknown; known: "),
    ("submit", "job.json", "--site", "none.json"): (2, "site file 'none.json': no such file"),
    ("submit", "job.json", "--set", "nodes"): (2, "--set 'nodes': not KEY=VALUE"),
    ("submit", "job.json", "--set", "resources.node=2"): (2, "job.json: resources.node: unknown key; did you mean"),
    ("submit", "job.json", "--nodes", "0"): (2, "job.json: resources.nodes 0: out of range"),
    ("submit", "job.json", "--time", "soon", *SLURM): (2, "job.json: resources.time 'soon': not a time limit"),
    ("submit", "job.json", "--time", "0:10", *SLURM): (2, "resources.time '0:10': not longer than restart.lead 30 s"),
    ("submit", "job.json", "--name", "a/b", *SLURM): (2, "job.json: name 'a/b': not a run name"),
    ("submit", "job.json", "--set", "compat=foo"): (
        2,
        "job.json: compat 'foo': not one of the choices; use 'deepspeed'",
    ),
    ("compat", "--shell", "csh"): (2, "--shell 'csh': not a shell whose lines are known; use sh or fish"),
    ("submit", "job.json", "--training", "none.json"): (2, "training config '"),
    ("submit", "job.json", "--set", 'env_from=["NOT_THERE"]', *SLURM): (
        2,
        "env_from 'NOT_THERE': not set in this shell",
    ),
    ("submit", "job.json", "--runs", "train.py", *SLURM): (2, "runs folder 'train.py': no run can be made in it"),
    ("submit", "job.json", "--set", 'inputs=["none"]', *SLURM): (2, "inputs '"),
    ("submit", "job.json", "--set", "workdir=none", *SLURM, "--dry-run"): (2, "workdir '"),
    ("submit", "job.json", *SLURM): (3, "sbatch: no such program on PATH; is this a machine of the cluster?"),
    ("submit", "job.json", *SLURM, "--json"): (3, "sbatch: no such program on PATH"),
    ("status", "gpt"): (2, "run 'gpt': neither a run folder nor the job id or name of a run in 'runs'; check it"),
    ("status", "a" * 300): (2, ""),
    ("status", "./folder"): (2, "run 'folder': not a run folder (it has no config.json)"),
    ("status", "/"): (2, "run '/': not a run folder"),
    ("status", "gpt", "--json"): (2, "run 'gpt': neither"),
    ("status", "gpt", "--watch"): (2, "run 'gpt': neither"),
    ("status", "train", "gpt"): (2, "run 'train': neither"),
    ("rerun", "gpt"): (2, "run 'gpt': neither"),
    ("submit", "job.json", "--sweep", "steps", *SLURM): (2, "--sweep 'steps': neither KEY=VALUE,... nor a file"),
    ("submit", "job.json", "--sweep", "steps=1", "--chain", *SLURM): (2, "--sweep, --chain: give one of them"),
    ("submit", "train.py", "--snapshot", *SLURM): (2, "snapshot: '"),
    ("history", "gpt"): (2, "run 'gpt': neither"),
    ("report", "gpt", "--json"): (2, "run 'gpt': neither"),
    ("requeue", "gpt"): (2, "run 'gpt': neither"),
    ("resume", "gpt", "--nodes", "2"): (2, "run 'gpt': neither"),
    ("logs", "gpt"): (2, "run 'gpt': neither"),
    ("logs", "gpt", "--rank", "-1"): (2, "--rank '-1': not a rank; use 0, 1, ... or all"),
    ("logs", "gpt", "--rank", "first"): (2, "--rank 'first': not a rank; use 0, 1, ... or all"),
    ("cancel", "4711"): (2, "run '4711': neither"),
    ("preempt", "4711"): (2, "run '4711': neither"),
    ("resume", "./none"): (2, "run 'none': no such folder; give the folder that `hpcds submit` printed"),
    ("supervise", "folder"): (2, "run "),
    ("hostfile", "n[1-"): (2, "node list 'n[1-', column 2: '[' is never closed"),
    ("hostfile", "n1", "--slots", "0"): (2, "node list 'n1': slots=0 for host 'n1'"),
    ("config", "explain", "none.json"): (2, "training config 'none.json': no such file; check the path"),
    ("config", "explain", "folder"): (2, "training config 'folder': cannot be read: "),
    ("config", "explain", "bad.json"): (2, "training config 'bad.json', line 2, column 10: not JSON"),
    ("config", "explain", "job.json"): (2, "job.json: training: missing; this job has no training config"),
    ("config", "explain", "a" * 300): (2, "training config 'aaa"),
    ("config", "explain", "sizes.json", "--world-size", "3"): (2, "train_batch_size 8: not train_micro_batch_size_"),
    ("config", "explain", "sizes.json", "--parameters", "many"): (2, "--parameters 'many': not a number of them; "),
    ("hostfile",): (2, "SLURM_JOB_NODELIST: not set, so there is no Slurm job here"),
}


# The same of `hpcds run`, whose lines say so.
BAD_RUN: dict[tuple[str, ...], str] = {
    ("run",): "script: missing; write hpcds run [OPTIONS] SCRIPT [ARGS]",
    ("run", "--as-deepspeed"): "script: missing; write hpcds run [OPTIONS] SCRIPT [ARGS]",
    ("run", "--as-deepspeed", "none.py"): "script 'none.py': no such file; name one",
    ("run", "none.py"): "script 'none.py': no such file; name one",
    ("run", "folder/../none.py"): "script 'folder/../none.py': no such file",
    ("run", "--nodes", "2", "train.py"): "--nodes: no such option; options of the script go behind the script",
    ("run", "-H", "none", "train.py"): "hostfile 'none': No such file or directory; name one that can be read",
    ("run", "-H", "bad.json", "train.py"): "hostfile 'bad.json', line 1: ",
    ("run", "-i", "n1", "train.py"): "--include 'n1', column 1: no host 'n1'; there are localhost",
    ("run", "--env-file", "none", "train.py"): "environment file 'none': No such file or directory",
    ("run", "--env", "\0", "train.py"): "--env '\\x00': is not a variable; write NAME=VALUE",
    ("run", "--launcher", "io", "train.py"): "--launcher 'io': not one that is known; use local, ssh, pdsh",
}

USAGE: dict[tuple[str, ...], str] = {
    ("sumbit",): "No such command 'sumbit'",
    ("submit",): "Missing argument",
    ("submit", "job.json", "--nodse", "2"): "No such option",
    ("submit", "job.json", "--nodes", "two"): "valid integer",
    ("config",): "Usage: ",
    ("config", "explain"): "Missing argument",
    ("config", "explain", "sizes.json", "--world-size", "0"): "Invalid value for '--world-size'",
    ("logs", "gpt", "--attempt", "0"): "Invalid value for '--attempt'",
    ("cancel",): "Missing argument",
}

# A script's name -> the name of its run, where none is given.
SCRIPTS = {
    "train.py": "train",
    "train-gpt.py": "train-gpt",
    "2nd.py": "2nd",
    "_train.py": "run",
    "entra\u00eenement.py": "run",
    "it's a script.py": "run",
    f"{'a' * 120}.py": "run",
}


def dry_run(script: str) -> tuple[str, ...]:
    return ("submit", script, "--dry-run", *SLURM)


# Runs many command lines in one process, which saves a second for every two of them.
MANY = """
import contextlib, io, json, os, sys, traceback
from hpc_ds.cli.entry import main
answers = []
for words in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["hpcds", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    left = [name for folder in ("runs", "state") if os.path.isdir(folder) for name in os.listdir(folder)]
    answers.append([code, out.getvalue(), err.getvalue(), left])
json.dump(answers, sys.stdout)
"""


Answers = dict[tuple[str, ...], tuple[int, str, str, list[str]]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Exit status, stdout, stderr and what was left behind, of each command line."""
    commands = [*BAD, *BAD_RUN, *USAGE, *map(dry_run, SCRIPTS)]
    bench = prepared(tmp_path_factory.mktemp("bad"))
    for script in SCRIPTS:
        (bench.folder / script).write_text("")
    ran = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(commands),
        env=bench.env,
        cwd=bench.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return {words: tuple(answer) for words, answer in zip(commands, json.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize("words", BAD, ids=lambda words: " ".join(words)[:60])
def test_bad_input_is_one_line_and_an_exit_code(words: tuple[str, ...], answers: Answers) -> None:
    code, stdout, stderr, left = answers[words]
    assert stderr.startswith(f"hpcds: {BAD[words][1]}")
    assert stderr.count("\n") == 1
    assert (code, stdout, left) == (BAD[words][0], "", [])


@pytest.mark.parametrize("words", BAD_RUN, ids=lambda words: " ".join(words)[:60])
def test_bad_input_of_a_launch_is_one_line_too(words: tuple[str, ...], answers: Answers) -> None:
    code, stdout, stderr, left = answers[words]
    assert stderr.startswith(f"hpcds run: {BAD_RUN[words]}")
    assert stderr.count("\n") == 1
    assert (code, stdout, left) == (2, "", [])


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_bad_usage_is_told_with_the_usage(words: tuple[str, ...], answers: Answers) -> None:
    code, _, stderr, _ = answers[words]
    assert code == 2
    assert USAGE[words] in stderr
    assert "Traceback" not in stderr


# The same in a process of its own, one for each exit code and way of ending.
ALONE = [
    ("submit", "none.json"),
    ("submit", "job.json", "--site", "nowhere"),
    ("submit", "job.json", *SLURM),
    ("status", "./folder"),
    ("hostfile", "n[1-"),
    ("cancel", "4711"),
]


@pytest.mark.parametrize("words", ALONE, ids=" ".join)
def test_a_process_ends_with_the_line_and_the_code(words: tuple[str, ...], runs: Runs) -> None:
    code, begin = BAD[words]
    done = runs.hpcds(*words, check=False)
    assert done.stderr.startswith(f"hpcds: {begin}")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (code, "")
    assert not list((runs.folder / "runs").glob("*"))
    assert not list((runs.folder / "state").rglob("*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda name: name[:20])
def test_a_script_of_any_name_can_be_submitted(script: str, answers: Answers) -> None:
    code, stdout, stderr, _ = answers[dry_run(script)]
    assert (code, stderr) == (0, "")
    assert f"#SBATCH --job-name={SCRIPTS[script]}\n" in stdout


def test_what_is_nobodys_fault_keeps_its_traceback() -> None:
    """A bug must not look like a mistake of the user."""
    broken = "from hpc_ds.cli import entry, main; main.app_of = lambda verb: 1 / 0; entry.main()"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m hpc_ds hostfile 'n[1-60000]' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "n1 slots=1"
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] in {"141", "0"}


def with_slurm(runs: Runs, **programs: str) -> None:
    for name, text in programs.items():
        fake_program(runs.folder / "bin", name, text)
    runs.env["PATH"] += f":{os.environ['PATH']}"


def test_a_refused_job_is_told_in_slurms_words(runs: Runs) -> None:
    with_slurm(runs, sbatch="echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    done = runs.hpcds("submit", "job.json", *SLURM, "--partition", "x", check=False)
    assert done.returncode == 3
    words = "sbatch: refused the job: invalid partition specified: x; change the job or ask with --set"
    assert done.stderr == f"hpcds: {words}\n"
    assert not list((runs.folder / "runs").glob("*"))


def test_a_submitted_job_is_told_to_people_and_to_programs(runs: Runs) -> None:
    with_slurm(runs, sbatch="echo 25", squeue="echo '25|25|PENDING|7|N/A|N/A||Resources'")
    told = json.loads(runs.hpcds("submit", "job.json", *SLURM, "--json").stdout)
    assert set(told) == {"run_dir", "job_id", "site"}
    assert (told["job_id"], told["site"]) == ("25", "slurm")
    status = json.loads(runs.hpcds("status", "gpt", "--json").stdout)
    assert (status["state"], status["reason"], status["job_id"]) == ("waiting", "in the queue (Resources)", "25")
    assert status["run_dir"] == told["run_dir"]
    people = runs.hpcds("submit", "job.json", *SLURM).stdout.splitlines()
    assert people[0] == "job 25 on site slurm"
    assert people[1].startswith(f"run {runs.folder}/runs/gpt-")


def test_a_run_is_run_again_as_a_new_one(runs: Runs) -> None:
    with_slurm(runs, sbatch="echo 25")
    first = json.loads(runs.hpcds("submit", "job.json", *SLURM, "--nodes", "2", "--json").stdout)
    done = runs.hpcds("rerun", "gpt", "--set", "steps=7", "--json")
    assert done.stderr == "hpcds: warning: the code is not known to git: it runs as it is now\n"
    second = json.loads(done.stdout)
    assert second["run_dir"] != first["run_dir"]
    found = json.loads((runs.folder / second["run_dir"] / "config.json").read_text())
    assert (found["resources"]["nodes"], found["steps"]) == (2, 7)
    sources = json.loads((runs.folder / first["run_dir"] / "provenance.json").read_text())["sources"]
    assert (sources["resources.nodes"], sources["command"], sources["steps"]) == ("option", "job.json", "default")


def test_a_held_job_is_released_and_a_running_one_left_alone(runs: Runs) -> None:
    state = "echo JobId=25 JobState=$(cat $(dirname $0)/../said)"
    calls = f'echo "$@" >> $(dirname $0)/../calls; [ "$1" = show ] && {state}; true'
    with_slurm(runs, sbatch="echo 25", scontrol=calls, scancel='echo scancel "$@" >> $(dirname $0)/../calls')
    runs.hpcds("submit", "job.json", *SLURM)
    (runs.folder / "said").write_text("PENDING Priority=0 Reason=JobHeldUser")
    assert runs.hpcds("resume", "gpt").stdout.startswith("resumed job 25, run ")
    assert "release 25" in (runs.folder / "calls").read_text()
    (runs.folder / "said").write_text("RUNNING")
    refused = runs.hpcds("resume", "gpt", check=False)
    assert refused.returncode == 2
    assert "job 25 is running; it goes on by itself" in refused.stderr
    assert json.loads(runs.hpcds("cancel", "25", "--json").stdout)["action"] == "cancelled"
    assert json.loads(runs.hpcds("preempt", "gpt", "--json").stdout)["action"] == "preempted"
    assert (runs.folder / "calls").read_text().splitlines()[-2:] == ["scancel 25", "scancel --signal=TERM 25"]


def test_warnings_are_told_and_the_job_goes_on(runs: Runs) -> None:
    with_slurm(runs, sbatch="echo 25")
    (runs.folder / "ds.json").write_text('{"memory_breakdown": true}')
    done = runs.hpcds("submit", "job.json", *SLURM, "--training", "ds.json", "--json")
    assert done.stderr.count("\n") == 1
    assert "hpcds: warning: job: training: memory_breakdown: has no effect, because " in done.stderr
    assert json.loads(done.stdout)["job_id"] == "25"


def test_a_dry_run_for_programs_is_json(runs: Runs) -> None:
    told = json.loads(runs.hpcds("submit", "job.json", *SLURM, "--dry-run", "--json").stdout)
    assert set(told) == {"site", "script", "plan"}
    assert (told["plan"]["nodes"], told["plan"]["world_size"], told["plan"]["hours"]) == (1, 1, None)
    assert told["script"].startswith("#!/bin/bash\n#SBATCH --job-name=gpt\n")
    assert not (runs.folder / "runs").exists()
