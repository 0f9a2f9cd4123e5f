"""Gradients that are not finite: the step is skipped on all ranks, the loss scale moves, and at its minimum the run ends.

Scales are those of DeepSpeed's ZeRO scaler (test_loss_scale.py has its rules one by one); here they are the engine's, over
an overflow of one rank only, at every stage.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from standing import RATE, STAGES, Standing, advance, batches, distance, engine_for, micro_batches, values_of

from hpc_ds.errors import DivergedError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks

FP16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2}

# Which steps overflow -> the scale after each.
PATTERNS: dict[str, tuple[dict[str, Any], str, list[float]]] = {
    # the first overflow uses up the hysteresis; two good steps after the last one double the scale
    "hysteresis": ({}, "xxx...", [16, 8, 4, 4, 4, 8]),
    # which also refills the hysteresis
    "refilled": ({}, "x...x.x", [16, 16, 16, 32, 32, 32, 16]),
    "refilled at once": ({"consecutive_hysteresis": True}, "x.x.xx", [16, 16, 16, 16, 16, 8]),
    "without hysteresis": ({"hysteresis": 1, "loss_scale_window": 1}, "xx..x", [8, 4, 4, 8, 4]),
    "down to the minimum": ({"hysteresis": 1, "min_loss_scale": 3.0}, "xxx.", [8, 4, 3, 3]),
    "fixed": ({"loss_scale": 64.0}, "x.xx", [64, 64, 64, 64]),
}


def overflow(rank: int, stage: int, pattern: str) -> list[dict[str, Any]]:
    """The gradients of the last rank overflow in some steps."""
    settings, overflows, _ = PATTERNS[pattern]
    engine = engine_for(
        stage,
        fp16={**FP16, **settings},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        gradient_accumulation_steps=2,
    )
    steps = []
    for planted in overflows:
        before = values_of(engine)
        for micro_batch in micro_batches(engine, batches()[0]):
            loss = engine(micro_batch)
            engine.backward(loss * math.inf if planted == "x" and rank == 1 else loss)
            engine.step()
        steps.append(
            {
                "scale": engine.cur_scale,
                "told": [engine.optimizer.cur_scale, engine.optimizer.loss_scale, engine.optimizer.overflow],
                "skipped": engine.skipped_steps,
                "moved": distance(before, values_of(engine)) > 0,
                "applied": engine.was_step_applied(),
                "rate": engine.get_lr()[0],
                "finite": math.isfinite(engine.get_global_grad_norm()),
                "state": sum(len(state) for state in engine.optimizer.state.values()) > 0,
            }
        )
    return steps


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_overflow_of_one_rank_skips_the_step_on_all(pair: Outcomes, pattern: str, stage: int) -> None:
    _, overflows, scales = PATTERNS[pattern]
    good = [planted == "." for planted in overflows]
    for steps in pair[f"overflow {pattern} {stage}"]:
        assert [step["scale"] for step in steps] == scales
        assert [step["told"] for step in steps] == [
            [scale, scale, not one] for scale, one in zip(scales, good, strict=True)
        ]
        assert [step["skipped"] for step in steps] == [overflows[: last + 1].count("x") for last in range(len(good))]
        assert [step["finite"] for step in steps] == [step["applied"] for step in steps] == good
        # the schedule stands still too: its first two rates are 0, so the first two updates move nothing
        applied = [sum(good[: last + 1]) for last in range(len(good))]
        rates = [math.log(max(number, 1)) / math.log(10) * RATE for number in applied]
        assert [step["rate"] for step in steps] == pytest.approx(rates)
        assert [step["moved"] for step in steps] == [
            one and number > 2 for one, number in zip(good, applied, strict=True)
        ]
        assert [step["state"] for step in steps] == [number > 0 for number in applied]


def not_finite(rank: int, stage: int, precision: str, value: float) -> dict[str, Any]:
    engine = engine_for(stage, **({} if precision == "fp32" else {precision: {"enabled": True}}))
    before = values_of(engine)
    loss = engine(micro_batches(engine, batches()[0])[0])
    engine.backward(loss * value if rank == 1 else loss)
    engine.step()
    moved = distance(before, values_of(engine)) > 0
    advance(engine, batches()[1])
    return {"moved": moved, "skipped": engine.skipped_steps, "goes on": math.isfinite(engine.get_global_grad_norm())}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_skips_the_step_without_a_loss_scale_too(pair: Outcomes, value: float, precision: str, stage: int) -> None:
    assert pair[f"not_finite {precision} {value} {stage}"] == [{"moved": False, "skipped": 1, "goes on": True}] * 2


class Spoiled(torch.autograd.Function):
    """Passes a tensor on, and makes one gradient of it infinite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spoils: bool) -> torch.Tensor:
        ctx.spoils = spoils
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (gradient * torch.inf if ctx.spoils else gradient), None


