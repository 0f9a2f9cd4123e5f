"""A run that was saved goes on at any stage and world size as if nothing had happened.

Against plain torch in one process where the world changes; bit for bit against itself where it does not.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from ranks import Outcomes, run_cases
from small import said
from torch import nn
from torch.nn import functional

import hpc_ds
from hpc_ds.config.training import BatchSizes, SchedulerConfig
from hpc_ds.engine.data import Position
from hpc_ds.engine.schedules import make_schedule
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.ranks

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2, 3, 4)
MANY = 8  # ranks
SAMPLES, TRAIN_BATCH, LARGE_BATCH = 50, 12, 24  # an epoch ends inside of a batch
SAVED, LAST = 3, 8  # steps
CLIP = 0.05
SCHEDULER = {"type": "WarmupDecayLR", "params": {"total_num_steps": 12, "warmup_max_lr": 0.02, "warmup_num_steps": 4}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 1}},
}
# What differs from AdamW in fp32 on the device.
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": PRECISIONS["bf16"],
    "fp16": PRECISIONS["fp16"],
    "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "sgd": {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}}},
    "lamb": {"optimizer": {"type": "Lamb", "params": {"lr": 0.01, "weight_decay": 0.1}}},
    "muon": {"optimizer": {"type": "Muon", "params": {"lr": 0.01, "ns_method": "standard"}}},
}
ASGD = {"optimizer": {"type": "ASGD", "params": {"lr": 0.05}}}  # its state has more numbers than a step count
# Relative, of losses and of whole weights: another world size adds up in another order, in a type of 8 or 11 bits; what is
# made orthogonal magnifies it.
BOUNDS = {"bf16": (2e-3, 3e-3), "fp16": (2e-4, 5e-4), "muon": (1e-6, 5e-6)}
EXACT = (1e-6, 1e-6)


class Block(nn.Module):
    """A residual layer of odd width with a 0-dim gain."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(self.dropout(torch.tanh(self.up(x))))


class Small(nn.Module):
    """Odd shapes, tied, frozen, unused and 0-dim parameters, two kinds of buffers."""

    def __init__(self, seed: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.frozen = nn.Linear(5, 5).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(3, 3)
        self.unused_scalar = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.tokens(text[:, :-1]) + self.shift
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.frozen(x)).float().flatten(0, 1), text[:, 1:].flatten())


@functools.cache
def text() -> torch.Tensor:
    return torch.randint(11, (SAMPLES, 4), generator=torch.Generator().manual_seed(7))


def config(stage: int, **overrides: Any) -> dict[str, Any]:
    zero = overrides.pop("zero_optimization", {})
    return {
        "train_batch_size": TRAIN_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": SCHEDULER,
        "zero_optimization": {"stage": stage, **(zero if stage else {})},  # nothing is offloaded at stage 0
        "gradient_clipping": CLIP,
        **overrides,
    }


