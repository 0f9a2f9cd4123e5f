"""Any nn.Module trains as it does in one process: at every stage, in fp32 and bf16.

Each model is one difficulty. All take (samples, 6) floats and return their loss, alone or in something.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from standing import DECAY, PRECISIONS, RATE, SAMPLES, STAGES, Reference, distance, engine_for, micro_batches, values_of
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ranks

WIDTH, STEPS, ACCUMULATION = 6, 3, 2
# See test_laws.py: fp32 differs by the order of sums, bf16 by masters that round to the other neighbour.
BOUNDS = {"fp32": 1e-6, "bf16": 4e-3}


class Layer(nn.Module):
    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class OddShapes(nn.Module):
    """Shapes that cannot be divided, empty ones, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(1, WIDTH))
        self.thin = nn.Parameter(torch.randn(3, 1, 2))
        self.nothing = nn.Parameter(torch.zeros(0))
        self.no_rows = nn.Parameter(torch.zeros(0, 4))
        self.no_columns = nn.Parameter(torch.zeros(4, 0))
        self.number = nn.Parameter(torch.tensor(0.7))
        self.fixed_number = nn.Parameter(torch.tensor(0.3), requires_grad=False)
        self.whole_numbers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.layer = Layer(hidden=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x * self.one) * self.number + self.fixed_number
        empty = self.nothing.sum() + self.no_rows.sum() + (self.no_columns @ self.no_rows).sum()
        return (x.square().mean() + empty) * self.thin.square().sum() + self.whole_numbers.sum()


class Strided(nn.Module):
    """Parameters that are not contiguous, and the weights of a convolution in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(WIDTH, 4).t())
        self.spread = nn.Parameter(torch.randn(WIDTH, 2)[:, 0])
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, (1, 3), padding=(0, 1)) for _ in range(2))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x * self.spread, self.turned)
        image = x.view(-1, 2, 1, 2)
        for layer in self.layers:
            image = layer(image)
        return image.square().mean()


class Nested(nn.Module):
    """Lists in lists, dicts and sequences; some layers are called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        self.branches = nn.ModuleDict({"left": Layer(3), "right": nn.Sequential(Layer(2), nn.LayerNorm(WIDTH))})
        self.list = nn.ParameterList([torch.randn(WIDTH), torch.randn(WIDTH)])
        self.never = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in (*self.stages, self.stages[0]):
            for layer in stage:
                x = layer(x)
        x = self.branches["left"](x) + self.branches["right"](x)
        return (x * self.list[0] + self.list[1]).square().mean()


class Tied(nn.Module):
    """One weight in three places, two of them blocks, and a frozen tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.layers[2].up.weight = self.layers[0].up.weight
        self.out = nn.Linear(WIDTH, 5)
        self.out.weight = self.layers[0].up.weight
        self.first, self.second = (nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(self.second(self.first(x))).square().mean()


class Adapters(nn.Module):
    """Frozen blocks with trained matrices beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer().requires_grad_(requires_grad=False) for _ in range(2))
        for layer in self.layers:
            layer.down.register_parameter("low", nn.Parameter(torch.randn(WIDTH, 2) / 4))
            layer.up.bias.requires_grad_()
        self.frozen = nn.ModuleList(Layer().requires_grad_(requires_grad=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.frozen):
            x = layer(x)
        return x.square().mean()


class Adapted(Adapters):
    """The blocks use what was added to them."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.down.register_forward_hook(lambda module, _args, out: out + out @ module.low @ module.low.t())


class Checkpointed(nn.Module):
    """Activation checkpointing of blocks."""

    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x.square().mean()


class CheckpointedReentrant(Checkpointed):
    """In the older way, whose backward passes are nested."""

    use_reentrant = True


class InParts(CheckpointedReentrant):
    """A layer gets its gradient in two of the nested passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[0]


class Sparse(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, WIDTH, sparse=True)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.tokens((x > 0).long().sum(1))
        for layer in self.layers:
            words = layer(words)
        return (words * x).square().mean()


@dataclass
class Batch:
    values: torch.Tensor
    scale: float


@dataclass
class Found:
    loss: torch.Tensor
    hidden: list[torch.Tensor]


class Keyed(nn.Module):
    """Takes a dataclass by keyword and returns one; so do its blocks."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, *, batch: Batch, more: dict[str, Any]) -> Batch:
            weight = self.layer.up.weight
            return Batch(self.layer(batch.values.to(weight.dtype)) * more["factor"], batch.scale)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Part() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = Batch(x, 0.5)
        for layer in self.layers:
            batch = layer(batch=batch, more={"factor": torch.full((1,), batch.scale)})
        return batch.values.square().mean()


class NormedLayer(nn.Module):
    """Batch normalisation inside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


class Buffers(nn.Module):
    """Running statistics that change in forward, and buffers that are replaced, absent, and of a larger type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NormedLayer() for _ in range(2))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("nothing", None)
        self.register_buffer("constant", torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        for layer in self.layers:
            x = layer(x)
        return (x * self.constant.sum().to(x.dtype)).square().mean()


class Recurrent(nn.Module):
    """torch's own layers that read their parameters in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(x.view(-1, 3, 2))
        x, _ = self.attention(x, x, x)
        return self.normed(x).square().mean()


class Mixed(nn.Module):
    """Modules of three types in one model, small and large, cast between them as such models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.layers[1].down.bfloat16()
        self.layers[1].down.register_forward_pre_hook(lambda _module, args: (args[0].bfloat16(),))
        self.rounded, self.exact = Layer().bfloat16(), Layer(hidden=6000).double()
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        x = self.rounded(x.bfloat16())
        return (self.exact(x.double()) * self.gain).square().mean()


class Double(nn.Module):
    """All in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.gain = nn.Parameter(torch.tensor(0.4))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.gain.dtype)
        for layer in self.layers:
            x = layer(x)
        return (x * self.gain).square().mean()


