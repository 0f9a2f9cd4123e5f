"""Models made on the meta device get the values they would have had on the CPU, and train, at every stage."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from standing import SAMPLES, STAGES, Reference, distance, engine_for, live_bytes, micro_batches, values_of
from torch import nn

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ranks

WIDTH, STEPS = 6, 2


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Plain(nn.Module):
    """Only modules of torch, which know how to fill themselves; in the order in which they do."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)
        self.into = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(self.statistics(x))
        for layer in self.layers:
            x = layer(x)
        return self.out(x).square().mean()


class Tied(Plain):
    """Weights that are tied, frozen and 0-dim, with a module that fills its own."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.empty = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(0, 3))
            self.register_buffer("steps", torch.empty(2))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.gain.fill_(0.5)
                self.steps.copy_(torch.tensor([1.0, 2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain * self.steps.sum()

    def __init__(self) -> None:
        super().__init__()
        self.gain = self.Gain()
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.out.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.gain(self.frozen(self.second(x))))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=23, n_positions=16, n_embd=12, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "tied": Tied, "gpt2": gpt2}


@functools.cache
def inputs() -> torch.Tensor:
    return torch.randn(STEPS, SAMPLES, WIDTH, generator=torch.Generator().manual_seed(5))


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    is_text = "GPT2" in type(getattr(model, "module", model)).__name__
    return model(input_ids=(x > 0).long(), labels=(x > 0).long()).loss if is_text else model(x)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def train(rank: int, name: str, stage: int) -> dict[str, Any]:
    model = on_meta(name)
    torch.manual_seed(1 + rank)
    engine = engine_for(stage, model=model)
    first = values_of(engine)
    losses = []
    for batch in inputs():
        for micro_batch in micro_batches(engine, batch):
            loss = loss_of(engine, micro_batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    weights = [value for value in model.state_dict() if value.endswith("weight")]
    return {"first": first, "values": values_of(engine), "losses": losses, "names": weights, "tied": tied(model)}


def tied(model: nn.Module) -> list[tuple[str, str]]:
    names: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return [(names[id(value)], name) for name, value in every if names.setdefault(id(value), name) != name]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_it_begins_with_the_values_of_the_seed_and_trains(pair: Outcomes, name: str, stage: int) -> None:
    torch.manual_seed(1)
    model = MODELS[name]()
    begun = Reference(model=model).values
    for rank in pair[f"{name} {stage}"]:
        assert rank["tied"] == tied(model)
        assert distance(rank["first"], begun) == 0
    statistics = {key for key, _ in model.named_buffers()}
    wanted = Reference(model=model, parts=(2, 1))
    for batch in inputs():
        wanted.step(batch)
    for rank in pair[f"{name} {stage}"]:
        found, single = (
            {k: v for k, v in some.items() if k not in statistics} for some in (rank["values"], wanted.values)
        )
        assert distance(found, single) < 1e-5  # batch normalisation of a small signal makes rounding larger


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_with_init_weights_trains_as_one_made_on_the_cpu_with_its_values(pair: Outcomes, stage: int) -> None:
    """transformers fills modules in an order of its own, so the values are others, from the same distributions."""
    ranks = pair[f"gpt2 {stage}"]
    plain = gpt2()
    missing = plain.load_state_dict(ranks[0]["first"], strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    assert ranks[0]["tied"] == tied(plain) == [("transformer.wte.weight", "lm_head.weight")]
    assert plain.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(bool((norm.weight == 1).all()) for norm in plain.modules() if isinstance(norm, nn.LayerNorm))
    losses = [loss_of(plain, batch).item() for batch in inputs()[:1]]
    assert sum(rank["losses"][0] for rank in ranks) / 2 == pytest.approx(losses[0], rel=1e-6)
    assert torch.equal(ranks[0]["values"]["transformer.wte.weight"], ranks[1]["values"]["transformer.wte.weight"])


class Unfilled(nn.Module):
    """A parameter that nothing fills."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2), kind()])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3))


class Half(Bare):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def unfilled(rank: int, stage: int, kind: type[nn.Module]) -> str:
    with torch.device("meta"):
        model = Unfilled(kind)
    try:
        engine_for(stage, model=model)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_be_filled_is_named(pair: Outcomes, stage: int) -> None:
    for said in pair[f"unfilled Half {stage}"]:
        assert said.startswith(
            "model: 'bias' of module 'inner.1' is on the meta device, and neither its reset_parameters nor"
        )
    for said in pair[f"unfilled Bare {stage}"]:
        assert said.startswith("model: module 'inner.1' is on the meta device and has no reset_parameters; write one")


class Large(nn.Module):
    """Blocks that are most of the model."""

    width, blocks = 64, 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(self.width) for _ in range(self.blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def peak(rank: int, stage: int) -> tuple[int, int, int]:
    """The most bytes held while the model was made real, as seen whenever a whole tensor gets rank 0's values."""
    with torch.device("meta"):
        model = Large()
    sizes = [sum(4 * value.numel() for value in layer.parameters()) for layer in model.layers]
    before, seen, communicate = live_bytes(), [], dist.broadcast

    def broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() >= Large.width**2:
            seen.append(live_bytes() - before)
        return communicate(tensor, *args, **kwargs)

    dist.broadcast = broadcast
    try:
        engine_for(stage, model=model)
    finally:
        dist.broadcast = communicate
    return max(seen), max(sizes), sum(sizes)


def test_at_stage_3_no_rank_ever_holds_more_than_its_shards_and_one_block(pair: Outcomes) -> None:
    for most, block, whole in pair["peak 3"]:
        assert whole / 2 < most < 1.05 * (whole / 2 + block)
    for most, _, whole in pair["peak 2"]:
        assert most > whole  # so the measure sees what there is


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    """What two ranks did in all cases of this file."""
    cases: dict[str, Any] = {"peak 3": (peak, (3,)), "peak 2": (peak, (2,))}
    for stage in STAGES:
        cases |= {f"{name} {stage}": (train, (name, stage)) for name in MODELS}
        cases |= {f"unfilled {kind.__name__} {stage}": (unfilled, (stage, kind)) for kind in (Bare, Half)}
    return run_cases(2, cases, worlds=2)