def engine_for(
    stage: int, *, seed: int = 1, dropout: float = 0.0, model: nn.Module | None = None, **overrides: Any
) -> Any:
    arguments = overrides.pop("arguments", {})
    model = model if model is not None else Small(seed, dropout)
    return hpc_ds.initialize(model=model, training_data=text(), config=config(stage, **overrides), **arguments)[0]


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """All values by name, unsharded. Collective."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.state_dict().items()
    }


def steps(engine: Any, until: int) -> Iterator[dict[str, Any]]:
    """Train; one record a step."""
    losses: list[float] = []
    while engine.global_steps < until:
        for batch in engine.training_dataloader:
            loss = engine(batch)
            engine.backward(loss)
            boundary = engine.is_gradient_accumulation_boundary()
            engine.step()
            losses.append(loss.item())
            if boundary:
                yield {
                    "loss": sum(losses) / len(losses),
                    "rate": engine.get_lr(),
                    "norm": engine.get_global_grad_norm(),
                    "scale": engine.cur_scale,
                }
                losses = []
            if engine.global_steps >= until:
                break


def counters(engine: Any) -> dict[str, Any]:
    return {
        "steps": engine.global_steps,
        "samples": engine.global_samples,
        "skipped": engine.skipped_steps,
        "data": engine.training_dataloader.state_dict(),
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert one.keys() == other.keys()
    return max(
        ((value.double() - other[name].double()).norm() / other[name].double().norm().clamp(min=1e-12)).item()
        for name, value in one.items()
    )


# saved at one world size and stage, loaded at another


@functools.cache
def uninterrupted(batch: int = TRAIN_BATCH) -> dict[str, Any]:
    """Plain torch in this process: losses, rates after each step, and weights at the end."""
    model = Small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    schedule = make_schedule(SchedulerConfig(**SCHEDULER), optimizer)
    position = Position(SAMPLES, 0, BatchSizes(batch, batch, 1, 1), 0, drop_last=False)
    losses, rates = [], []
    for step in range(LAST):
        loss = model(text()[position.indices(step * batch)])
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        rates.append(schedule.get_last_lr())
    return {"losses": losses, "rates": rates, "weights": whole(model)}


def begin(rank: int, stage: int, folder: Path, overrides: dict[str, Any]) -> list[float]:
    engine = engine_for(stage, **overrides)
    losses = [step["loss"] for step in steps(engine, SAVED)]
    engine.save_checkpoint(folder)
    return losses


def go_on(rank: int, stage: int, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    engine = engine_for(stage, seed=9, **overrides)
    path, client = engine.load_checkpoint(folder)
    found = {"path": path, "client": client, "loaded": counters(engine), "rate": engine.get_lr()}
    records = list(steps(engine, LAST))
    return {**found, "records": records, "finished": counters(engine), "weights": engine.module_state_dict()}


def all_along(rank: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """One rank at stage 0 that nobody interrupts."""
    engine = engine_for(0, **overrides)
    records = list(steps(engine, LAST))
    return {"losses": [step["loss"] for step in records], "weights": engine.module_state_dict()}


Route = tuple[int, int, int, int]  # world size and stage of the save, of the load


def routes() -> list[Route]:
    """From every stage at every world size to every world size, with all pairs of stages spread over the pairs of sizes."""
    pairs = enumerate(itertools.product(WORLD_SIZES, WORLD_SIZES))
    return [(size, stage, later, (stage + number) % 4) for number, (size, later) in pairs for stage in STAGES]


SOME_ROUTES: list[Route] = [(1, 0, 3, 2), (2, 1, 4, 3), (3, 3, 2, 1), (4, 2, 1, 0)]
WIDE_ROUTES: list[Route] = [(2, 1, MANY, 3), (MANY, 2, 3, 0)]


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    by_step = zip(*(rank["records"] for rank in ranks), strict=True)
    return [sum(step["loss"] for step in of_step) / len(ranks) for of_step in by_step]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_beginning_equals_plain_torch(started: dict[int, Outcomes], world_size: int, stage: int) -> None:
    ranks = started[world_size][f"begin {stage}"]
    losses = [sum(of_step) / world_size for of_step in zip(*ranks, strict=True)]
    assert losses == pytest.approx(uninterrupted()["losses"][:SAVED], rel=1e-6)


@pytest.mark.parametrize("route", [*routes(), *WIDE_ROUTES])
def test_a_run_goes_on_at_another_world_size_and_stage(
    resumed: dict[int, Outcomes], folder: Path, route: Route
) -> None:
    world_size, stage, later, _ = route
    batch = LARGE_BATCH if route in WIDE_ROUTES else TRAIN_BATCH
    wanted, ranks = uninterrupted(batch), resumed[later][str(route)]
    assert mean_losses(ranks) == pytest.approx(wanted["losses"][SAVED:], rel=1e-6)
    for rank in ranks:
        assert rank["path"] == str(place_of(folder, world_size, stage, batch) / f"global_step{SAVED}")
        assert rank["client"] == {}
        assert rank["rate"] == wanted["rates"][SAVED - 1]
        assert [step["rate"] for step in rank["records"]] == wanted["rates"][SAVED:]
        for when, count in (("loaded", SAVED), ("finished", LAST)):
            samples = count * batch
            data = {"samples": samples, "epoch": samples // SAMPLES, "seed": 0, "length": SAMPLES, "usable": SAMPLES}
            assert rank[when] == {"steps": count, "samples": samples, "skipped": 0, "data": data}
    assert distance(ranks[0]["weights"], wanted["weights"]) < 1e-6


@pytest.mark.parametrize("route", SOME_ROUTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_so_it_does_with_other_types_optimizers_and_offload(
    started: dict[int, Outcomes], resumed: dict[int, Outcomes], variant: str, route: Route
) -> None:
    wanted, ranks = started[1][f"all along {variant}"][0], resumed[route[2]][f"{variant} {route}"]
    of_losses, of_weights = BOUNDS.get(variant, EXACT)
    assert mean_losses(ranks) == pytest.approx(wanted["losses"][SAVED:], rel=of_losses)
    assert distance(ranks[0]["weights"], wanted["weights"]) < of_weights
    assert ranks[0]["loaded"]["steps"] == SAVED


# the same world size: bit for bit

BITWISE = [*itertools.product(STAGES, PRECISIONS), (1, "sgd"), (2, "lamb"), (3, "muon"), (1, "asgd")]
KINDS = {**PRECISIONS, **VARIANTS, "asgd": ASGD}


def seeded(rank: int) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank)


def dice(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of steps, each with a throw of every generator."""
    throw = lambda: (random.random(), np.random.normal(), np.random.random(), torch.rand(1).item())  # noqa: E731, NPY002
    return [{**record, "dice": throw()} for record in records]