class NoLists(nn.Module):
    """Blocks that are attributes: nobody finds them, so a config names them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.alone = Layer(), Layer(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alone(self.second(self.first(x))).square().mean()


KINDS = (
    OddShapes, Strided, Nested, Tied, Adapted, Checkpointed, CheckpointedReentrant, InParts, Sparse, Keyed, Buffers, Recurrent,
    NoLists,
)  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {kind.__name__: kind for kind in KINDS}
IN_FP32 = {kind.__name__: kind for kind in (Mixed, Double)}
NAMED = {"NoLists": ["Layer"]}
CASES = [
    (name, precision, stage)
    for name, precision, stage in itertools.product((*MODELS, *IN_FP32), BOUNDS, STAGES)
    if (name not in IN_FP32 or precision == "fp32") and (name, stage) != ("InParts", 3)
]


@functools.cache
def inputs() -> torch.Tensor:
    """(steps, samples, width)."""
    return torch.randn(STEPS, SAMPLES, WIDTH, generator=torch.Generator().manual_seed(5))


def make(name: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return {**MODELS, **IN_FP32}[name]()


def train(rank: int, name: str, stage: int, precision: str) -> dict[str, Any]:
    engine = engine_for(
        stage,
        model=make(name, seed=1 + rank),
        gradient_accumulation_steps=1 if name in IN_FP32 else ACCUMULATION,
        zero_optimization={"stage": stage, "blocks": NAMED.get(name)},
        **PRECISIONS[precision],
    )
    losses, norms = [], []
    for batch in inputs():
        losses.append([])
        for micro_batch in micro_batches(engine, batch):
            loss = engine(micro_batch)
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
        norms.append(engine.get_global_grad_norm())
    return {
        "losses": [sum(of_step) / len(of_step) for of_step in losses],
        "norms": norms,
        "values": values_of(engine),
        "parts": len(micro_batches(engine, inputs()[0])),
    }


@pytest.mark.parametrize(("name", "precision", "stage"), CASES)
def test_it_trains_as_in_one_process(pair: Outcomes, name: str, precision: str, stage: int) -> None:
    ranks = pair[f"{name} {precision} {stage}"]
    wanted = Reference(model=make(name), precision=precision, parts=(2, ranks[0]["parts"]))
    for batch in inputs():
        wanted.step(batch)
    bound = BOUNDS[precision]
    losses = [sum(of_step) / 2 for of_step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(wanted.losses, rel=bound)
    buffers = {key for key, _ in wanted.model.named_buffers()}  # each rank has its own
    for rank in ranks:
        assert rank["norms"] == pytest.approx(wanted.norms, rel=bound)
        assert rank["values"].keys() == wanted.values.keys()
        assert (
            distance(*({k: v for k, v in some.items() if k not in buffers} for some in (rank["values"], wanted.values)))
            < bound
        )


def where_parameters_begin(rank: int, stage: int, precision: str) -> list[int]:
    model = make("OddShapes")
    engine_for(stage, model=model, **PRECISIONS[precision])
    return [
        parameter.data_ptr() % 16 for parameter in model.parameters() if parameter.requires_grad and parameter.numel()
    ]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", BOUNDS)
def test_parameters_begin_where_kernels_want_them(pair: Outcomes, precision: str, stage: int) -> None:
    """torch's grouped matrix product, for one, refuses others."""
    for begins in pair[f"where_parameters_begin {precision} {stage}"]:
        assert set(begins) == {0}


