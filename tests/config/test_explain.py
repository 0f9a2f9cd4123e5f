"""What ``hpcds config explain`` says of a config: values and sources, batch arithmetic, memory."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.config.explain import explain
from hpc_ds.config.memory import bytes_per_rank
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95]}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "cpu_offload": True, "overlap_comm": True},
}


def written(folder: Path, data: dict[str, Any], name: str = "ds.json") -> str:
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return str(folder / name)


def test_values_and_where_they_come_from(tmp_path: Path) -> None:
    found = explain(written(tmp_path, CONFIG), 4)
    values = {key: (value, source) for key, value, source in found.values}
    old = "deprecated spelling zero_optimization.cpu_offload"
    assert values["train_batch_size"] == (16, "file")
    assert values["train_micro_batch_size_per_gpu"] == (None, "auto")
    assert values["optimizer.params.betas"] == ([0.9, 0.95], "file")
    assert values["gradient_clipping"] == (1.0, "default")
    assert values["scheduler"] == (None, "default")
    assert values["compile.kwargs"] == ({}, "default")
    assert values["zero_optimization.offload_optimizer.device"] == ("cpu", old)
    assert len(found.warnings) == 2
    assert "overlap_comm: has no effect, because " in found.warnings[1]


def test_the_batch_and_the_memory_are_those_of_the_world_size(tmp_path: Path) -> None:
    found = explain(written(tmp_path, CONFIG), 4, 1000)
    assert found.batch is not None
    assert (found.batch.micro, found.batch.accumulation, found.because) == (4, 1, "--world-size")
    assert found.memory[2] == bytes_per_rank(1000, 2, 4, compute="bf16", offload=frozenset({"optimizer"}))
    assert (list(found.memory), found.stage) == ([0, 1, 2, 3], 2)


SIZES = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}

# Config, world size that was asked for -> the one that is taken, and the beginning of the reason.
WORLDS: list[tuple[dict[str, Any], int | None, int, str]] = [
    (CONFIG, None, 1, "assumed"),
    (SIZES, None, 4, "what the batch sizes leave"),
    (SIZES, 4, 4, "--world-size"),
]


@pytest.mark.parametrize(("data", "asked", "world", "because"), WORLDS, ids=str)
def test_the_world_size_and_why(
    data: dict[str, Any], asked: int | None, world: int, because: str, tmp_path: Path
) -> None:
    found = explain(written(tmp_path, data), asked)
    assert found.world_size == world
    assert found.because.startswith(because)


def test_a_contradiction_is_told_with_all_four_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size 16: .* 2 x .* 2 x world size 3 \(--world-size\) = 12;"):
        explain(written(tmp_path, SIZES), 3)


def test_without_any_batch_size_the_rest_is_explained(tmp_path: Path) -> None:
    found = explain(written(tmp_path, {}))
    assert found.batch is None
    assert found.optimizer == "the script's, taken for Adam"


@pytest.mark.parametrize("inline", [True, False])
def test_the_config_of_a_job_is_explained_for_its_world(inline: bool, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub", CONFIG)
    training = CONFIG if inline else "ds.json"
    job = {"command": ["true"], "resources": {"nodes": 2, "gpus_per_node": 4}, "training": training}
    found = explain(written(tmp_path / "sub", job, "job.json"))
    assert (found.world_size, found.because) == (8, "resources: nodes 2 x ranks on each 4")
    assert found.batch is not None
    assert found.batch.micro == 2
    assert found.file == str(tmp_path / "sub" / ("job.json: training" if inline else "ds.json"))


def test_base64_is_explained_too() -> None:
    text = base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode()
    assert explain(text).file == "training config in base64"


# A job -> what is wrong with it.
BAD_JOBS: list[tuple[dict[str, Any], str]] = [
    ({"command": ["true"]}, "training: missing; this job has no training config"),
    ({"command": ["true"], "training": "none.json"}, "no such file"),
    ({"command": ["true"], "training": "~nobody-of-this-name/x"}, "there is no such user's home"),
    ({"command": ["true"], "training": {"stag": 1}}, "training: stag: unknown key"),
    ({"training": {}}, "script, command: neither given"),
]


@pytest.mark.parametrize(("job", "complaint"), BAD_JOBS, ids=str)
def test_a_job_that_cannot_be_explained_says_why(job: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        explain(written(tmp_path, job, "job.json"))


def test_it_is_json_as_well(tmp_path: Path) -> None:
    data = explain(written(tmp_path, CONFIG), 4, 1000).as_data()
    assert json.loads(json.dumps(data)) == data
    assert data["batch"]["train_micro_batch_size_per_gpu"] == 4
    assert data["values"]["seed"] == {"value": 0, "source": "default"}
    held = data["memory"]["bytes_per_rank"]["2"]
    assert held["total"] == held["parameters"] + held["masters"] + held["gradients"] + held["optimizer"] == 5500
    assert held["on_host"] == 3000