def straight(rank: int, stage: int, kind: str, folder: Path) -> list[dict[str, Any]]:
    """All steps, with a save on the way that must not be felt."""
    engine = engine_for(stage, dropout=0.5, gradient_accumulation_steps=3, **KINDS[kind])
    seeded(rank)
    first = dice(steps(engine, SAVED))
    engine.save_checkpoint(folder)
    return first + dice(steps(engine, LAST))


def resume(rank: int, stage: int, kind: str, folder: Path) -> list[dict[str, Any]]:
    engine = engine_for(stage, seed=9, dropout=0.5, gradient_accumulation_steps=3, **KINDS[kind])
    engine.load_checkpoint(folder)
    return dice(steps(engine, LAST))


@pytest.mark.parametrize(("stage", "kind"), BITWISE)
def test_a_resumed_run_has_the_very_bits_of_an_uninterrupted_one(
    started: dict[int, Outcomes], resumed: dict[int, Outcomes], stage: int, kind: str
) -> None:
    name = f"bits {stage} {kind}"
    for wanted, found in zip(started[2][name], resumed[2][name], strict=True):
        assert len(wanted) == LAST
        assert found == wanted[SAVED:]
        assert len({step["loss"] for step in wanted}) == LAST
    if kind == "fp16":  # its scale grew on both sides of the save
        assert [step["scale"] for step in started[2][name][0]] == [16, 16, 16, 32, 32, 32, 64, 64]
    first, second = started[2][name]
    assert [step["dice"] for step in first] != [step["dice"] for step in second]


# schedules that are torch's


def sequence(optimizer: torch.optim.Optimizer) -> Any:
    """One schedule after another."""
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULES: dict[str, Any] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    "MultiStepLR": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4, 5], 0.5),
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
    "SequentialLR": sequence,
}


def torch_schedule(rank: int, kind: str, folder: Path) -> dict[str, Any]:
    def engine() -> Any:
        return engine_for(1, arguments={"lr_scheduler": SCHEDULES[kind]})

    def train(one: Any, until: int) -> list[Any]:
        found = []
        for record in steps(one, until):
            group = one.optimizer.param_groups[0]
            found.append((record["loss"], group["lr"], group["betas"]))
        return found

    first = engine()
    train(first, SAVED)
    first.save_checkpoint(folder)
    second = engine()
    second.load_checkpoint(folder)
    return {"wanted": train(first, LAST), "found": train(second, LAST)}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_torchs_schedules_go_on_too(resumed: dict[int, Outcomes], kind: str) -> None:
    for rank in resumed[2][f"torch_schedule {kind}"]:
        assert rank["found"] == rank["wanted"]
        assert len({rate for _, rate, _ in rank["wanted"]}) > 1


# what the config decides, not the checkpoint


def changed(rank: int, folder: Path) -> dict[str, Any]:
    """The checkpoint of two ranks at stage 1, loaded with another rate, decay, clipping and scale."""
    adam = {"lr": 0.5, "weight_decay": 0.25, "betas": [0.5, 0.6], "fused": True}
    engine = engine_for(
        1,
        seed=9,
        optimizer={"type": "AdamW", "params": adam},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}},
        gradient_clipping=0.0,
    )
    engine.load_checkpoint(folder)
    before, group = whole(engine.module), engine.optimizer.param_groups[0]
    found = {"rate": group["lr"], "decay": group["weight_decay"], "betas": group["betas"]}
    return {**found, "records": list(steps(engine, SAVED + 1)), "before": before, "after": whole(engine.module)}


