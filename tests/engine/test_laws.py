"""The engine against plain torch in one process: stages, world sizes, precision, and what scripts do between steps.

The reference is always an AdamW (or SGD) loop of a few lines on the full batch, never a second engine.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import hpc_ds
from hpc_ds.errors import ConfigError, DivergedError
from hpc_ds.runtime import preemption

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2, 4)
SAMPLES = 12  # of a global batch: divides by every world size and accumulation here
STEPS = 4
RATE, DECAY = 1e-2, 0.1
CLIP = 0.05  # below every gradient norm of these runs


class Block(nn.Module):
    """A residual layer of odd width with a 0-dim gain."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Standing(nn.Module):
    """All the standing cases at once: next-token prediction over 11 tokens.

    Shapes that no world size divides, tied, frozen, unused and 0-dim parameters, buffers of several types, a ModuleList
    of blocks, activation checkpointing of one of them, and a layer called twice.
    """

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.twice = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(3, 3)
        self.unused_scalar = nn.Parameter(torch.tensor(2.0))
        self.sharpness = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("turned", torch.randn(3, 2).t())  # not contiguous
        self.register_buffer("count", torch.randint(100, (3,)), persistent=False)
        self.register_buffer("mask", torch.rand(5) > 0.5)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (samples, places + 1) tokens -> mean loss
        x = self.tokens(text[:, :-1]) + self.shift * self.mask
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if number == 1 else block(x)
        x = self.frozen(self.twice(torch.tanh(self.twice(x))))
        logits = self.head(x) * self.sharpness
        return functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())


@functools.cache
def batches() -> torch.Tensor:
    """(steps, samples, places) tokens."""
    return torch.randint(11, (STEPS, SAMPLES, 4), generator=torch.Generator().manual_seed(7))


def config(stage: int, **overrides: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": DECAY}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        **overrides,
    }


def engine_for(
    stage: int, *, model: nn.Module | None = None, arguments: dict[str, Any] | None = None, **overrides: Any
):
    """An engine; unless a model is given, every rank draws other weights and rank 0's must win."""
    model = model if model is not None else Standing(seed=1 + dist.get_rank())
    return hpc_ds.initialize(model=model, config=config(stage, **overrides), **(arguments or {}))[0]


def micro_batches(engine: Any, batch: torch.Tensor) -> list[torch.Tensor]:
    """This rank's micro-batches of a global batch."""
    size, world_size = engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
    return list(batch.split(size))[dist.get_rank() :: world_size]


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """All values by name, unsharded. Collective."""
    state = {**module.state_dict(), "count": module.count} if hasattr(module, "count") else module.state_dict()
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in state.items()
    }


def advance(engine: Any, batch: torch.Tensor) -> float:
    """One optimizer step; returns this rank's mean loss."""
    losses = []
    for micro_batch in micro_batches(engine, batch):
        loss = engine(micro_batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


# the reference


class Reference:
    """Plain torch in this process, on full batches."""

    def __init__(self, optimizer: Any = None) -> None:
        self.model = Standing()
        make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY))
        self.optimizer = make([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, batch: torch.Tensor, clip: float = 0.0) -> None:
        loss = self.model(batch)
        self.model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip or math.inf)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.norms.append(norm.item())


@functools.cache
def reference(clip: float = 0.0) -> Reference:
    made = Reference()
    for batch in batches():
        made.step(batch, clip)
    return made


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, value in one.items():
        if value.is_floating_point():
            gap = (value.double() - other[name].double()).norm() / other[name].double().norm().clamp(min=1e-12)
            worst = max(worst, gap.item())
        else:
            assert torch.equal(value, other[name]), name
    return worst


# fp32: stages x world sizes x accumulation x clipping


