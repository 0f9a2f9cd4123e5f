"""Parts of a model that ranks use differently, or that are used out of place, at stage 3: leaf modules and external parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from small import said
from standing import STAGES, Reference, distance, engine_for, micro_batches, values_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_ds import zero

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ranks

WIDTH, EXPERTS, SAMPLES, STEPS = 4, 5, 12, 3


class Experts(nn.Module):
    """Sends each sample to one expert; samples of one micro-batch use some of the experts, and the last is never used.

    The weight of the fourth is used without calling it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        gate, y = torch.sigmoid(self.gate(x)), torch.zeros_like(x)
        for number in chosen.unique().tolist():
            expert, rows = self.experts[number], chosen == number
            found = x[rows] @ expert.weight.t() if number == 3 else expert(x[rows])
            y = y.index_put((rows,), found)
        return {"mixed": x + gate * y}


class Mixture(nn.Module):
    """Blocks of experts between layers, and experts outside of any block; as ``scattered`` these are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.last = Experts()
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        x = self.layers[0](x, chosen)["mixed"]
        x = checkpoint(self.layers[1], x, chosen, use_reentrant=False)["mixed"]
        return self.out(self.last(x, chosen)["mixed"]).square().mean()


def routed(number: int) -> torch.Tensor:
    """(samples, width); the samples of each rank go to experts of their own, and not to the same in each step."""
    x = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(number)).abs()
    rank = (torch.arange(SAMPLES) // (SAMPLES // 2) + number) % 2  # one micro-batch a rank
    x[:, 1] *= 2 * rank - 1
    x[:, 0] *= 2 * (torch.arange(SAMPLES) % 2) - 1 if number == 0 else 1
    return x


def train(_: int, how: str, stage: int) -> dict[str, torch.Tensor]:
    model, config = Mixture(), {}
    if how == "called":
        assert len(zero.set_leaf_modules(model, [Experts])) == 3
    else:
        config = {"leaf_module": {"names": "last", "name_suffixes": ["layers.0", "layers.1"]}}
    engine = engine_for(stage, model=model, zero_optimization={"stage": stage, **config})
    for number in range(STEPS):
        (batch,) = micro_batches(engine, routed(number))
        engine.backward(engine(batch))
        engine.step()
    return values_of(engine)


@pytest.mark.parametrize(("how", "stage"), [*(("called", stage) for stage in STAGES), ("config", 3)])
def test_ranks_use_different_experts_as_one_process_does(pair: Outcomes, how: str, stage: int) -> None:
    wanted = Reference(model=Mixture(), parts=(2, 1))
    begun = wanted.values
    for number in range(STEPS):
        wanted.step(routed(number))
    assert torch.equal(
        wanted.values["last.experts.4.weight"], begun["last.experts.4.weight"]
    )  # neither moved nor decayed
    assert not torch.equal(wanted.values["last.experts.3.weight"], begun["last.experts.3.weight"])
    for values in pair[f"train {how} {stage}"]:
        assert distance(values, wanted.values) < 1e-6


class Layers(nn.Module):
    """Experts in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x, chosen)["mixed"], chosen)["mixed"].sum()


def different(rank: int) -> str:
    engine = engine_for(3, model=Layers())
    engine.backward(engine(torch.ones(6, WIDTH), torch.full((6,), rank)))
    return said(engine.step)


def test_without_the_mark_it_is_refused(pair: Outcomes) -> None:
    for message in pair["different"]:
        assert "1 of 2 ranks used this parameter" in message
        assert "hpc_ds.zero.set_leaf_modules" in message


def test_modules_are_marked_by_class_name_and_end_of_name() -> None:
    model = Mixture()
    assert zero.get_leaf_modules(model) == []
    assert zero.set_leaf_modules(model, ["Experts"]) == zero.get_leaf_modules(model) != []
    assert zero.is_leaf_module(model.last)
    assert len(zero.unset_leaf_modules(model, [f"{Experts.__module__}.Experts", "Other"])) == 3
    assert zero.set_leaf_modules_by_name(model, ["last", "none"], raise_if_not_found=False) == ([model.last], ["none"])
    assert zero.set_leaf_modules_by_suffix(model, [".0"], flag=False)[0][0] is model.layers[0]
    zero.set_leaf_module(model.last, flag=False)
    assert zero.get_leaf_modules(model) == []
    for wrong in (
        lambda: zero.set_leaf_modules(model, ["Expert"]),
        lambda: zero.set_leaf_modules_by_name(model, ["lost"]),
        lambda: zero.set_leaf_modules_by_suffix(model, [".7"]),
    ):
        assert "; name one it has" in said(wrong)