class SpoiledInside(Standing):
    """The gradient is not finite from the output of the middle block down."""

    spoils = False

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.blocks[1].register_forward_hook(lambda _module, _args, out: Spoiled.apply(out, self.spoils))


def diverge(rank: int, stage: int, scalar: bool, folder: Path) -> dict[str, Any]:
    """A good step and a save; then gradients of rank 1 overflow until the end."""
    model = SpoiledInside(seed=1 + rank)
    engine = engine_for(
        stage, model=model, fp16={**FP16, "hysteresis": 2, "min_loss_scale": 8.0}, gradient_accumulation_steps=2
    )
    advance(engine, batches()[0])
    saved = values_of(engine)
    engine.save_checkpoint(folder)
    said: list[Any] = []
    for _ in range(3):
        try:
            if scalar:
                for micro_batch in micro_batches(engine, batches()[0]):
                    loss = engine(micro_batch)
                    engine.backward(loss * torch.inf if rank == 1 else loss)
                    engine.step()
            else:
                model.spoils = rank == 1
                advance(engine, batches()[1])
            said.append(engine.cur_scale)
        except DivergedError as error:
            said.append((str(error), error.exit_code))
    again = engine_for(stage, fp16=FP16)
    path, _ = again.load_checkpoint(folder)
    return {"said": said, "loaded": distance(saved, values_of(again)), "path": path, "steps": again.global_steps}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("where", "first"), [("inside", "blocks.1.gain"), ("at the loss", "sharpness")])
def test_overflow_at_the_smallest_scale_names_who_and_leaves_the_checkpoint(
    pair: Outcomes, where: str, first: str, stage: int
) -> None:
    for rank in pair[f"diverge {where} {stage}"]:
        assert rank["said"][:2] == [16.0, 8.0]
        message, code = rank["said"][2]
        assert code == 5
        # Parameters are looked at in the order of the backward pass, which ends with what is nearest to the inputs.
        said = f"fp16 loss scale 8: gradient of {first!r} on rank 1 is not finite at the smallest scale; lower the learning"
        assert message.startswith(said)
        assert rank["loaded"] == 0
        assert rank["steps"] == 1
        assert rank["path"].endswith("global_step1")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What two ranks did in all cases of this file."""
    folder = tmp_path_factory.mktemp("overflow")
    cases: dict[str, Any] = {}
    for stage in STAGES:
        for pattern in PATTERNS:
            cases[f"overflow {pattern} {stage}"] = (overflow, (stage, pattern))
        for precision in ("fp32", "bf16"):
            for value in (math.nan, math.inf):
                cases[f"not_finite {precision} {value} {stage}"] = (not_finite, (stage, precision, value))
        cases[f"diverge inside {stage}"] = (diverge, (stage, False, folder / f"inside {stage}"))
        cases[f"diverge at the loss {stage}"] = (diverge, (stage, True, folder / f"loss {stage}"))
    return run_cases(2, cases, worlds=2)
