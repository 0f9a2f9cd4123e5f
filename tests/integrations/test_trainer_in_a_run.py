"""What a Trainer does in a run of hpcds: which checkpoint it goes on from, which it keeps, and what its run is told."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from trainers import STEPS, config, told, trainer

from hpc_ds.checkpoint.agree import on_rank_0
from hpc_ds.integrations import trainer_folders as folders
from hpc_ds.run_dir import RunDir, read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ranks import Outcomes

pytestmark = pytest.mark.ranks

SAVES = {"save_strategy": "steps", "save_steps": 2, "bf16": True}


@contextmanager
def attempt(root: Path, number: int, **checkpoint: Any) -> Iterator[None]:
    """This process as a rank of a run."""
    root.mkdir(parents=True, exist_ok=True)
    on_rank_0("run", lambda: RunDir(root).config.write_text(json.dumps({"checkpoint": checkpoint})))
    os.environ |= {"HPCDS_RUN_DIR": str(root), "HPCDS_ATTEMPT": str(number)}
    try:
        yield
    finally:
        del os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"]


def go_on(_rank: int, stage: int | None, folder: Path) -> dict[str, Any]:
    """Three attempts: one that ends in the middle, one that finds a torn checkpoint, one that finds all done."""
    out, run = folder / "out", folder / "run"
    asked = None if stage is None else config(stage, scheduler=False)
    found: dict[str, Any] = {}
    with attempt(run, 1):
        trainer("gpt2", out, asked, max_steps=4, lr_scheduler_type="constant", **SAVES).train()
        dist.barrier()
        if dist.get_rank() == 0:
            (out / "checkpoint-4" / folders.UNFINISHED).touch()  # killed in the middle of it
        dist.barrier()
        found["same attempt"] = on_rank_0("look", lambda: folders.newest_of_run(out, str(run), 1))
    with attempt(run, 2):
        second = trainer("gpt2", out, asked, lr_scheduler_type="constant", **SAVES, save_total_limit=2)
        second.train(resume_from_checkpoint=str(out / "checkpoint-4"))
        found["steps"] = [entry["step"] for entry in second.state.log_history if "loss" in entry]
        found["loss"] = told(second, "loss")
        dist.barrier()
        found["left"] = sorted(path.name for path in out.glob("checkpoint-*"))
    with attempt(run, 3):
        third = trainer("gpt2", out, asked, lr_scheduler_type="constant", **SAVES)
        third.train()
        found["third"] = third.state.global_step, told(third, "loss"), third.optimizer.param_groups[0]["lr"]
    with attempt(folder / "another run", 2):
        another = trainer("gpt2", out, asked, max_steps=1, **SAVES)
        another.train()
        found["another"] = [entry["step"] for entry in another.state.log_history if "loss" in entry]
    found["saved"] = [event["step"] for event in read_lines(RunDir(run).events) if event["event"] == "saved"]
    return found


def keep(_rank: int, folder: Path) -> list[str]:
    """A Trainer that saves nothing by itself, in a run that asks for a save at every step and keeps two."""
    with attempt(folder / "run", 1, every_steps=1, keep=2):
        trainer("gpt2", folder / "out", config(1), bf16=True).train()
    dist.barrier()
    return sorted(path.name for path in (folder / "out").glob("checkpoint-*"))


def cases(folder: Path) -> dict[str, Any]:
    """What the ranks shall do, each in a folder of its own."""
    made: dict[str, Any] = {f"go-on-{stage}": (go_on, (stage, folder / f"go-on-{stage}")) for stage in (None, 0, 3)}
    return made | {"keep": (keep, (folder / "keep",))}


@pytest.mark.parametrize("stage", [None, 0, 3])
def test_an_attempt_goes_on_from_the_newest_whole_checkpoint_of_its_run(came: Outcomes, stage: int | None) -> None:
    for rank in came[f"go-on-{stage}"]:
        assert rank["same attempt"] is None
        assert rank["steps"] == list(range(1, STEPS + 1))
        assert rank["left"] == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
        assert rank["third"][:2] == (STEPS, rank["loss"])
        assert rank["another"] == [1]
        assert rank["saved"][:3] == [2, 4, 4]


def test_a_run_keeps_as_many_of_its_own_as_it_was_told(came: Outcomes) -> None:
    assert came["keep"] == [[f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]] * 2
