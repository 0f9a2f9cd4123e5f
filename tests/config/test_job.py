"""``job.json``: what each key takes, what it refuses and how it says so."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from hpc_ds.config.job import JobConfig, lead_s, python_of, time_limit_s
from hpc_ds.config.model import check
from hpc_ds.errors import ConfigError


def job(**data: Any) -> JobConfig:
    config: JobConfig = check(JobConfig, {"script": "train.py", **data}, "job.json")
    return config


# The sbatch manual, --time; what slurmctld stored for each: 90 -> 1:30:00, 60:30 -> 1:01:00 (it rounds up), ...
TIME_LIMITS = {
    "90": 90 * 60,
    "60:30": 60 * 60 + 30,
    "1:30:45": 5445,
    "04:00:00": 4 * 3600,
    "2-12": 2 * 86400 + 12 * 3600,
    "2-12:30": 2 * 86400 + 12 * 3600 + 30 * 60,
    "1-2:3:4": 86400 + 2 * 3600 + 3 * 60 + 4,
    "0-1": 3600,
    "0:30": 30,
    "1": 60,
    "0001": 60,
}

NO_TIME_LIMITS = {
    "": "not a time limit",
    "1.5": "not a time limit",
    "60m": "not a time limit",
    "1h": "not a time limit",
    "-1": "not a time limit",
    "1-": "not a time limit",
    "1:2:3:4": "not a time limit",
    " 1": "not a time limit",
    "1\n": "not a time limit",
    "1:": "not a time limit",
    ":30": "not a time limit",
    "UNLIMITED": "not a time limit",
    "\u0661\u0660": "not a time limit",  # digits, but none that Slurm knows
    "0": "no time at all",  # Slurm: without limit
    "0:00": "no time at all",
    "0-0": "no time at all",
}


@pytest.mark.parametrize(("text", "seconds"), TIME_LIMITS.items())
def test_a_time_limit_means_what_slurm_makes_of_it(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds
    assert job(resources={"time": text}).resources.time == text


@pytest.mark.parametrize(("text", "problem"), NO_TIME_LIMITS.items())
def test_what_is_no_time_limit_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^job.json: resources.time .*: {problem}"):
        job(resources={"time": text})


# (time, lead) -> seconds before the limit
LEADS: dict[tuple[str | None, int | str], int] = {
    (None, "auto"): 60,
    (None, 7): 7,
    ("0:31", "auto"): 30,
    ("1", "auto"): 30,
    ("5", "auto"): 30,
    ("10", "auto"): 60,
    ("30", "auto"): 180,
    ("2-0", "auto"): 180,
    ("2", 119): 119,
}

NO_LEADS: dict[tuple[str, int | str], str] = {
    ("0:30", "auto"): "resources.time '0:30': not longer than restart.lead 30 s",
    ("0:10", "auto"): "resources.time '0:10': not longer than restart.lead 30 s",
    ("2", 120): "resources.time '2': not longer than restart.lead 120 s",
    ("2", 500): "resources.time '2': not longer than restart.lead 500 s",
}


def timed(asked: tuple[str | None, int | str]) -> JobConfig:
    time, lead = asked
    return job(resources={} if time is None else {"time": time}, restart={"lead": lead})


@pytest.mark.parametrize(("asked", "seconds"), LEADS.items(), ids=str)
def test_the_warning_leads_the_limit(asked: tuple[str | None, int | str], seconds: int) -> None:
    assert lead_s(timed(asked)) == seconds


@pytest.mark.parametrize(("asked", "problem"), NO_LEADS.items(), ids=str)
def test_a_job_told_to_stop_before_it_begins_is_refused(asked: tuple[str, int | str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        lead_s(timed(asked))
    assert caught.value.key == "resources.time"


def test_a_limit_of_endless_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a time limit"):
        job(resources={"time": "9" * 400})


WORLDS: dict[tuple[tuple[str, int], ...], tuple[int, int]] = {
    (): (1, 1),
    (("gpus_per_node", 4),): (4, 4),
    (("nodes", 3), ("gpus_per_node", 4)): (4, 12),
    (("nodes", 2), ("tasks_per_node", 3)): (3, 6),
    (("gpus_per_node", 4), ("tasks_per_node", 1)): (1, 1),
}


@pytest.mark.parametrize(("resources", "sizes"), WORLDS.items(), ids=str)
def test_a_rank_stands_for_each_gpu_unless_told_otherwise(
    resources: tuple[tuple[str, int], ...], sizes: tuple[int, int]
) -> None:
    asked = job(resources=dict(resources)).resources
    assert (asked.ranks_per_node, asked.world_size) == sizes


GOOD: list[dict[str, Any]] = [
    {"name": "gpt-2_xl.v1+a@b"},
    {"name": "a" * 100},
    {"args": ["", "a b", "\n", "\u00e9"]},
    {"env": {"A": "", "_b1": "x\ny", "PATH": "\u00e9"}},
    {"env_from": ["WANDB_API_KEY"]},
    {"setup": ["module load x", "export A='b\nc'"]},
    {"resources": {"sbatch": {"mail-type": "END", "nice": 5, "exclusive": True, "hold": None, "requeue": False}}},
    {"resources": {"exclude": ["n1", "n[2-3]"], "mem": "64G", "cpus_per_task": 7}},
    {"checkpoint": {"every_steps": 5, "every_minutes": None, "keep": None, "async": True}},
    {"checkpoint": {"every_minutes": 1}},
    {"restart": {"signal": "TERM", "lead": 5, "max_crashes": 0, "max_restarts": 0}},
    {"runtime": {"kind": "venv", "path": "/venv"}},
]


@pytest.mark.parametrize("data", GOOD, ids=str)
def test_what_is_right_is_taken(data: dict[str, Any]) -> None:
    again: JobConfig = check(JobConfig, job(**data).model_dump(mode="json", by_alias=True), "config.json")
    assert again == job(**data)


# What is wrong, and how the complaint begins after the name of the file.
BAD: list[tuple[dict[str, Any], str]] = [
    ({"nodes": 2}, "nodes: unknown key; "),
    ({"resorces": {}}, "resorces: unknown key; did you mean 'resources'?"),
    ({"resources": {"node": 2}}, "resources.node: unknown key; did you mean 'nodes'?"),
    ({"resources": {"nodes": 0}}, "resources.nodes 0: out of range; it must be greater than or equal to 1"),
    ({"resources": {"nodes": "2"}}, "resources.nodes '2': not a whole number"),
    ({"resources": {"nodes": 2.0}}, "resources.nodes 2.0: not a whole number"),
    ({"resources": {"nodes": True}}, "resources.nodes True: not a whole number"),
    ({"resources": {"gpus_per_node": -1}}, "resources.gpus_per_node -1: out of range"),
    ({"resources": {"mem": 64}}, "resources.mem 64: not text"),
    ({"resources": {"partition": "a\nb"}}, "resources.partition 'a\\nb': has a line break or control character"),
    ({"resources": {"exclude": ["a\x7f"]}}, "resources.exclude[0] 'a\\x7f': has a line break or control character"),
    ({"resources": {"sbatch": {"--nice": 1}}}, "resources.sbatch: '--nice' is not an option name"),
    ({"resources": {"sbatch": {"a b": 1}}}, "resources.sbatch: 'a b' is not an option name"),
    ({"resources": {"sbatch": {"": 1}}}, "resources.sbatch: '' is not an option name"),
    ({"resources": {"sbatch": {"x=1": 1}}}, "resources.sbatch: 'x=1' is not an option name"),
    ({"resources": {"sbatch": {"comment": "a\nscancel -u me"}}}, "resources.sbatch.comment 'a\\nscancel -u me': has a"),
    ({"resources": {"sbatch": {"comment": ["a"]}}}, "resources.sbatch.comment ['a']: not text"),
    ({"resources": [1]}, "resources [1]: not a section; give a section in { }"),
    ({"name": ""}, "name '': not a run name; use letters"),
    ({"name": "a/b"}, "name 'a/b': not a run name"),
    ({"name": "-a"}, "name '-a': not a run name"),
    ({"name": ".."}, "name '..': not a run name"),
    ({"name": "a b"}, "name 'a b': not a run name"),
    ({"name": "a\n"}, "name 'a\\n': not a run name"),
    ({"name": "\u00e9"}, "name '\u00e9': not a run name"),
    ({"name": "a" * 101}, "name 'aaa"),
    ({"script": "a\nb"}, "script 'a\\nb': has a line break"),
    ({"script": 1}, "script 1: not text"),
    ({"args": "--lr 1"}, "args '--lr 1': not a list; give a list in [ ]"),
    ({"args": [1]}, "args[0] 1: not text; put it in quotes"),
    ({"args": ["a\0"]}, "args ['a\\x00']: has a NUL character"),
    ({"script": None, "command": ["a", "b\0"]}, "command ['a', 'b\\x00']: has a NUL character"),
    ({"script": None, "command": []}, "command []: "),
    ({"script": None, "command": "python x"}, "command 'python x': not a list"),
    ({"script": None}, "script, command: neither given; give one of them"),
    ({"command": ["a"]}, "script, command: both given; give one of them"),
    ({"env": {"A B": "1"}}, "env: 'A B' is not a variable name"),
    ({"env": {"1A": "1"}}, "env: '1A' is not a variable name"),
    ({"env": {"A=B": "1"}}, "env: 'A=B' is not a variable name"),
    ({"env": {"A;touch x": "1"}}, "env: 'A;touch x' is not a variable name"),
    ({"env": {"\u00e9": "1"}}, "env: '\u00e9' is not a variable name"),
    ({"env": {"A": 1}}, "env.A 1: not text; put it in quotes"),
    ({"env": {"A": "a\0b"}}, "env: has a NUL character"),
    ({"env": {"SLURM_NTASKS": "1"}}, "env: 'SLURM_NTASKS' is set by the launcher itself; leave it out"),
    ({"env": {"HPCDS_RUN_DIR": "1"}}, "env: 'HPCDS_RUN_DIR' is set by the launcher itself"),
    ({"env_from": ["A", "B C"]}, "env_from ['A', 'B C']: 'B C' is not a variable name"),
    ({"env_from": "A"}, "env_from 'A': not a list"),
    ({"setup": "module load x"}, "setup 'module load x': not a list"),
    ({"runtime": {"kind": "venv"}}, "runtime: path None does not fit kind 'venv'"),
    ({"runtime": {"path": "/x"}}, "runtime: path '/x' does not fit kind 'current'"),
    (
        {"runtime": {"kind": "docker"}},
        "runtime.kind 'docker': not one of the choices; use 'current', 'venv', 'conda', ",
    ),
    ({"runtime": {"kind": "conda"}}, "runtime: path None does not fit kind 'conda'; kinds venv, conda need one"),
    (
        {"runtime": {"kind": "pyxis"}},
        "runtime: image None does not fit kind 'pyxis'; kinds apptainer, pyxis, shifter, edf",
    ),
    ({"runtime": {"image": "a.sif"}}, "runtime: image 'a.sif' does not fit kind 'current'"),
    ({"runtime": {"kind": "apptainer", "image": "a", "path": "b"}}, "runtime: path 'b' does not fit kind 'apptainer'"),
    ({"runtime": {"options": ["--nv"]}}, "runtime: options, binds: of a container, which kind 'current' is not"),
    ({"runtime": {"kind": "edf", "image": "a", "binds": ["data"]}}, "runtime: binds 'data': not PATH or PATH:WHERE"),
    (
        {"runtime": {"kind": "pyxis", "image": "a", "binds": ["/a,/b"]}},
        "runtime: binds '/a,/b': not PATH or PATH:WHERE",
    ),
    (
        {"runtime": {"kind": "apptainer", "image": "a", "options": ["-e"]}},
        "runtime: options '-e': would hide from the ranks",
    ),
    ({"runtime": {"kind": "shifter", "image": "a\nb"}}, "runtime.image 'a\\nb': has a line break"),
    ({"checkpoint": {"every_steps": 0}}, "checkpoint.every_steps 0: out of range"),
    ({"checkpoint": {"every_minutes": 0}}, "checkpoint.every_minutes 0: out of range; it must be greater than 0"),
    ({"checkpoint": {"every_minutes": "30"}}, "checkpoint.every_minutes '30': not a number"),
    ({"checkpoint": {"every_minutes": True}}, "checkpoint.every_minutes True: not a number"),
    ({"checkpoint": {"keep": 0}}, "checkpoint.keep 0: out of range"),
    ({"checkpoint": {"async": "yes"}}, "checkpoint.async 'yes': neither true nor false"),
    ({"restart": {"signal": "KILL"}}, "restart.signal 'KILL': not one of the choices; use 'USR2', 'USR1'"),
    ({"restart": {"signal": "SIGUSR2"}}, "restart.signal 'SIGUSR2': not one of the choices"),
    ({"restart": {"lead": 0}}, "restart.lead 0: out of range; it must be greater than or equal to 1"),
    ({"restart": {"lead": "soon"}}, "restart.lead 'soon': "),
    ({"restart": {"max_crashes": -1}}, "restart.max_crashes -1: out of range"),
    ({"launcher": "mpirun"}, "launcher 'mpirun': not one of the choices; use 'srun'"),
    ({"site": 1}, "site 1: not text"),
    ({"training": 5}, "training 5: "),
]


@pytest.mark.parametrize(("data", "complaint"), BAD, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named_with_its_value(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(**data)
    assert str(caught.value).startswith(f"job.json: {complaint}")
    assert "\n" not in str(caught.value)


def test_an_empty_command_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        check(JobConfig, {"command": []}, "job.json")
    assert "List should" not in str(caught.value)


def test_the_job_runs_with_this_python_or_that_of_a_venv() -> None:
    assert python_of(job()) == sys.executable
    assert python_of(job(runtime={"kind": "venv", "path": "/a b"})) == "/a b/bin/python"
