"""The marks that the engine leaves: what a beat calls the phase and the step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import hpc_ds
from hpc_ds.run_dir import read_lines
from hpc_ds.runtime.progress import Progress, during, process_age_s, progress


class Model(torch.nn.Module):
    """Notes the phase in which it runs forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.seen: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(progress.phase)
        inside = self.linear(x)
        inside.register_hook(lambda _: self.seen.append(progress.phase))
        return inside.mean()


class State:
    """Notes the phase in which it is saved and loaded."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def state_dict(self) -> dict[str, Any]:
        self.seen.append(progress.phase)
        return {}

    def load_state_dict(self, _state: dict[str, Any]) -> None:
        self.seen.append(progress.phase)


def phases(_rank: int, folder: str) -> dict[str, Any]:
    os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"] = folder, "1"
    Path(folder, "config.json").write_text("{}")
    told: dict[str, Any] = {"before": (progress.phase, progress.step)}
    model = Model()
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, optimizer, *_ = hpc_ds.initialize(model=model, config=config)
    told["made"] = progress.phase
    update = optimizer.step
    optimizer.step = lambda: (model.seen.append(progress.phase), update())
    engine.register_state("state", State(model.seen))
    for plain in (False, True):
        loss = engine(torch.ones(1, 3))
        told["after forward"] = progress.phase
        loss.backward() if plain else engine.backward(loss)
        told["after backward"] = progress.phase
        engine.step()
        told[f"after step {engine.global_steps}"] = progress.phase, progress.step
    engine.save_checkpoint()
    told["after a save"] = progress.phase
    progress.step = None
    engine.load_checkpoint()
    told["after a load"] = progress.phase, progress.step
    told["seen"] = model.seen
    told["events"] = {event["event"]: event for event in read_lines(Path(folder, "events.jsonl"))}
    return told


@pytest.mark.ranks
def test_the_engine_says_what_it_does(tmp_path: Path) -> None:
    (told,) = run_ranks(phases, 1, str(tmp_path))
    events = told.pop("events")
    assert told == {
        "before": ("starting", None),
        "made": "idle",
        "after forward": "idle",
        "after backward": "idle",
        "after step 1": ("idle", 1),
        "after step 2": ("idle", 2),
        "after a save": "idle",
        "after a load": ("idle", 2),
        "seen": [*("forward", "backward", "step") * 2, "saving", "loading"],
    }
    assert events["initialized"]["seconds"] > 0
    assert events["saved"]["seconds"] >= events["saved"]["stall_s"] >= 0
    assert events["resumed"]["seconds"] >= 0


def test_the_marks_of_a_function_are_left_again_but_after_an_error() -> None:
    assert Progress().phase == "starting"
    seen = []

    @during("saving")
    def save(fails: bool) -> int:
        seen.append(progress.phase)
        return 3 // (not fails)

    progress.mark("idle")
    assert (save(fails=False), seen, progress.phase) == (3, ["saving"], "idle")
    with pytest.raises(ZeroDivisionError):
        save(fails=True)
    assert progress.phase == "saving"


def test_a_process_knows_its_age() -> None:
    age_s = process_age_s()
    assert age_s is not None
    assert 0 < age_s < 24 * 3600
