"""What a Trainer does in a run of hpcds: which checkpoint it goes on from, which it keeps, and what its run is told."""

from __future__ import annotations

import errno
import json
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from trainers import STEPS, config, told, trainer

from hpc_ds.checkpoint.agree import on_rank_0
from hpc_ds.compat import activate
from hpc_ds.integrations import trainer_folders as folders
from hpc_ds.run_dir import RunDir, read_lines
from hpc_ds.runtime.request import request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ranks import Outcomes

pytestmark = pytest.mark.ranks

SAVES = {"save_strategy": "steps", "save_steps": 2, "bf16": True}


@contextmanager
def attempt(root: Path, number: int, **checkpoint: Any) -> Iterator[None]:
    """This process as a rank of a run, as if it had just begun."""
    activate()  # before what follows loads accelerate
    from hpc_ds.integrations import trainer_callback

    trainer_callback._calls = 0
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
            folders.mark_of(out / "checkpoint-4").touch()  # killed in the middle of it
        dist.barrier()
        found["same attempt"] = on_rank_0("look", lambda: folders.newest_of_run(out, str(run), 1, 1))
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


def weights_only(_rank: int, folder: Path) -> dict[str, Any]:
    """A script that saves its weights alone; the run asks for a save at every third step, and goes on from that."""
    out, run = folder / "out", folder / "run"
    how = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "bf16": True}
    with attempt(run, 1, every_steps=3):
        trainer("gpt2", out, config(1), max_steps=4, **how).train()
        dist.barrier()
        made = {path.name: folders.Made.read(path).complete for path in out.glob("checkpoint-*")}
    with attempt(run, 2, every_steps=3):
        second = trainer("gpt2", out, config(1), **how)
        second.train()
    from hpc_ds.integrations.trainer_callback import callback_of

    return {"complete": made, "from": callback_of(second).resumed_from.name}


def two_phases(_rank: int, folder: Path) -> list[tuple[int, int]]:
    """Two Trainers in one script and one folder: the second must not go on from what the first has saved."""
    out, run, began = folder / "out", folder / "run", []
    for number in (1, 2):
        with attempt(run, number):
            for steps in (4, 2):
                made = trainer("gpt2", out, config(1, scheduler=False), max_steps=steps, **SAVES)
                made.train()
                began.append((number, made._initial_global_step))
    return began


def full_disk(rank: int, folder: Path) -> dict[str, Any]:
    """The run asks for saves, and one rank cannot write its part of the first."""
    with attempt(folder / "run", 1, every_steps=2):
        made = trainer("gpt2", folder / "out", config(1), bf16=True)
        own = made._save_rng_state

        def save_rng_state(output_dir: str) -> None:
            if rank == 1 and made.state.global_step == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            own(output_dir)

        made._save_rng_state = save_rng_state
        made.train()
    dist.barrier()
    return {
        "steps": made.state.global_step,
        "left": sorted(path.name for path in (folder / "out").iterdir()),
        "told": [
            event["event"] for event in read_lines(RunDir(folder / "run").events) if event["event"].startswith("save")
        ],
    }


def outside_of_a_run(rank: int, stage: int | None, folder: Path) -> Any:
    """With the callback, one rank is told by SIGTERM."""
    activate()
    from transformers import TrainerCallback

    from hpc_ds.integrations.transformers import PreemptionCallback

    class Told(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    asked = None if stage is None else config(stage)
    made = trainer("gpt2", folder, asked, bf16=True, callbacks=[Told(), PreemptionCallback()])
    try:
        made.train()
    except SystemExit as left:
        return left.code, made.state.global_step, (folder / "checkpoint-3" / "trainer_state.json").exists()
    finally:
        forget_signals()


def forget_signals() -> None:
    """The next case is not to be stopped too."""
    request.by = None
    for number, before in request._before.items():
        signal.signal(number, before or signal.SIG_DFL)
    request._before.clear()


def cases(folder: Path) -> dict[str, Any]:
    """What the ranks shall do, each in a folder of its own."""
    made: dict[str, Any] = {f"go-on-{stage}": (go_on, (stage, folder / f"go-on-{stage}")) for stage in (None, 0, 3)}
    for case in (keep, weights_only, two_phases, full_disk):
        made[case.__name__] = case, (folder / case.__name__,)
    for stage in (None, 1):
        made[f"outside-{stage}"] = outside_of_a_run, (stage, folder / f"outside-{stage}")
    return made


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


def test_what_has_the_weights_alone_is_not_gone_on_from(came: Outcomes) -> None:
    for rank in came["weights_only"]:
        assert rank["complete"] == {
            "checkpoint-1": False,
            "checkpoint-2": False,
            "checkpoint-3": True,
            "checkpoint-4": False,
        }
        assert rank["from"] == "checkpoint-3"


def test_each_call_goes_on_from_its_own(came: Outcomes) -> None:
    assert came["two_phases"] == [[(1, 0), (1, 0), (2, 4), (2, 2)]] * 2


def test_a_save_that_fails_on_one_rank_is_told_and_training_goes_on(came: Outcomes) -> None:
    for rank in came["full_disk"]:
        assert rank["steps"] == STEPS
        assert rank["left"] == ["checkpoint-4"]
        assert rank["told"] == ["save_failed", "saved"]


@pytest.mark.parametrize("stage", [None, 1])
def test_outside_of_a_run_the_callback_stops_when_one_rank_is_told(came: Outcomes, stage: int | None) -> None:
    assert came[f"outside-{stage}"] == [(75, 3, True)] * 2
