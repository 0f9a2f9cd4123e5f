"""``hpcds config``: what people and programs read, and that neither needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hpc_ds.cli.config import _count
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "cpu_offload": True, "overlap_comm": True},
}

# Runs the command line, and fails if torch was loaded on the way.
LIGHT = """
import sys
from hpc_ds.cli.entry import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    job = {"command": ["true"], "training": "ds.json", "resources": {"tasks_per_node": 2}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    return tmp_path


def told(folder: Path, *words: str) -> str:
    command = [sys.executable, "-c", LIGHT, "config", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_people_read_values_arithmetic_memory_and_warnings(folder: Path) -> None:
    lines = told(folder, "explain", "ds.json", "--world-size", "4", "--parameters", "1M").splitlines()
    rows = [cells(line) for line in lines]
    assert lines[0] == "ds.json"
    assert ["key", "value", "source"] in rows
    assert ["optimizer.params.lr", "0.001", "file"] in rows
    assert ["gradient_clipping", "1.0", "default"] in rows
    assert "world size 4 (--world-size)" in lines
    assert (
        "train_batch_size 16 = train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 2 x world size 4" in lines
    )
    assert "held by a rank, 1,000,000 parameters (compute bf16; optimizer AdamW):" in lines
    assert ["stage", "parameters", "masters", "gradients", "optimizer", "total", "of it on host"] in rows
    # 2 bytes, 4 / 4, 2 / 4 and 8 / 4 of a million; masters and optimizer are offloaded.
    assert ["2 *", "1.907 MiB", "976.6 KiB", "488.3 KiB", "1.907 MiB", "5.245 MiB", "2.861 MiB"] in rows
    assert [line.split(": ")[2] for line in lines if line.startswith("warning: ")] == [
        "zero_optimization.cpu_offload",
        "zero_optimization.overlap_comm",
    ]


def test_without_a_number_of_parameters_bytes_are_those_of_one(folder: Path) -> None:
    rows = [cells(line) for line in told(folder, "explain", "job.json").splitlines()]
    assert ["held by a rank, bytes a parameter (compute bf16; optimizer AdamW):"] in rows
    assert ["world size 2 (resources: nodes 1 x ranks on each 2)"] in rows
    assert ["3", "2", "0", "2", "4", "8", "4"] in rows


def test_a_config_without_batch_sizes_is_explained_and_told_so(folder: Path) -> None:
    (folder / "empty.json").write_text("{}")
    text = told(folder, "explain", "empty.json")
    assert "training needs one of them" in text
    assert "of it on host" not in text


def test_programs_read_json(folder: Path) -> None:
    data = json.loads(told(folder, "explain", "ds.json", "--world-size", "4", "--json"))
    assert data["batch"]["train_micro_batch_size_per_gpu"] == 2
    assert data["memory"]["parameters"] == 1


def test_the_schemas_are_json(folder: Path) -> None:
    training, job = json.loads(told(folder, "schema")), json.loads(told(folder, "schema", "--job"))
    assert "zero_optimization" in training["properties"]
    assert "resources" in job["properties"]


COUNTS = {"1": 1, "1300000000": 1_300_000_000, "26M": 26_000_000, "1.3B": 1_300_000_000, "7g": 7 * 10**9, "2k": 2000}


@pytest.mark.parametrize(("text", "count"), COUNTS.items())
def test_a_number_of_parameters_may_have_a_letter(text: str, count: int) -> None:
    assert _count(text) == count


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1e9", "3Q", "1.3.1B", "9" * 30, "999999999999T", "nan", "\u0663", "M"]
)
def test_what_is_no_number_of_parameters_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--parameters .*: not a number of them; write for example"):
        _count(text)
