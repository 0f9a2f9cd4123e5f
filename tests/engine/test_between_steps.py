"""What scripts do between forward, backward and step: evaluate, save, accumulate by themselves, throw gradients away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from standing import (
    CLIP,
    PRECISIONS,
    STAGES,
    STEPS,
    Reference,
    Standing,
    advance,
    batches,
    distance,
    engine_for,
    micro_batches,
    reference,
    values_of,
)
from torch import nn

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks

PLACES = ("between steps", "between micro-batches", "before step", "saving")


def interrupted(rank: int, stage: int, where: str, folder: Path) -> dict[str, torch.Tensor]:
    """Training with an evaluation between steps, between micro-batches, or between backward and step; or with saves."""
    engine = engine_for(stage, gradient_accumulation_steps=3, gradient_clipping=CLIP)

    def evaluate() -> None:
        if where == "saving":
            engine.save_checkpoint(folder, tag=f"saved at stage {stage}")
            return
        engine.eval()
        with torch.no_grad():
            engine(batches()[0][:5])
        engine.train()

    if where == "between steps":
        evaluate()
    for batch in batches():
        for micro_batch in micro_batches(engine, batch):
            engine.backward(engine(micro_batch))
            if where == "before step" or (where == "saving" and engine.global_steps == 1):
                evaluate()
            boundary = engine.is_gradient_accumulation_boundary()
            engine.step()
            if boundary == (where == "between steps"):
                evaluate()
    return values_of(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", PLACES)
def test_evaluating_and_saving_change_nothing(pair: Outcomes, where: str, stage: int) -> None:
    for weights in pair[f"interrupted {where} {stage}"]:
        assert distance(weights, reference(CLIP).values) < 1e-6


def no_sync(rank: int, stage: int) -> dict[str, Any]:
    """Each step has a second backward of the same micro-batch inside no_sync: twice the gradient."""
    engine = engine_for(stage)
    said: list[str] = []
    try:
        with engine.no_sync():
            engine.step()
    except ConfigError as error:
        said.append(str(error))
    if stage > 1:
        return {"said": said}
    for batch in batches():
        (micro_batch,) = micro_batches(engine, batch)
        with engine.no_sync():
            engine.backward(engine(micro_batch))
        engine.backward(engine(micro_batch))
        engine.step()
    return {
        "said": said,
        "weights": values_of(engine),
        "steps": engine.global_steps,
        "norm": engine.get_global_grad_norm(),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_accumulates_or_is_refused(pair: Outcomes, stage: int) -> None:
    wanted = Reference(loss=lambda model, batch: 2 * model(batch))
    for batch in batches():
        wanted.step(batch)
    for rank in pair[f"no_sync {stage}"]:
        if stage > 1:
            assert rank["said"] == [
                f"no_sync: ZeRO stage {stage} shards gradients at every micro-batch; use stage 0 or 1"
            ]
        else:
            assert rank["said"] == [
                "step: inside no_sync or coalesce_grad_reduction gradients are not complete; leave it first"
            ]
            assert rank["steps"] == STEPS
            assert rank["norm"] == pytest.approx(wanted.norms[-1], rel=1e-6)
            assert distance(rank["weights"], wanted.values) < 1e-6


def dropped(rank: int, stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    """Gradients of a micro-batch that is thrown away with zero_grad before the step begins anew."""
    engine = engine_for(stage, gradient_accumulation_steps=3, gradient_clipping=CLIP, **precision)
    engine.backward(engine(batches()[1][:2]) * 100)
    engine.zero_grad()
    return {"losses": [advance(engine, batch) for batch in batches()], "weights": values_of(engine)}


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_accumulated(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"dropped {stage}"]:
        assert distance(rank["weights"], reference(CLIP).values) < 1e-6
    rounded = Reference(precision="bf16", parts=(2, 3))
    for batch in batches():
        rounded.step(batch, CLIP)
    for rank in pair[f"dropped bf16 {stage}"]:
        assert distance(rank["weights"], rounded.values) < 4e-3  # see BOUNDS in test_laws.py


class Recurrent(Standing):
    """One block stands twice in the list, and two others share a weight."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        first, second, third = self.blocks
        self.blocks = nn.ModuleList([first, second, first, third])
        second.up.weight = third.up.weight


def two_forwards(rank: int, stage: int, kind: type[Standing]) -> dict[str, torch.Tensor]:
    """Two forwards before one backward."""
    engine = engine_for(stage, model=kind(seed=1 + rank))
    for batch in batches():
        (micro_batch,) = micro_batches(engine, batch)
        first, second = micro_batch.chunk(2)
        engine.backward((engine(first) + engine(second)) / 2)
        engine.step()
    return values_of(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [Standing, Recurrent])
def test_two_forwards_before_one_backward(pair: Outcomes, kind: type[Standing], stage: int) -> None:
    wanted = Reference(model=kind())
    for batch in batches():
        wanted.step(batch)
    for weights in pair[f"two_forwards {kind.__name__} {stage}"]:
        assert distance(weights, wanted.values) < 1e-6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What two ranks did in all cases of this file."""
    folder = tmp_path_factory.mktemp("between")
    cases: dict[str, Any] = {}
    for stage in STAGES:
        for where in PLACES:
            cases[f"interrupted {where} {stage}"] = (interrupted, (stage, where, folder))
        for kind in (Standing, Recurrent):
            cases[f"two_forwards {kind.__name__} {stage}"] = (two_forwards, (stage, kind))
        cases[f"dropped {stage}"] = (dropped, (stage, {}))
        cases[f"dropped bf16 {stage}"] = (dropped, (stage, PRECISIONS["bf16"]))
        cases[f"no_sync {stage}"] = (no_sync, (stage,))
    return run_cases(2, cases, worlds=2)
