"""Saves that the engine makes by itself, as the job of its run asks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import hpc_ds


def train_in_a_run(rank: int, folder: str, checkpoints: str, steps: int) -> list[dict[str, Any]]:
    """Take some steps inside a run that saves every two; returns the events that rank 0 wrote."""
    os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"] = folder, "1"
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    if rank == 0:
        job = {"checkpoint": {"dir": checkpoints, "every_steps": 2, "keep": 2}, "training": config}
        Path(folder, "config.json").write_text(json.dumps(job))
    torch.distributed.barrier()
    engine, *_ = hpc_ds.initialize(model=torch.nn.Linear(3, 1))
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 3)).mean())
        engine.step()
    lines = Path(folder, "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.ranks
def test_it_saves_every_so_many_steps_and_keeps_the_newest(tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    events = run_ranks(train_in_a_run, 2, str(tmp_path), str(saves), 7)[0]
    assert [event["step"] for event in events if event["event"] == "saved"] == [2, 4, 6]
    assert sorted(path.name for path in saves.iterdir()) == ["global_step4", "global_step6", "latest"]


@pytest.mark.ranks
def test_a_save_that_fails_is_told_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    events = run_ranks(train_in_a_run, 2, str(tmp_path), str(tmp_path / "file" / "saves"), 5)[0]
    failed = [event for event in events if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [2, 4]
    assert "Not a directory" in failed[0]["error"]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5]