class Borrowing(nn.Module):
    """The first layer's weight is used once more, after that layer has ended, by the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x @ self.layers[0].weight).square().mean()


def borrow(_: int, stage: int, how: Callable[[nn.Module], None] | None) -> dict[str, Any]:
    model = Borrowing()
    if how is not None:
        how(model)
    engine = engine_for(stage, model=model)
    if how is None:
        return {"said": said(lambda: engine(torch.ones(6, WIDTH)))}
    for number in range(STEPS):
        (batch,) = micro_batches(engine, routed(number))
        engine.backward(engine(batch))
        engine.step()
    weight = model.layers[0].weight
    late = said(lambda: zero.register_external_parameter(model, weight)) if stage == 3 else ""
    marked = said(lambda: zero.set_leaf_modules(model, [nn.Linear])) if stage == 3 else ""
    return {"values": values_of(engine), "late": late, "marked": marked}


def register(model: nn.Module) -> None:
    zero.register_external_parameter(model, model.layers[0].weight)


def register_and_shard(model: nn.Module) -> None:
    register(model)
    zero.Init(module=model)


def by_gathering(model: nn.Module) -> None:
    zero.Init(module=model)
    with zero.GatheredParameters(model.layers[0].weight, fwd_module=model):
        pass


@pytest.mark.parametrize("case", ["2 register", "3 register", "3 register_and_shard", "3 by_gathering"])
def test_an_external_parameter_is_whole_where_it_is_used(pair: Outcomes, case: str) -> None:
    wanted = Reference(model=Borrowing(), parts=(2, 1))
    for number in range(STEPS):
        wanted.step(routed(number))
    for rank in pair[f"borrow {case}"]:
        assert distance(rank["values"], wanted.values) < 1e-6
        if case[0] == "3":
            assert "call it before initialize" in rank["late"]
            assert "mark it before initialize" in rank["marked"]


def test_unregistered_it_fails(pair: Outcomes) -> None:
    for rank in pair["borrow unregistered"]:
        assert rank["said"].startswith("ConfigError: parameter: its data was used as if it were whole")
        assert "register_external_parameter" in rank["said"]


def test_what_is_no_parameter_is_refused() -> None:
    model = Borrowing()
    assert "a Borrowing and a Tensor; pass a module" in said(
        lambda: zero.register_external_parameter(model, torch.ones(1))
    )
    assert "is not registered" in said(lambda: zero.unregister_external_parameter(model, model.layers[0].weight))
    register(model)
    zero.unregister_external_parameter(model, model.layers[0].weight)
    assert "is not registered" in said(lambda: zero.unregister_external_parameter(model, model.layers[0].weight))


def generate(rank: int, stage: int) -> dict[str, Any]:
    """Each rank calls the model as often as it likes, then both train."""
    model = Borrowing()
    register(model)
    engine = engine_for(stage, model=model)
    (batch,) = micro_batches(engine, routed(0))
    engine.backward(engine(batch))
    engine.step()
    with zero.unwrap_model_for_generation(engine) as whole, torch.no_grad():
        shapes = {tuple(value.shape) for value in whole.module.parameters()}
        found = [whole(routed(5)).item() for _ in range(2 + 3 * rank)] + [model(routed(5)).item()]
        kinds = {type(value) for value in whole.module.parameters()}
    for number in (1, 2):
        (batch,) = micro_batches(engine, routed(number))
        engine.backward(engine(batch))
        engine.step()
    return {"shapes": shapes, "found": set(found), "kinds": kinds == {nn.Parameter}, "values": values_of(engine)}


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_generate_by_themselves(pair: Outcomes, stage: int) -> None:
    wanted = Reference(model=Borrowing(), parts=(2, 1))
    for number in range(STEPS):
        wanted.step(routed(number))
    for rank in pair[f"generate {stage}"]:
        assert rank["shapes"] == {(WIDTH, WIDTH), (WIDTH,)}
        assert rank["kinds"]
        assert len(rank["found"]) == 1
        assert rank["found"] == pair[f"generate {stage}"][0]["found"]
        assert distance(rank["values"], wanted.values) < 1e-6


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    """What two ranks did in all cases of this file."""
    cases: dict[str, Any] = {f"train called {stage}": (train, ("called", stage)) for stage in STAGES}
    cases |= {"train config 3": (train, ("config", 3)), "different": (different, ())}
    cases |= {"borrow 2 register": (borrow, (2, register)), "borrow unregistered": (borrow, (3, None))}
    cases |= {f"borrow 3 {how.__name__}": (borrow, (3, how)) for how in (register, register_and_shard, by_gathering)}
    cases |= {f"generate {stage}": (generate, (stage,)) for stage in (1, 3)}
    return run_cases(2, cases, worlds=2)