def train(rank: int, stage: int, accumulation: int, clip: float, precision: dict[str, Any]) -> dict[str, Any]:
    engine = engine_for(stage, gradient_accumulation_steps=accumulation, gradient_clipping=clip, **precision)
    losses, norms = [], []
    for batch in batches():
        losses.append(advance(engine, batch))
        norms.append(engine.get_global_grad_norm())
    return {"losses": losses, "norms": norms, "weights": whole(engine.module), "scale": engine.loss_scale}


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    return [sum(of_step) / len(ranks) for of_step in zip(*(rank["losses"] for rank in ranks), strict=True)]


MATRIX = [
    pytest.param(stage, accumulation, clip, id=f"stage{stage}-accumulation{accumulation}-clip{clip:g}")
    for stage, accumulation, clip in itertools.product(STAGES, (1, 3), (0.0, CLIP))
]


@pytest.fixture(scope="module", params=WORLD_SIZES, ids="world{}".format)
def matrix(request: pytest.FixtureRequest) -> Outcomes:
    return run_cases(request.param, {str(param.values): (train, (*param.values, {})) for param in MATRIX})


@pytest.mark.parametrize(("stage", "accumulation", "clip"), MATRIX)
def test_training_equals_plain_adamw(matrix: Outcomes, stage: int, accumulation: int, clip: float) -> None:
    ranks = matrix[str((stage, accumulation, clip))]
    wanted = reference(clip)
    assert mean_losses(ranks) == pytest.approx(wanted.losses, rel=1e-6)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(wanted.norms, rel=1e-6)
        assert distance(rank["weights"], whole(wanted.model)) < 1e-6


# everything else runs on two ranks, in one spawn


PRECISIONS = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16 dynamic": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}},
    "fp16 static": {"fp16": {"enabled": True, "loss_scale": 256.0}},
}
# Largest relative distance of losses and of weights from fp32 after all steps: bf16 has 8 bits of mantissa, fp16 11.
BOUNDS = {"bf16": (2e-3, 4e-2), "fp16 dynamic": (2e-4, 3e-3), "fp16 static": (2e-4, 3e-3)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_mixed_precision_stays_near_fp32_and_stages_agree(pair: Outcomes, precision: str, stage: int) -> None:
    ranks, at_stage_0 = pair[f"{precision} {stage}"], pair[f"{precision} 0"]
    wanted, (loss_bound, weight_bound) = reference(CLIP), BOUNDS[precision]
    assert mean_losses(ranks) == pytest.approx(wanted.losses, rel=loss_bound)
    assert mean_losses(ranks) == pytest.approx(mean_losses(at_stage_0), rel=1e-6)
    for rank in ranks:
        assert distance(rank["weights"], whole(wanted.model)) < weight_bound
        assert distance(rank["weights"], at_stage_0[0]["weights"]) < 1e-6
        assert {value.dtype for value in rank["weights"].values() if value.is_floating_point()} == {torch.float32}
        assert rank["scale"] == {"bf16": 1.0, "fp16 dynamic": 2.0**11, "fp16 static": 256.0}[precision]


# overflow

FP16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2}