def in_parts(rank: int) -> str:
    engine = engine_for(3, model=make("InParts"))
    try:
        engine.backward(engine(inputs()[0][: SAMPLES // 2]))
    except ConfigError as error:
        return str(error)
    return ""


def test_stage_3_refuses_gradients_in_parts_which_it_would_lose(pair: Outcomes) -> None:
    for said in pair["in_parts"]:
        assert said.startswith("gradient of 'layers.0.")
        assert "': it came in parts, in nested backward passes, of which ZeRO stage 3 would lose some; use " in said


class Choosing(nn.Module):
    """Which of two layers of one shape is used depends on the caller; one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scale, self.unused_scale = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor, other: bool) -> torch.Tensor:
        loss = (self.third if other else self.second)(self.first(x)).square().mean()
        return loss * self.scale if other else loss


def choose(rank: int, stage: int, accumulation: int) -> dict[str, Any]:
    """Rank 0 uses the second layer, rank 1 the third."""
    engine = engine_for(stage, model=make_choosing(), gradient_accumulation_steps=accumulation, gradient_clipping=0.3)
    before = values_of(engine)
    for batch in inputs():
        for micro_batch in micro_batches(engine, batch):
            engine.backward(engine(micro_batch, other=rank == 1))
            try:
                engine.step()
            except ConfigError as error:
                return {"said": str(error), "moved": distance(before, values_of(engine))}
    return {"values": values_of(engine), "norm": engine.get_global_grad_norm()}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_ranks_may_use_different_parameters(pair: Outcomes, accumulation: int, stage: int) -> None:
    model = make_choosing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    for batch in inputs():
        optimizer.zero_grad()
        parts = batch.split(SAMPLES // 2 // accumulation)
        for number, part in enumerate(parts):
            (model(part, other=number % 2 == 1) / len(parts)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    wanted = dict(model.named_parameters())
    untouched = dict(make_choosing().named_parameters())
    for rank in pair[f"choose {accumulation} {stage}"]:
        assert distance(rank["values"], wanted) < 1e-6
        assert rank["norm"] == pytest.approx(norm.item(), rel=1e-6)
        # What no rank used has no gradient, and is not decayed.
        for name in ("fourth.weight", "fourth.bias", "unused_scale"):
            assert torch.equal(rank["values"][name], untouched[name])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_at_stage_3_they_are_told_which(pair: Outcomes, accumulation: int) -> None:
    for rank in pair[f"choose {accumulation} 3"]:
        assert rank["said"].startswith("gradient of 'second.weight': 1 of 2 ranks used this parameter in the step, and")
        assert rank["moved"] == 0


def make_choosing() -> Choosing:
    torch.manual_seed(1)
    return Choosing()


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    """What two ranks did in all cases of this file."""
    cases: dict[str, Any] = {
        f"{name} {precision} {stage}": (train, (name, stage, precision)) for name, precision, stage in CASES
    }
    for stage, accumulation in itertools.product(STAGES, (1, 3)):
        cases[f"choose {accumulation} {stage}"] = (choose, (stage, accumulation))
    for precision, stage in itertools.product(BOUNDS, (0, 1, 2)):
        cases[f"where_parameters_begin {precision} {stage}"] = (where_parameters_begin, (stage, precision))
    cases["in_parts"] = (in_parts, ())  # last: the pass it breaks off leaves nothing in order
    return run_cases(2, cases, worlds=2)