def test_a_changed_config_takes_effect(resumed: dict[int, Outcomes]) -> None:
    for rank in resumed[2]["changed"]:
        assert (rank["rate"], rank["decay"], rank["betas"]) == (0.5, 0.25, (0.5, 0.6))
        (record,) = rank["records"]
        assert record["norm"] > CLIP
        # lr 0.5 against 0.02 before: the step is an order larger
        assert distance(rank["after"], rank["before"]) > 0.1


def clipping(rank: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """One step from the same checkpoint with SGD, whose update is as long as the clipped gradient."""
    found = []
    for clip in (CLIP, CLIP / 10):
        optimizer = {"type": "SGD", "params": {"lr": 1.0}}
        engine = engine_for(
            1, optimizer=optimizer, gradient_clipping=clip, scheduler={"type": "ConstantLR", "params": {"factor": 1.0}}
        )
        engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
        before = whole(engine.module)
        list(steps(engine, SAVED + 1))
        moved = {name: value - before[name] for name, value in whole(engine.module).items() if name != "head.weight"}
        found.append(math.sqrt(sum(value.double().square().sum().item() for value in moved.values())))
    return found


def test_changed_clipping_takes_effect(resumed: dict[int, Outcomes]) -> None:
    for rank in resumed[2]["clipping"]:
        assert rank == pytest.approx([CLIP, CLIP / 10], rel=1e-4)


def parts(rank: int, folder: Path) -> dict[str, Any]:
    """What is loaded of a checkpoint when only parts of it are asked for."""
    found: dict[str, Any] = {}
    asked = {
        "all": {},
        "module": {"load_module_only": True},
        "no optimizer": {"load_optimizer_states": False},
        "no schedule": {"load_lr_scheduler_states": False},
    }
    for name, arguments in asked.items():
        engine = engine_for(2, seed=9)
        path, _ = engine.load_checkpoint(folder, **arguments)
        assert path is not None
        found[name] = {
            "steps": engine.global_steps,
            "samples": engine.training_dataloader.state_dict()["samples"],
            "moments": len([state for state in engine.optimizer.state.values() if "exp_avg" in state]),
            "rate": engine.get_lr(),
            "weights": whole(engine.module),
        }
    return found


def test_parts_can_be_left_out(resumed: dict[int, Outcomes]) -> None:
    wanted, samples = uninterrupted()["rates"][SAVED - 1], SAVED * TRAIN_BATCH
    for rank in resumed[2]["parts"]:
        whole_one = rank["all"]
        assert whole_one["moments"] > 5
        facts = {name: (part["steps"], part["samples"], part["moments"], part["rate"]) for name, part in rank.items()}
        assert facts["all"] == (SAVED, samples, whole_one["moments"], wanted)
        assert facts["module"] == (0, 0, 0, [0.0])
        assert facts["no optimizer"] == (SAVED, samples, 0, wanted)
        assert facts["no schedule"] == (SAVED, samples, whole_one["moments"], [0.0])
        assert all(distance(part["weights"], whole_one["weights"]) == 0 for part in rank.values())


class Strided(nn.Module):
    """A trained and a frozen convolution whose weights lie in another order than their indices, and such a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trained, self.frozen = nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2)
        self.frozen.requires_grad_(requires_grad=False)
        self.register_buffer("grid", torch.randn(2, 3).t())
        self.to(memory_format=torch.channels_last)


def strided(rank: int, stage: int, folder: Path) -> dict[str, Any]:
    saved, loaded = (engine_for(stage, model=Strided(seed)) for seed in (1, 2))
    saved.save_checkpoint(folder)
    loaded.load_checkpoint(folder)
    return {"distance": distance(whole(loaded.module), whole(saved.module)), "grid": whole(loaded.module)["grid"]}


@pytest.mark.parametrize("stage", STAGES)
def test_what_lies_in_another_order_comes_back(resumed: dict[int, Outcomes], stage: int) -> None:
    for rank in resumed[2][f"strided {stage}"]:
        assert rank["distance"] == 0
        assert torch.equal(rank["grid"], Strided(1).grid)


# loading into an engine that has lived


def back(rank: int, stage: int, precision: str, folder: Path) -> dict[str, Any]:
    """Back to a checkpoint from before the first step, in the middle of a later one."""
    engine = engine_for(stage, gradient_accumulation_steps=3, **PRECISIONS[precision])
    engine.save_checkpoint(folder, tag="start")
    first = list(steps(engine, SAVED))
    batch = text()[:2]
    engine.backward(engine(batch) * 100)
    engine.step()
    engine.load_checkpoint(folder, tag="start")
    again = list(steps(engine, SAVED))
    return {"first": first, "again": again}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_can_go_back(resumed: dict[int, Outcomes], stage: int, precision: str) -> None:
    for rank in resumed[2][f"back {stage} {precision}"]:
        assert len(rank["first"]) == SAVED
        assert rank["again"] == rank["first"]


class Slowing(torch.optim.Optimizer):
    """An optimizer whose state is a number and a text, not a tensor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                state["mood"] = "slow"
                parameter.add_(parameter.grad, alpha=-0.1 / state["steps"])


def plain_optimizer_state(rank: int, folder: Path) -> dict[str, Any]:
    def engine() -> Any:
        return engine_for(2, scheduler=None, zero_allow_untested_optimizer=True, arguments={"optimizer": Slowing})

    first = engine()
    list(steps(first, SAVED))
    first.save_checkpoint(folder)
    second = engine()
    second.load_checkpoint(folder)
    states = [state for state in second.optimizer.state.values() if state]
    return {"wanted": list(steps(first, LAST)), "found": list(steps(second, LAST)), "states": states[0]}


def test_optimizer_state_that_is_no_tensor_comes_back(resumed: dict[int, Outcomes]) -> None:
    for rank in resumed[2]["plain_optimizer_state"]:
        assert rank["found"] == rank["wanted"]
        assert rank["states"]["mood"] == "slow"


def other_optimizers(rank: int, folder: Path) -> list[str]:
    """What is said where the config names another optimizer, or none of the checkpoint's is wanted."""
    kinds = ("SGD", "AdamW", "Adam", "Adagrad")
    found = [engine_for(1, optimizer={"type": kind, "params": {"lr": 0.01}}) for kind in kinds]
    list(steps(found[0], SAVED))
    found[0].save_checkpoint(folder, tag="sgd")
    list(steps(found[1], SAVED))
    found[1].save_checkpoint(folder, tag="adamw")
    words = [said(lambda: found[1].load_checkpoint(folder, "sgd")), said(lambda: found[3].load_checkpoint(folder))]
    found[1].load_checkpoint(folder, "sgd", load_optimizer_states=False)
    found[2].load_checkpoint(folder, "adamw")
    for engine in found[1:3]:
        list(steps(engine, SAVED + 1))
    return words


def test_state_of_another_optimizer_is_refused(resumed: dict[int, Outcomes]) -> None:
    for told, newest in resumed[2]["other_optimizers"]:
        assert told.endswith(
            "not loaded: rank 0: its optimizer state is that of SGD, and the optimizer is AdamW; use the same, or "
            "load_optimizer_states=False"
        )
        assert "that of AdamW, and the optimizer is Adagrad" in newest


# models that do not fit


class Larger(Small):
    """A parameter more."""

    def __init__(self) -> None:
        super().__init__(seed=9)
        self.extra = nn.Linear(5, 5)


class Smaller(Small):
    """A parameter less."""

    def __init__(self) -> None:
        super().__init__(seed=9)
        del self.unused


class Wider(Small):
    """Another shape."""

    def __init__(self) -> None:
        super().__init__(seed=9)
        self.unused = nn.Linear(3, 4)


def misfits(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in (Larger, Smaller, Wider):
        engine = engine_for(3, model=kind())
        before = whole(engine.module)
        try:
            engine.load_checkpoint(folder)
        except CheckpointError as error:
            found[kind.__name__] = str(error)
        found[f"{kind.__name__} untouched"] = distance(before, whole(engine.module)) == 0
        if kind is not Wider:
            engine.load_checkpoint(folder, load_module_strict=False)
            found[f"{kind.__name__} loose"] = counters(engine)["steps"], whole(engine.module)
    return found


def test_a_model_that_does_not_fit_is_refused_before_it_is_touched(resumed: dict[int, Outcomes]) -> None:
    first, second = resumed[2]["misfits"]
    said = {
        "Larger": "it has no 'extra.weight'; load_module_strict=False passes it over",
        "Smaller": "the model has no 'unused.weight'; load_module_strict=False passes it over",
        "Wider": "'unused.weight' has shape (3, 3), the model (4, 3); load it into the model that it was saved from",
    }
    for kind, text_of_it in said.items():
        assert first[kind] == second[kind]
        assert first[kind].endswith(text_of_it)
        assert first[f"{kind} untouched"]
    for kind in ("Larger", "Smaller"):
        loaded, weights = first[f"{kind} loose"]
        assert loaded == SAVED
        assert torch.equal(weights["shift"], Small().shift)


def without_frozen(rank: int, folder: Path) -> dict[str, Any]:
    engine = engine_for(2)
    list(steps(engine, 1))
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    other = engine_for(3, seed=9)
    own = whole(other.module)["frozen.weight"]
    try:
        other.load_checkpoint(folder)
        said = ""
    except CheckpointError as error:
        said = str(error)
    other.load_checkpoint(folder, load_module_strict=False)
    weights, loaded = whole(engine.module), whole(other.module)
    return {
        "said": said,
        "kept": torch.equal(loaded["frozen.weight"], own),
        "same": [name for name in weights if torch.equal(weights[name], loaded[name])],
    }


def test_frozen_parameters_can_be_left_out(resumed: dict[int, Outcomes]) -> None:
    for rank in resumed[2]["without_frozen"]:
        assert rank["said"].endswith("it has no 'frozen.weight'; load_module_strict=False passes it over")
        assert rank["kept"]
        assert set(Small().state_dict()) - set(rank["same"]) == {"frozen.weight", "frozen.bias"}


# what the user adds


class Counter:
    """Anything with a state."""

    def __init__(self) -> None:
        self.value = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "words": ["a", "b"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["words"] == ["a", "b"]
        self.value = state["value"]


def additions(rank: int, folder: Path) -> dict[str, Any]:
    client = {"best": 0.5, "history": torch.arange(3), "nested": {"names": ["x", None]}}
    engine, counter = engine_for(1), Counter()
    engine.register_state("counter", counter)
    counter.value += 7
    engine.save_checkpoint(folder, client_state=client)
    list(steps(engine, 1))
    engine.save_checkpoint()  # to where it saved last, with the client state given last
    other, its_counter, late = engine_for(2), Counter(), Counter()
    other.register_state("counter", its_counter)
    other.register_state("new since then", late)
    path, found = other.load_checkpoint(folder)
    return {"path": path, "client": found, "counter": its_counter.value, "late": late.value}


def test_client_state_and_registered_state_ride_along(resumed: dict[int, Outcomes]) -> None:
    for rank in resumed[2]["additions"]:
        assert Path(rank["path"]).name == "global_step1"
        assert rank["client"].pop("history").tolist() == [0, 1, 2]
        assert rank["client"] == {"best": 0.5, "nested": {"names": ["x", None]}}
        assert rank["counter"].tolist() == [7, 7]
        assert rank["late"].tolist() == [0, 0]


# a run that saves by itself


def by_itself(rank: int, root: Path) -> dict[str, Any]:
    """A run folder asks for a save every 2 steps, of which 2 stay; then another start goes on from there."""
    os.environ["HPCDS_RUN_DIR"] = str(root)
    try:
        first = engine_for(1)
        fresh = first.load_checkpoint()
        list(steps(first, 7))
        first.wait_for_checkpoint()
        names = sorted(path.name for path in (root / "checkpoints").iterdir())
        second = engine_for(3)
        path, _ = second.load_checkpoint()
        return {"fresh": fresh, "names": names, "path": path, "steps": second.global_steps}
    finally:
        del os.environ["HPCDS_RUN_DIR"]


def test_a_run_saves_by_itself_and_keeps_as_many_as_asked(resumed: dict[int, Outcomes], folder: Path) -> None:
    root = folder / "by_itself"
    for rank in resumed[2]["by_itself"]:
        assert rank["fresh"] == (None, {})
        assert rank["names"] == ["global_step4", "global_step6", "latest"]
        assert rank["path"] == str(root / "checkpoints" / "global_step6")
        assert rank["steps"] == 6
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "saved"] == [2, 4, 6]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [6]
    assert [event["loss"] for event in events if event["event"] == "step"] == pytest.approx(
        uninterrupted()["losses"][:7], rel=1e-6
    )


# the spawns: every world size saves, then every world size loads what all of them saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "by_itself").mkdir()
    asked = {"checkpoint": {"every_steps": 2, "keep": 2}}
    (folder / "by_itself" / "config.json").write_text(json.dumps(asked))
    return folder


def place_of(folder: Path, world_size: int, stage: int, batch: int = TRAIN_BATCH, variant: str = "") -> Path:
    return folder / f"world{world_size}-stage{stage}-batch{batch}-{variant}"


def to_start(world_size: int, folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for stage in STAGES if world_size in WORLD_SIZES else ():
        cases[f"begin {stage}"] = (begin, (stage, place_of(folder, world_size, stage), {}))
    for size, stage, _, _ in WIDE_ROUTES:
        if size == world_size:
            where, large = place_of(folder, size, stage, LARGE_BATCH), {"train_batch_size": LARGE_BATCH}
            cases[f"begin wide {stage}"] = (begin, (stage, where, large))
    for variant, (size, stage, _, _) in itertools.product(VARIANTS, SOME_ROUTES):
        if size == world_size:
            where = place_of(folder, size, stage, variant=variant)
            cases[f"begin {variant} {stage}"] = (begin, (stage, where, VARIANTS[variant]))
    if world_size == 1:
        cases |= {f"all along {variant}": (all_along, (asked,)) for variant, asked in VARIANTS.items()}
    for stage, kind in BITWISE if world_size == 2 else ():
        cases[f"bits {stage} {kind}"] = (straight, (stage, kind, folder / f"bits-{stage}-{kind}"))
    return cases


def to_resume(world_size: int, folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for number, (size, stage, later, later_stage) in enumerate(routes()):
        if later == world_size:
            folds = {"gradient_accumulation_steps": 3 if number % 2 and later != 3 else 1}
            cases[str((size, stage, later, later_stage))] = (go_on, (later_stage, place_of(folder, size, stage), folds))
    for route in WIDE_ROUTES:
        size, stage, later, later_stage = route
        if later == world_size:
            where, large = place_of(folder, size, stage, LARGE_BATCH), {"train_batch_size": LARGE_BATCH}
            cases[str(route)] = (go_on, (later_stage, where, large))
    for variant, route in itertools.product(VARIANTS, SOME_ROUTES):
        size, stage, later, later_stage = route
        if later == world_size:
            where = place_of(folder, size, stage, variant=variant)
            cases[f"{variant} {route}"] = (go_on, (later_stage, where, VARIANTS[variant]))
    return cases | (on_a_pair(folder) if world_size == 2 else {})


def on_a_pair(folder: Path) -> dict[str, Any]:
    """Everything that is asked of one world size only."""
    cases: dict[str, Any] = {}
    for stage, kind in BITWISE:
        cases[f"bits {stage} {kind}"] = (resume, (stage, kind, folder / f"bits-{stage}-{kind}"))
    for kind in SCHEDULES:
        cases[f"torch_schedule {kind}"] = (torch_schedule, (kind, folder / kind))
    for stage, precision in itertools.product(STAGES, ("fp32", "bf16")):
        cases[f"back {stage} {precision}"] = (back, (stage, precision, folder / f"back-{stage}-{precision}"))
    for function in (changed, clipping, parts, misfits):
        cases[function.__name__] = (function, (place_of(folder, 2, 1),))
    for stage in STAGES:
        cases[f"strided {stage}"] = (strided, (stage, folder / f"strided-{stage}"))
    for function in (plain_optimizer_state, other_optimizers, without_frozen, additions, by_itself):
        cases[function.__name__] = (function, (folder / function.__name__,))
    return cases


def each_size(to_do: Callable[[int, Path], dict[str, Any]], folder: Path) -> dict[int, Outcomes]:
    sizes = (*WORLD_SIZES, MANY)
    return {size: run_cases(size, to_do(size, folder), worlds=1 if size == MANY else 2) for size in sizes}


@pytest.fixture(scope="module")
def started(folder: Path) -> dict[int, Outcomes]:
    return each_size(to_start, folder)


@pytest.fixture(scope="module")
def resumed(started: dict[int, Outcomes], folder: Path) -> dict[int, Outcomes]:
    return each_size(to_resume, folder)
