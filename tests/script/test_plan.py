"""The plan of a job: in numbers, and in words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program

from hpc_ds.cluster.precheck import Answer
from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.paths import check_paths
from hpc_ds.errors import ConfigError, SubmitError
from hpc_ds.script.plan import Plan, plan_lines, plan_of, span
from hpc_ds.script.submit import preview, submit

if TYPE_CHECKING:
    from pathlib import Path

SLURM = load_site("slurm")
BIG = {
    "resources": {"nodes": 2, "gpus_per_node": 4, "time": "04:00:00", "cpus_per_task": 8},
    "training": {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    },
    "parameters": 7_000_000_000,
    "checkpoint": {"every_steps": 500},
}


def job_of(**data: Any) -> JobConfig:
    job: JobConfig = check(JobConfig, {"name": "gpt", "command": ["true"], **data}, "job.json")
    return job


def words(plan: Plan) -> dict[str, str]:
    return {line[:8].strip(): line[9:] for line in plan_lines(plan) if line[0] != " "}


def test_a_plan_in_numbers() -> None:
    data = plan_of(job_of(**BIG), SLURM, Answer(start=1.5e9)).as_data()
    assert json.loads(json.dumps(data)) == data
    assert (data["nodes"], data["ranks_per_node"], data["world_size"], data["gpus"]) == (2, 4, 8, 8)
    assert (data["hours"], data["hours_unit"], data["time_limit_s"], data["lead_s"]) == (32, "GPU-hours", 14400, 180)
    assert data["batch"] == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    assert data["memory"] == {"0": 112e9, "1": 14e9 * 2 + 84e9 / 8, "2": 14e9 + 98e9 / 8, "3": 14e9}
    assert (data["stage"], data["start"], data["warnings"]) == (2, 1.5e9, [])


def test_a_plan_in_words() -> None:
    said = words(plan_of(job_of(**BIG), SLURM, Answer(warning="nodes are down")))
    assert said["shape"] == "2 nodes x 4 ranks = 8 ranks, 8 cores each, 8 GPUs in all"
    assert said["time"] == "at most 4 h a start; the run goes on beyond it with the next one"
    assert said["saves"].startswith("every 30 min and every 500 steps; 180 s before the limit, told by USR2")
    assert said["batch"] == "train_batch_size 64 = micro-batch 4 x accumulation 2 x 8 ranks"
    assert said["memory"].startswith(
        "a rank, 7,000,000,000 parameters: stage 0 104 GiB, stage 1 35.9 GiB, stage 2* 24.4"
    )
    assert said["cost"] == "at most 32 GPU-hours a start"
    assert said["warning"] == "nodes are down"


def test_what_is_not_known_is_said() -> None:
    said = words(plan_of(job_of(), SLURM))
    assert said["shape"] == "1 node x 1 rank = 1 rank, no GPU"
    assert said["time"] == "no limit asked for: the cluster's default (--time sets one)"
    assert said["batch"] == "no training config"
    assert said["memory"] == "not known without a training config"
    assert said["cost"] == "1 node-hours an hour"
    assert words(plan_of(job_of(training={}), SLURM))["memory"].endswith("such as --set parameters=7000000000")
    assert words(plan_of(job_of(training={}), SLURM))["batch"] == "no batch size in a training config"


def test_warnings_of_the_training_config_are_in_the_plan() -> None:
    (warning,) = plan_of(job_of(training={"memory_breakdown": True}), SLURM).warnings
    assert "memory_breakdown: has no effect" in warning


SAVES = {
    "none but at a stop": {"every_minutes": None},
    "every 2 to 60 min": {"every_minutes": "auto"},
    "every 1 step": {"every_minutes": None, "every_steps": 1},
}


@pytest.mark.parametrize("expected", SAVES)
def test_saves_in_words(expected: str) -> None:
    assert plan_of(job_of(checkpoint=SAVES[expected]), SLURM).checkpoint == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (3600, "1 h"), (90061, "1 d 1 h"), (5400, "1 h 30 min")]
)
def test_a_time_in_words(seconds: int, text: str) -> None:
    assert span(seconds) == text


# What is not there -> how the refusal begins.
MISSING: dict[str, dict[str, Any]] = {
    "script '": {"command": None, "script": "/none.py"},
    "workdir '": {"workdir": "/none"},
    "inputs '": {"inputs": ["/", "/none"]},
    "inputs 'a": {"inputs": ["a" * 5000]},
    "runtime.path '": {"runtime": {"kind": "venv", "path": "/none"}},
}


@pytest.mark.parametrize("begin", MISSING)
def test_files_that_are_not_there_are_refused_before_anything_is_made(begin: str, tmp_path: Path) -> None:
    job = job_of(**MISSING[begin])
    for act in (lambda: check_paths(job), lambda: preview(job, SLURM, tmp_path), lambda: submit(job, SLURM, tmp_path)):
        with pytest.raises(ConfigError) as caught:
            act()
        assert str(caught.value).startswith(begin)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_asks_slurm_too_and_can_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path / "bin", "sbatch", f"cat $2 > {tmp_path}/asked; echo 'allocation failure: no' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(SubmitError, match="sbatch: refused the job: no; change the job"):
        preview(job_of(), SLURM, tmp_path / "runs")
    text, _ = preview(job_of(), SLURM, tmp_path / "runs", check=False)
    assert (tmp_path / "asked").read_text().splitlines()[0] == text.splitlines()[0]
    assert not (tmp_path / "runs").exists()
