"""``zero.Init``: models that are sharded while they are made train as if they had been made whole."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from small import said
from standing import (
    STAGES,
    Standing,
    advance,
    batches,
    distance,
    engine_for,
    live_bytes,
    reference,
    values_of,
)
from torch import nn

from hpc_ds.engine.fully_sharded import FullySharded
from hpc_ds.zero import GatheredParameters, Init, ZeroParamStatus

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks

ATTRIBUTES = ("ds_id", "ds_shape", "ds_numel", "ds_status", "ds_tensor")


class Odd(nn.Module):
    """Writes to the parameters of the modules that it has made, in the ways of constructors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.later = nn.Linear(2, 2)
        nn.init.normal_(self.one.weight)
        self.one.weight.data.mul_(2)
        self.two.weight.data = torch.ones(1, 5)
        views = [self.later.weight[1], self.two.weight.data[0], self.one.weight[2:]]
        with torch.no_grad():
            for number, view in enumerate(views):
                view.fill_(number)
            self.two.bias[0] = 3.0
            self.one.bias.fill_(1)
        self.three.weight = nn.Parameter(torch.eye(2))
        self.tied = nn.Linear(3, 5)
        self.tied.weight = self.one.weight
        self.apply(self.fill)

    def fill(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.out_features == 2:
            module.weight.data.uniform_(-1 / module.weight.shape[1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x) + self.tied(x)) * self.gain


def made(rank: int) -> dict[str, Any]:
    """What a script sees of an early sharded model."""
    torch.manual_seed(3 + rank)
    with Init(enabled=False):
        whole = Odd()
    torch.manual_seed(3 + rank)
    untouched = nn.Module.apply
    with Init():
        model = Odd()
    assert nn.Module.apply is untouched
    seen = [tuple(getattr(value, name) for name in ATTRIBUTES) for value in model.parameters()]
    elements = [(value.numel(), value.dtype) for value in model.parameters()]
    refused = said(lambda: model(torch.ones(1, 3)))
    with GatheredParameters(model.parameters()):
        found = {name: value.detach().clone() for name, value in model.named_parameters()}
        shown = {value.ds_status for value in model.parameters()}
        output = model(torch.ones(1, 3)).detach()
    assert not any(hasattr(value, "ds_id") for value in whole.parameters())
    return {
        "seen": seen, "elements": elements, "said": refused, "values": found, "shown": shown, "output": output,
        "wanted": dict(whole.state_dict(keep_vars=False)), "tied": model.tied.weight is model.one.weight,
        "after": [value.numel() for value in model.parameters()],
    }  # fmt: skip


def test_a_model_made_inside_has_rank_0s_values_and_nothing_in_its_parameters(pair: Outcomes) -> None:
    ranks = pair["made"]
    wanted = ranks[0]["wanted"]
    shapes = {name: value.shape for name, value in ranks[0]["values"].items()}
    for number, rank in enumerate(ranks):
        assert rank["tied"]
        assert all(torch.equal(value, wanted[name]) for name, value in rank["values"].items())
        assert rank["elements"] == [(0, torch.float32)] * len(shapes)
        assert rank["after"] == [0] * len(shapes)
        assert rank["shown"] == {ZeroParamStatus.AVAILABLE}
        assert torch.equal(rank["output"], ranks[0]["output"])
        for (ds_id, shape, numel, status, part), (name, value) in zip(
            rank["seen"], rank["values"].items(), strict=True
        ):
            assert (shape, numel, status) == (shapes[name], shapes[name].numel(), ZeroParamStatus.NOT_AVAILABLE)
            length = -(-numel // 2)
            own = value.flatten()[number * length : (number + 1) * length]
            assert part.shape == (length,)
            assert torch.equal(part[: own.numel()], own)
            assert isinstance(ds_id, int)
        assert [each[0] for each in rank["seen"]] == [each[0] for each in ranks[0]["seen"]]
        assert rank["said"].startswith("ConfigError: parameter 'gain' of a Odd: it was sharded by zero.Init, and this")


def gathering(rank: int) -> dict[str, Any]:
    """Nested contexts, writers, errors inside, parameters of nobody."""
    model = nn.Linear(3, 2)
    Init(module=model)
    other = nn.Linear(2, 2)

    def value() -> float:
        with GatheredParameters([model.weight, other.weight], modifier_rank=None):
            return float(model.weight[0, 0])

    def write(number: float, modifier_rank: int | None) -> None:
        with GatheredParameters(iter([model.weight, model.weight]), modifier_rank=modifier_rank):
            if modifier_rank in {None, rank}:
                model.weight.data.fill_(number)

    seen = []
    for number, writer in ((1.0, 0), (2.0, 1), (3.0, None)):
        write(number, writer)
        seen.append(value())
    with GatheredParameters(model.parameters()):
        write(4.0, 0)
        seen.append(float(model.weight[0, 0]))
    seen.append(value())
    with contextlib.suppress(ZeroDivisionError), GatheredParameters(model.weight, modifier_rank=0):
        model.weight.data.fill_(5.0)
        raise ZeroDivisionError
    seen.append(value())
    with GatheredParameters(model.weight, enabled=False):
        sizes = [model.weight.numel(), model.bias.numel()]

    def reshape() -> None:
        with GatheredParameters(model.weight, modifier_rank=0):
            model.weight.data = torch.zeros(7)

    return {"seen": seen, "sizes": sizes, "said": said(reshape), "after": value()}


def test_gathered_parameters_are_whole_inside_and_keep_what_the_writer_wrote(pair: Outcomes) -> None:
    for rank in pair["gathering"]:
        assert rank["seen"] == [1.0, 2.0, 2.0, 4.0, 4.0, 4.0]
        assert rank["sizes"] == [0, 0]
        assert rank["said"].startswith(
            "ConfigError: parameter of shape (2, 3): its data was replaced by one of shape (7,)"
        )
        assert rank["after"] == 4.0


def copied(_: int) -> dict[str, Any]:
    """Copies of what has no elements, and of what has."""
    model = nn.Sequential(nn.Linear(3, 2))
    Init(module=model)
    empty = copy.deepcopy(model)
    with GatheredParameters(model.parameters()):
        whole = copy.deepcopy(model)
        output = model(torch.ones(1, 3))
    return {
        "forward": said(lambda: empty(torch.ones(1, 3))),
        "initialize": said(lambda: engine_for(0, model=empty)),
        "same": torch.equal(output, engine_for(3, model=whole)(torch.ones(1, 3))),
    }


def test_a_copy_has_what_was_there_to_copy(pair: Outcomes) -> None:
    for rank in pair["copied"]:
        for message in (rank["forward"], rank["initialize"]):
            assert message.startswith(
                "ConfigError: model: it has a copy of a Linear that was sharded by zero.Init, with nothing"
            )
        assert rank["same"]


def arguments(_: int) -> dict[str, Any]:
    """What is refused, what is harmless, types, nesting, and an error inside."""
    refused = {
        name: said(lambda given={name: value}: Init(**given))
        for name, value in (
            ("remote_device", "nvme"), ("mpu", object()), ("zero_quantized_weights", True), ("param_swapper", object()),
            ("zero_param_parallel_group", object()), ("config_dict_or_path", "no such file.json"),
            ("config", {"zero_optimization": {"offload_param": {"device": "nvme"}}}),
        )
    }  # fmt: skip
    before = torch.get_default_dtype()
    with Init(dtype=torch.bfloat16, mem_efficient_linear=False, pin_memory=True, zero_quantized_weights=False):
        half = nn.Linear(2, 2)
        with Init(remote_device="cpu"):
            inner = nn.Sequential(nn.Linear(2, 2))
        sizes = [value.numel() for value in (*half.parameters(), *inner.parameters())]
        meta = nn.Linear(2, 2, device="meta")
    with contextlib.suppress(ZeroDivisionError), Init():
        left = nn.Linear(2, 2)
        raise ZeroDivisionError
    converted = nn.Linear(2, 2)
    Init(module=converted, dtype=torch.float16)
    return {
        "refused": refused,
        "sizes": sizes,
        "dtypes": {each.weight.dtype for each in (half, inner[0])} | {before, torch.get_default_dtype()},
        "meta": meta.weight.is_meta and meta.weight.shape,
        "left": left.weight.shape,
        "converted": converted.weight.dtype,
        "later": nn.Linear(2, 2).weight.numel(),
    }


def test_arguments_are_refused_or_mean_what_they_mean(pair: Outcomes) -> None:
    for rank in pair["arguments"]:
        assert rank["sizes"] == [4, 2, 0, 0]  # the outer context has not ended
        assert rank["dtypes"] == {torch.bfloat16, torch.float32}
        assert (rank["meta"], rank["left"], rank["later"]) == (torch.Size([2, 2]), torch.Size([2, 2]), 4)
        assert rank["converted"] == torch.float16
        for name, message in rank["refused"].items():
            assert message.startswith("ConfigError: "), name
            assert "; " in message, name


def started(_: int, model: nn.Module, stage: int) -> dict[str, Any]:
    """The engine is made and used before the context has ended."""
    engine = engine_for(stage, model=model)
    losses = [advance(engine, batch) for batch in batches()]
    return {"values": values_of(engine), "losses": losses, "tied": True, "left": 0}


def train(rank: int, stage: int, how: str, folder: Path) -> dict[str, Any]:
    """Train an early sharded model, save, and go on from there with another one."""

    def sharded() -> nn.Module:
        if how == "module":
            model = Standing(seed=1 + rank)
            Init(module=model)
            return model
        with Init():
            return Standing(seed=1 + rank)

    if how == "within":
        with Init():
            return started(rank, Standing(seed=1 + rank), stage)
    given = sharded()
    first = list(given.parameters())
    optimizer = torch.optim.AdamW(given.parameters(), lr=1e-2, weight_decay=0.1) if how == "module" else None
    engine = engine_for(stage, model=given, arguments={"optimizer": optimizer})
    left = [value for value in first for name in ATTRIBUTES if hasattr(value, name)]
    tied = given.head.weight is given.tokens.weight
    losses = [advance(engine, batch) for batch in batches()[:2]]
    engine.save_checkpoint(folder)
    other = engine_for(stage, model=sharded())
    other.load_checkpoint(folder)
    losses += [advance(other, batch) for batch in batches()[2:]]
    return {"values": values_of(other), "losses": losses, "tied": tied, "left": len(left)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["context", "module", "within"])
def test_training_after_init_is_training_without_it(pair: Outcomes, how: str, stage: int) -> None:
    for rank in pair[f"train {how} {stage}"]:
        assert distance(rank["values"], reference().values) < 1e-6
        assert rank["tied"]
        assert rank["left"] == 0


WIDTH, LAYERS = 128, 6
BLOCK = 2 * (WIDTH * WIDTH + WIDTH) * 4  # bytes


class Deep(nn.Module):
    """Blocks only; notes the most bytes alive whenever one has been made."""

    def __init__(self, most: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.one(most) for _ in range(LAYERS))

    def one(self, most: list[int]) -> nn.Module:
        layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        most.append(live_bytes())
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def peak(_: int, held: bool) -> dict[str, float]:
    """What is alive at the worst moment of making and of initialize, over the bytes of the whole model.

    With ``held``, a client's optimizer has the parameters meanwhile.
    """
    gc.collect()
    before, most = live_bytes(), []
    with Init():
        model = Deep(most)
    made_of = (max(most) - before) / (LAYERS * BLOCK)
    fill, during = FullySharded._fill, []

    def counting(self: FullySharded, *args: Any, **kwargs: Any) -> None:
        fill(self, *args, **kwargs)
        gc.collect()
        during.append(live_bytes() - before)

    FullySharded._fill = counting
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if held else None
    try:
        engine = engine_for(3, model=model, arguments={"optimizer": optimizer})
    finally:
        FullySharded._fill = fill
    gc.collect()
    return {
        "made": made_of,
        "during": max(during) / (LAYERS * BLOCK),
        "after": (live_bytes() - before) / (LAYERS * BLOCK),
        "elements": sum(value.numel() for value in engine.module.parameters()),
    }


@pytest.mark.parametrize("held", [False, True])
def test_no_rank_ever_holds_more_than_a_block_and_its_shards(pair: Outcomes, held: bool) -> None:
    for rank in pair[f"peak {held}"]:
        share = 1 / LAYERS
        assert rank["made"] < 0.5 + 1.1 * share
        assert rank["during"] < 0.5 + 2.1 * share
        assert rank["after"] < 0.55


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What two ranks did in all cases of this file."""
    folder = tmp_path_factory.mktemp("early")
    cases: dict[str, Any] = {
        "made": (made, ()),
        "gathering": (gathering, ()),
        "arguments": (arguments, ()),
        "copied": (copied, ()),
    }
    cases |= {f"peak {held}": (peak, (held,)) for held in (False, True)}
    cases |= {
        f"train {how} {stage}": (train, (stage, how, folder / f"{how}-{stage}"))
        for how in ("context", "module", "within")
        for stage in STAGES
    }
    return run_cases(2, cases, worlds=2)