def overflow(rank: int, stage: int) -> list[dict[str, Any]]:
    """Six steps; the gradients of rank 1 overflow in the first three."""
    engine = engine_for(stage, fp16=FP16, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    steps = []
    for number in range(6):
        before = whole(engine.module)
        loss = engine(micro_batches(engine, batches()[0])[0])
        engine.backward(loss * math.inf if number < 3 and rank == 1 else loss)
        engine.step()
        steps.append(
            {
                "scale": engine.loss_scale,
                "skipped": engine.skipped_steps,
                "moved": distance(before, whole(engine.module)) > 0,
                "applied": engine.was_step_applied(),
                "rate": engine.get_lr()[0],
                "finite": math.isfinite(engine.get_global_grad_norm()),
            }
        )
    return steps


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_of_one_rank_skips_the_step_on_all(pair: Outcomes, stage: int) -> None:
    for steps in pair[f"overflow {stage}"]:
        # the first overflow uses up the hysteresis; two good steps after the last one double the scale
        assert [step["scale"] for step in steps] == [16, 8, 4, 4, 4, 8]
        assert [step["skipped"] for step in steps] == [1, 2, 3, 3, 3, 3]
        assert [step["finite"] for step in steps] == [step["applied"] for step in steps] == [False] * 3 + [True] * 3
        # the schedule stands still too: its first rate is 0, so the first update moves nothing
        rates = [0.0, 0.0, 0.0, 0.0, math.log(2) / math.log(10) * RATE, math.log(3) / math.log(10) * RATE]
        assert [step["rate"] for step in steps] == pytest.approx(rates)
        assert [step["moved"] for step in steps] == [False] * 5 + [True]


def nan_in_fp32(rank: int, stage: int) -> dict[str, Any]:
    engine = engine_for(stage)
    before = whole(engine.module)
    loss = engine(micro_batches(engine, batches()[0])[0])
    engine.backward(loss * math.nan if rank == 1 else loss)
    engine.step()
    return {
        "moved": distance(before, whole(engine.module)) > 0,
        "skipped": engine.skipped_steps,
        "scale": engine.loss_scale,
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_of_one_rank_skips_the_step_on_all_in_fp32_too(pair: Outcomes, stage: int) -> None:
    assert pair[f"nan_in_fp32 {stage}"] == [{"moved": False, "skipped": 1, "scale": 1.0}] * 2


def diverge(rank: int) -> list[str]:
    engine = engine_for(2, fp16={**FP16, "hysteresis": 1, "min_loss_scale": 8.0})
    said = []
    for _ in range(2):
        engine.backward(engine(micro_batches(engine, batches()[0])[0]) * (math.inf if rank == 1 else 1.0))
        try:
            engine.step()
            said.append(f"scale {engine.loss_scale:g}")
        except DivergedError as error:
            said.append(str(error))
    return said


def test_overflow_at_the_smallest_scale_ends_the_run_on_all_ranks(pair: Outcomes) -> None:
    for said in pair["diverge"]:
        assert said[0] == "scale 8"
        assert said[1].startswith(
            "fp16 loss scale 8: gradients overflow at the smallest scale; lower the learning rate"
        )


# optimizers and schedules of the client's own


def no_decay_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups: matrices, and all else with another rate and no decay."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    rest = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": matrices}, {"params": rest, "lr": 3e-3, "weight_decay": 0.0}]


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(no_decay_groups(parameters), lr=RATE, weight_decay=DECAY)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def client_optimizer(rank: int, stage: int, how: str) -> dict[str, torch.Tensor]:
    model = Standing(seed=1 + rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments: dict[str, Any] = {
        "instance": lambda: {"optimizer": two_groups(trained)},
        "groups": lambda: {"model_parameters": no_decay_groups(trained)},
        "callable": lambda: {"optimizer": momentum},
        "callable, parameters": lambda: {"optimizer": momentum, "model_parameters": iter(trained)},
        "names": lambda: {"model_parameters": [pair for pair in model.named_parameters() if pair[1].requires_grad]},
    }[how]()
    engine, optimizer, *_ = hpc_ds.initialize(model=model, config=config(stage), **arguments)
    assert optimizer is engine.optimizer
    if how == "instance":
        assert optimizer is arguments["optimizer"]
    for batch in batches():
        advance(engine, batch)
    return whole(engine.module)


CLIENTS = {
    "instance": two_groups,
    "groups": two_groups,
    "callable": momentum,
    "callable, parameters": momentum,
    "names": None,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", CLIENTS)
def test_a_clients_optimizer_is_used_as_it_is(pair: Outcomes, how: str, stage: int) -> None:
    wanted = Reference(CLIENTS[how])
    for batch in batches():
        wanted.step(batch)
    for weights in pair[f"client_optimizer {how} {stage}"]:
        assert distance(weights, whole(wanted.model)) < 1e-6


def half_optimized(rank: int, stage: int) -> dict[str, Any]:
    """Only the blocks are given to the optimizer, but everything needs gradients."""
    model = Standing(seed=1 + rank)
    engine = engine_for(stage, model=model, arguments={"model_parameters": list(model.blocks.parameters())})
    norms = []
    for batch in batches():
        advance(engine, batch)
        norms.append(engine.get_global_grad_norm())
    return {"weights": whole(engine.module), "norms": norms}


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_no_optimizer_takes_do_not_pile_up(pair: Outcomes, stage: int) -> None:
    wanted = Reference()
    wanted.optimizer = torch.optim.AdamW(wanted.model.blocks.parameters(), lr=RATE, weight_decay=DECAY)
    for batch in batches():
        wanted.step(batch)
    for rank in pair[f"half_optimized {stage}"]:
        assert distance(rank["weights"], whole(wanted.model)) < 1e-6
        assert rank["norms"] == pytest.approx(wanted.norms, rel=1e-6)


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)


def client_schedule(rank: int, how: str) -> dict[str, Any]:
    model = Standing(seed=1 + rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    arguments = {
        "instance": {"optimizer": optimizer, "lr_scheduler": warm_up(optimizer)},
        "callable": {"lr_scheduler": warm_up},
    }[how]
    engine, _, _, schedule = hpc_ds.initialize(model=model, config=config(2), **arguments)
    assert schedule is engine.lr_scheduler
    rates = []
    for batch in batches():
        rates.append(engine.get_lr())
        advance(engine, batch)
    return {"weights": whole(engine.module), "rates": rates}


@pytest.mark.parametrize("how", ["instance", "callable"])
def test_a_clients_schedule_steps_once_a_step(pair: Outcomes, how: str) -> None:
    wanted = Reference()
    schedule = warm_up(wanted.optimizer)
    for batch in batches():
        wanted.step(batch)
        schedule.step()
    for rank in pair[f"client_schedule {how}"]:
        assert rank["rates"] == [pytest.approx([RATE * (step + 1) / 10]) for step in range(STEPS)]
        assert distance(rank["weights"], whole(wanted.model)) < 1e-6


# what scripts do between the three calls


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
    return whole(engine.module)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", PLACES)
def test_evaluating_and_saving_change_nothing(pair: Outcomes, where: str, stage: int) -> None:
    for weights in pair[f"interrupted {where} {stage}"]:
        assert distance(weights, whole(reference(CLIP).model)) < 1e-6


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
        "weights": whole(engine.module),
        "steps": engine.global_steps,
        "norm": engine.get_global_grad_norm(),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_accumulates_or_is_refused(pair: Outcomes, stage: int) -> None:
    wanted = Reference()
    for batch in batches():
        wanted.model.zero_grad()
        (2 * wanted.model(batch)).backward()
        norm = nn.utils.clip_grad_norm_(wanted.model.parameters(), math.inf)
        wanted.optimizer.step()
    for rank in pair[f"no_sync {stage}"]:
        if stage > 1:
            assert rank["said"] == [
                f"no_sync: ZeRO stage {stage} shards gradients at every micro-batch; use stage 0 or 1"
            ]
        else:
            assert rank["said"] == ["step: inside no_sync the gradients are not complete; leave it first"]
            assert rank["steps"] == STEPS
            assert rank["norm"] == pytest.approx(norm.item(), rel=1e-6)
            assert distance(rank["weights"], whole(wanted.model)) < 1e-6


def dropped(rank: int, stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    """Gradients of a micro-batch that is thrown away with zero_grad before the step begins anew."""
    engine = engine_for(stage, gradient_accumulation_steps=3, gradient_clipping=CLIP, **precision)
    engine.backward(engine(batches()[1][:2]) * 100)
    engine.zero_grad()
    return {"losses": [advance(engine, batch) for batch in batches()], "weights": whole(engine.module)}


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_accumulated(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"dropped {stage}"]:
        assert distance(rank["weights"], whole(reference(CLIP).model)) < 1e-6
    clean = pair[f"bf16 {stage}"]
    for rank, wanted in zip(pair[f"dropped bf16 {stage}"], clean, strict=True):
        assert distance(rank["weights"], wanted["weights"]) < 1e-6


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
    return whole(engine.module)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [Standing, Recurrent])
def test_two_forwards_before_one_backward(pair: Outcomes, kind: type[Standing], stage: int) -> None:
    wanted = Reference()
    wanted.model = kind()
    wanted.optimizer = torch.optim.AdamW(
        [parameter for parameter in wanted.model.parameters() if parameter.requires_grad], lr=RATE, weight_decay=DECAY
    )
    for batch in batches():
        wanted.step(batch)
    for weights in pair[f"two_forwards {kind.__name__} {stage}"]:
        assert distance(weights, whole(wanted.model)) < 1e-6


class Choosing(nn.Module):
    """Which of two layers of one shape is used depends on the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor, other: int) -> torch.Tensor:
        return (self.third if other else self.second)(self.first(x)).square().mean()


def different_parameters(rank: int, stage: int) -> dict[str, Any]:
    """Layers of one shape: FSDP2 would add the gradients of one to those of the other, and say nothing."""
    engine = engine_for(stage, model=Choosing())
    before = whole(engine.module)
    engine.backward(engine(torch.ones(6, 4), other=rank))
    try:
        engine.step()
    except ConfigError as error:
        return {"said": str(error), "moved": distance(before, whole(engine.module))}
    return {}


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_use_different_parameters_are_told_so(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"different_parameters {stage}"]:
        assert rank["said"].startswith("gradients: the ranks used different parameters in this step")
        assert rank["moved"] == 0


# what else an engine does


def surface(rank: int, folder: Path) -> dict[str, Any]:
    model = Standing()
    engine, optimizer, loader, schedule = hpc_ds.initialize(
        model=model, config={"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    )
    said = {}
    for name, do in {
        "no optimizer": lambda: engine.backward(engine(batches()[0])),
        "not a scalar": lambda: engine_for(0).backward(torch.zeros(2, requires_grad=True)),
        "unknown attribute": lambda: engine.no_such_thing,
        "iterable dataset": lambda: engine_for(0, arguments={"training_data": Endless()}),
        "no model": lambda: hpc_ds.initialize(config=config(0)),
        "foreign parameter": lambda: engine_for(0, arguments={"model_parameters": [nn.Parameter(torch.zeros(2))]}),
    }.items():
        try:
            do()
        except (ConfigError, AttributeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return {
        "said": said,
        "nothing": (optimizer, loader, schedule, engine.get_lr(), engine.get_global_grad_norm()),
        "falls through": engine.twice is engine.module.twice is model.twice,
        "sizes": (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ),
        "loss": (engine(batches()[0]) - engine.forward(batches()[0])).item(),
    }


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return itertools.count()


def test_the_surface_of_an_engine(pair: Outcomes) -> None:
    for rank in pair["surface"]:
        assert rank["nothing"] == (None, None, None, [], None)
        assert rank["falls through"]
        assert rank["sizes"] == (12, 2, 3)
        assert rank["loss"] == 0
        said = rank["said"]
        assert said["no optimizer"].startswith("ConfigError: backward: the engine has no optimizer; ")
        assert said["not a scalar"].startswith("ConfigError: loss of shape (2,): not a scalar; ")
        assert said["unknown attribute"].startswith("AttributeError: 'FSDPStanding' object has no attribute")
        assert said["iterable dataset"].startswith("ConfigError: training_data: an IterableDataset has no positions")
        assert said["no model"] == "ConfigError: initialize: no model; pass model="
        assert said["foreign parameter"].startswith("ConfigError: model_parameters: one of them is not a parameter of")


def weights_file(rank: int, stage: int, precision: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    engine = engine_for(stage, **precision)
    advance(engine, batches()[0])
    engine(batches()[0])  # leaves whole parameters behind at stages 0-2
    assert engine.save_16bit_model(folder / "new" / "folder")
    return whole(engine.module) if stage == 3 else {}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_saved_weights_load_into_the_plain_module(pair: Outcomes, folder: Path, precision: str, stage: int) -> None:
    pair[f"weights_file {precision} {stage}"]
    file = folder / f"{precision} {stage}" / "new" / "folder" / "pytorch_model.bin"
    saved = torch.load(file, weights_only=True)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {wanted}
    plain = Standing(seed=9)
    plain.load_state_dict(saved)
    once = Reference()
    once.step(batches()[0])
    close = {"fp32": 1e-6, "bf16": 2e-2}.get(precision, 2e-3)
    trained = {name: value for name, value in whole(once.model).items() if name != "count"}
    assert distance({name: value for name, value in whole(plain).items() if name != "count"}, trained) < close
    assert [path.name for path in file.parent.iterdir()] == ["pytorch_model.bin"]


def told_to_stop(rank: int, root: Path) -> dict[str, Any]:
    """A run in which rank 1 alone is told to stop, in the middle of a step."""
    os.environ["HPCDS_RUN_DIR"] = str(root)
    try:
        engine = engine_for(3, gradient_accumulation_steps=3)
        seen = []
        for batch in batches():
            for number, micro_batch in enumerate(micro_batches(engine, batch)):
                engine.backward(engine(micro_batch))
                if rank == 1 and engine.global_steps == 1 and number == 0:
                    os.kill(os.getpid(), signal.SIGUSR2)
                seen.append((engine.global_steps, number))
                engine.step()
    except hpc_ds.Preempted as stop:
        return {"code": stop.code, "said": str(stop), "last": seen[-1]}
    finally:
        del os.environ["HPCDS_RUN_DIR"]
        preemption._request.by = None
    return {}


def test_one_rank_told_to_stop_stops_all_at_the_boundary(pair: Outcomes, folder: Path) -> None:
    first, second = pair["told_to_stop"]
    assert first == {"code": 75, "said": "checkpointed step 2 on another rank", "last": (1, 2)}
    assert second == {"code": 75, "said": "checkpointed step 2 on SIGUSR2", "last": (1, 2)}
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "global_step2"


def loader_order(rank: int) -> list[list[int]]:
    _, _, loader, _ = hpc_ds.initialize(
        model=Standing(), training_data=range(10), collate_fn=list, config=config(1, train_batch_size=4, seed=3)
    )
    return list(loader)


def test_the_loader_of_initialize_deals_an_epoch_out_to_the_ranks(pair: Outcomes) -> None:
    first, second = pair["loader_order"]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3 * 1_000_003)).tolist()
    together = [sample for halves in zip(first, second, strict=True) for half in halves for sample in half]
    assert together[:10] == order
    assert len(together) == 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    """What two ranks did in all cases below the matrix."""
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    cases: dict[str, Any] = {
        "diverge": (diverge, ()),
        "surface": (surface, (folder,)),
        "loader_order": (loader_order, ()),
        **{f"client_schedule {how}": (client_schedule, (how,)) for how in ("instance", "callable")},
    }
    for stage in STAGES:
        for name, precision in PRECISIONS.items():
            cases[f"{name} {stage}"] = (train, (stage, 3, CLIP, precision))
        for name, precision in {"fp32": {}, **PRECISIONS}.items():
            cases[f"weights_file {name} {stage}"] = (weights_file, (stage, precision, folder / f"{name} {stage}"))
        for how in CLIENTS:
            cases[f"client_optimizer {how} {stage}"] = (client_optimizer, (stage, how))
        for where in PLACES:
            cases[f"interrupted {where} {stage}"] = (interrupted, (stage, where, folder))
        for kind in (Standing, Recurrent):
            cases[f"two_forwards {kind.__name__} {stage}"] = (two_forwards, (stage, kind))
        cases[f"dropped {stage}"] = (dropped, (stage, {}))
        cases[f"dropped bf16 {stage}"] = (dropped, (stage, PRECISIONS["bf16"]))
        for function in (overflow, nan_in_fp32, half_optimized, no_sync, different_parameters):
            cases[f"{function.__name__} {stage}"] = (function, (stage,))
    cases["told_to_stop"] = (told_to_stop, (run,))  # last: from here on the process hears signals
    return run_cases(2, cases)
