"""Optimizers, parameter groups and schedules of the client's own are used as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Outcomes, run_cases
from standing import (
    ADAMW,
    DECAY,
    RATE,
    STAGES,
    STEPS,
    Reference,
    Standing,
    advance,
    batches,
    config,
    distance,
    engine_for,
    values_of,
)
from torch import nn

import hpc_ds

pytestmark = pytest.mark.ranks


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
    return values_of(engine)


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
    make = CLIENTS[how]
    wanted = Reference(ADAMW if make is None else lambda named: make(list(named.values())))
    for batch in batches():
        wanted.step(batch)
    for weights in pair[f"client_optimizer {how} {stage}"]:
        assert distance(weights, wanted.values) < 1e-6


def half_optimized(rank: int, stage: int) -> dict[str, Any]:
    """Only the blocks are given to the optimizer, but everything needs gradients."""
    model = Standing(seed=1 + rank)
    engine = engine_for(stage, model=model, arguments={"model_parameters": list(model.blocks.parameters())})
    norms = []
    for batch in batches():
        advance(engine, batch)
        norms.append(engine.get_global_grad_norm())
    return {"weights": values_of(engine), "norms": norms}


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_no_optimizer_takes_do_not_pile_up(pair: Outcomes, stage: int) -> None:
    wanted = Reference(lambda named: ADAMW({name: value for name, value in named.items() if name.startswith("blocks")}))
    for batch in batches():
        wanted.step(batch)
    for rank in pair[f"half_optimized {stage}"]:
        assert distance(rank["weights"], wanted.values) < 1e-6
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
    return {"weights": values_of(engine), "rates": rates}


@pytest.mark.parametrize("how", ["instance", "callable"])
def test_a_clients_schedule_steps_once_a_step(pair: Outcomes, how: str) -> None:
    wanted = Reference()
    schedule = warm_up(wanted.optimizer)
    for batch in batches():
        wanted.step(batch)
        schedule.step()
    for rank in pair[f"client_schedule {how}"]:
        assert rank["rates"] == [pytest.approx([RATE * (step + 1) / 10]) for step in range(STEPS)]
        assert distance(rank["weights"], wanted.values) < 1e-6


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    """What two ranks did in all cases of this file."""
    cases: dict[str, Any] = {f"client_schedule {how}": (client_schedule, (how,)) for how in ("instance", "callable")}
    for stage in STAGES:
        cases |= {f"client_optimizer {how} {stage}": (client_optimizer, (stage, how)) for how in CLIENTS}
        cases[f"half_optimized {stage}"] = (half_optimized, (stage,))
    return run_cases(2, cases, worlds=2)
