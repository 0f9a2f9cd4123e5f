"""What scripts ask of an engine beside forward, backward and step, and the other ways to go through a backward pass."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import math
import pickle
import tempfile
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from small import RATE, STAGES, Small, config, said, samples
from torch import nn
from torch.nn import functional

import hpc_ds
from hpc_ds.engine import taken_for_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
ACCUMULATION = 2


def start(stage: int, model: nn.Module | None = None, **overrides: Any) -> Any:
    return hpc_ds.initialize(model=model or Small(), config=config(stage, **overrides))[0]


def batch_of(rank: int, step: int, micro: int) -> torch.Tensor:
    return samples(100 * step + 10 * micro + rank)


def weights(engine: Any) -> torch.Tensor:
    """All masters, whole and flat. Collective."""
    return torch.cat([hpc_ds.zero.safe_get_full_fp32_param(p).flatten() for p in engine.module.parameters()])


def plain(loss_of: Callable[[nn.Module, torch.Tensor], Any], steps: int = 2, model: nn.Module | None = None) -> Any:
    """Weights after SGD on the mean over all ranks and micro-batches, and the norm of the last gradients."""
    model = model or Small()
    for step in range(steps):
        model.zero_grad()
        for rank in range(WORLD_SIZE):
            for micro in range(ACCUMULATION):
                loss = loss_of(model, batch_of(rank, step, micro)) / (WORLD_SIZE * ACCUMULATION)
                loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), norm


def assert_near(found: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-6) -> None:
    """Next to fp32's own rounding, unless another bound is given."""
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 10)


# plain loss.backward()


@dataclass
class Output:
    loss: torch.Tensor
    inner: dict[str, torch.Tensor]


@dataclass
class Slotted:
    __slots__ = ("logits", "loss")
    loss: torch.Tensor
    logits: torch.Tensor


class Ordered(OrderedDict):  # type: ignore[type-arg]
    """What Hugging Face's outputs are."""


def hugging_face(loss: torch.Tensor, logits: torch.Tensor) -> Any:
    if importlib.util.find_spec("transformers") is None:
        return Ordered(loss=loss, logits=logits)
    from transformers.modeling_outputs import CausalLMOutput

    return CausalLMOutput(loss=loss, logits=logits)


class Answering(nn.Module):
    """Gives its loss together with the logits that it was computed from."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.small, self.form = Small(), form

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.small(x)
        loss = logits.square().mean()
        return {
            "tensor": lambda: loss,
            "tuple": lambda: (loss, logits),
            "dict": lambda: {"loss": loss, "logits": logits},
            "dataclass": lambda: Output(loss, {"logits": logits}),
            "slots": lambda: Slotted(loss, logits),
            "hugging face": lambda: hugging_face(loss, logits),
            "logits": lambda: logits,
            "distribution": lambda: torch.distributions.Normal(logits, 1.0, validate_args=False),
            "two losses": lambda: (loss, logits.sum()),
        }[self.form]()


# The form of the output -> from it to the loss.
FORMS: dict[str, Callable[[Any], torch.Tensor]] = {
    "tensor": lambda output: output,
    "tuple": lambda output: output[0],
    "dict": lambda output: output["loss"],
    "dataclass": lambda output: output.loss,
    "slots": lambda output: output.loss,
    "hugging face": lambda output: output["loss"],
    "logits": lambda output: functional.mse_loss(output, torch.zeros(2, 2)),
    "distribution": lambda output: output.mean.square().mean(),
    "two losses": lambda output: output[0] + 0.5 * output[1],
}


def plainly(rank: int, stage: int, form: str, precision: dict[str, Any]) -> dict[str, Any]:
    """Two steps of two micro-batches, as a loop for plain torch would take them."""
    engine = start(stage, Answering(form), gradient_accumulation_steps=ACCUMULATION, **precision)
    told: list[float] = []
    engine.record = lambda _, **fields: told.append(fields["loss"])
    for step in range(2):
        for micro in range(ACCUMULATION):
            loss = FORMS[form](engine(batch_of(rank, step, micro))).float()
            (engine.scale(loss) if precision else loss).backward()
            engine.step()
    return {
        "weights": weights(engine),
        "norm": engine.get_global_grad_norm(),
        "told": told,
        "steps": engine.global_steps,
    }


def loss_in_form(form: str) -> Callable[[nn.Module, torch.Tensor], Any]:
    return lambda model, x: FORMS[form](model(x))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", FORMS)
def test_plain_backward_is_a_share_of_the_step(pair: Outcomes, form: str, stage: int) -> None:
    wanted, norm = plain(loss_in_form(form), model=Answering(form))
    for rank in pair[f"plainly {form} {stage}"]:
        assert_near(rank["weights"], wanted)
        assert rank["norm"] == pytest.approx(norm, rel=1e-6)
        assert rank["steps"] == 2
        # A loss that is an output is known; one that the script made of outputs is not.
        known = [loss is not None for loss in rank["told"]]
        assert known == [form not in {"logits", "distribution", "two losses"}] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_plain_backward_of_a_scaled_loss_in_fp16(pair: Outcomes, stage: int) -> None:
    wanted, norm = plain(loss_in_form("dict"), model=Answering("dict"))
    for rank in pair[f"plainly fp16 {stage}"]:
        assert_near(rank["weights"], wanted, rtol=3e-3)  # 11 bits of mantissa, two steps
        assert rank["norm"] == pytest.approx(norm, rel=3e-3)


def told_loss(rank: int) -> list[float]:
    """The loss of a step, by engine.backward and plainly."""
    told: list[float] = []
    for by_engine in (True, False):
        engine = start(1, Answering("tuple"), gradient_accumulation_steps=ACCUMULATION)
        engine.record = lambda _, **fields: told.append(fields["loss"])
        for micro in range(ACCUMULATION):
            loss, _ = engine(batch_of(rank, 0, micro))
            engine.backward(loss) if by_engine else loss.backward()
            engine.step()
    return told


def test_the_loss_of_a_step_is_the_mean_over_ranks_and_micro_batches(pair: Outcomes) -> None:
    model = Small()
    batches = [batch_of(rank, 0, micro) for rank in range(WORLD_SIZE) for micro in range(ACCUMULATION)]
    mean = sum(model(batch).square().mean().item() for batch in batches) / len(batches)
    for told in pair["told_loss"]:
        assert told == pytest.approx([mean, mean], rel=1e-6)


def mixed(rank: int, stage: int) -> list[str]:
    unscaled = start(stage, fp16={"enabled": True})
    both = start(stage, gradient_accumulation_steps=ACCUMULATION)
    both.backward(both(samples()).square().mean())
    both.step()
    first = said(lambda: both(samples()).square().mean().backward())
    both.zero_grad()
    both.set_gradient_accumulation_boundary(True)
    both(samples()).square().mean().backward()
    both.step()
    return [said(lambda: unscaled(samples()).float().mean().backward()), first, str(both.was_step_applied())]


@pytest.mark.parametrize("stage", STAGES)
def test_a_plain_backward_that_would_be_scaled_wrong_is_refused(pair: Outcomes, stage: int) -> None:
    for unscaled, both, applied in pair[f"mixed {stage}"]:
        assert unscaled.startswith(
            "ConfigError: loss.backward(): fp16 needs the loss scaled; call engine.backward(loss), or engine.scale(loss)"
        )
        assert both.startswith(
            "ConfigError: backward: passes of one step began with engine.backward(loss) and with loss."
        )
        assert applied == "True"


# several losses, several forwards


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.left, self.right = Small(), nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.small(x)
        return self.left(inner).square().mean(), self.right(inner).square().mean()


def two_losses(rank: int, stage: int, how: str) -> torch.Tensor:
    torch.manual_seed(1)
    engine = start(stage, TwoHeads(), gradient_accumulation_steps=ACCUMULATION)
    if how.startswith("early"):
        engine.sharding._overlaps = True  # as on a device: sums begin while the boundary's backward pass goes on
    for step in range(2):
        for micro in range(ACCUMULATION):
            left, right = engine(batch_of(rank, step, micro))
            if how.endswith("engine"):
                engine.backward(left, retain_graph=True)
                engine.backward(right)
            elif how.endswith("plain"):
                left.backward(retain_graph=True)
                right.backward()
            else:
                engine.backward(left + right)
            engine.step()
    return weights(engine)


HOW = ("together", "engine", "plain", "early engine", "early plain")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", HOW)
def test_two_losses_of_one_forward(pair: Outcomes, how: str, stage: int) -> None:
    torch.manual_seed(1)
    wanted, _ = plain(lambda model, x: sum(model(x)), model=TwoHeads())
    for found in pair[f"two_losses {how} {stage}"]:
        assert_near(found, wanted)


def several_forwards(rank: int, stage: int, how: str) -> torch.Tensor:
    engine = start(stage, gradient_accumulation_steps=ACCUMULATION)
    for step in range(2):
        for micro in range(ACCUMULATION):
            batch = batch_of(rank, step, micro)
            if how == "halves":
                one, other = (engine(half).square().mean() for half in batch.chunk(2))
                engine.backward((one + other) / 2)
            elif how == "chain":  # the output of one forward goes into the next
                again = functional.pad(engine(batch), (0, 1))
                engine(again).square().mean().backward()
            else:
                looks(engine, how)
                loss = engine(batch).square().mean()
                looks(engine, how)
                engine.backward(loss)
            engine.step()
    return weights(engine)


def looks(engine: Any, how: str) -> None:
    """Forwards that nothing is learnt from."""
    engine.eval()
    if how == "no_grad":
        with torch.no_grad():
            engine(samples(99, 7))
    else:
        engine(samples(99, 7))
    engine.train()


def chained(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(functional.pad(model(x), (0, 1))).square().mean()


def squared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["halves", "chain", "no_grad", "eval"])
def test_forwards_before_one_backward(pair: Outcomes, how: str, stage: int) -> None:
    wanted, _ = plain(chained if how == "chain" else squared)
    for found in pair[f"several_forwards {how} {stage}"]:
        assert_near(found, wanted)


def after_an_error(rank: int, stage: int) -> tuple[torch.Tensor, list[str]]:
    """A backward pass that breaks, as for want of memory, and a script that goes on."""
    engine = start(stage)
    output = engine(samples())
    output.register_hook(broken)
    try:
        output.square().mean().backward()
    except LookupError:
        words = [
            said(lambda: engine(samples()).square().mean().backward()),
            said(lambda: engine.backward(engine(samples()).square().mean())),
        ]
    engine.zero_grad()
    engine(samples()).square().mean().backward()
    engine.step()
    return weights(engine), words


def broken(gradient: torch.Tensor) -> None:
    raise LookupError("no memory")


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_broke_leaves_nothing_behind(pair: Outcomes, stage: int) -> None:
    model = Small()
    model(samples()).square().mean().backward()
    wanted = torch.cat([(p.detach() - RATE * p.grad).flatten() for p in model.parameters()])
    for found, words in pair[f"after_an_error {stage}"]:
        assert_near(found, wanted)
        told = (
            "ConfigError: backward: an earlier pass ended in an error; call engine.zero_grad(), and begin the step anew"
        )
        assert words == [told, told]


# boundaries


def by_hand(rank: int, stage: int) -> tuple[torch.Tensor, list[bool], list[int]]:
    """A script that counts micro-batches itself, while the config says one."""
    engine = start(stage)
    applied, steps = [], []
    for step in range(2):
        for micro in range(ACCUMULATION):
            last = micro == ACCUMULATION - 1
            engine.set_gradient_accumulation_boundary(last)
            assert engine.is_gradient_accumulation_boundary() is last
            engine.backward(engine(batch_of(rank, step, micro)).square().mean() / ACCUMULATION)
            engine.step()
            applied.append(engine.was_step_applied())
            steps.append(engine.global_steps)
    return weights(engine), applied, steps


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_may_say_where_steps_end(pair: Outcomes, stage: int) -> None:
    wanted, _ = plain(squared)
    for found, applied, steps in pair[f"by_hand {stage}"]:
        assert_near(found, wanted)
        assert applied == [False, True] * 2
        assert steps == [0, 1, 1, 2]


def with_graph(rank: int, stage: int) -> torch.Tensor:
    """Gradients that keep a graph of their own."""
    engine = start(stage, gradient_accumulation_steps=ACCUMULATION)
    for micro in range(ACCUMULATION):
        squared(engine, batch_of(rank, 0, micro)).backward(create_graph=True)
        engine.step()
    return weights(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_that_keep_a_graph_are_added_once(pair: Outcomes, stage: int) -> None:
    for found in pair[f"with_graph {stage}"]:
        assert_near(found, plain(squared, steps=1)[0])


def apart(rank: int, stage: int) -> dict[str, Any]:
    """no_sync around all micro-batches but the last, with scale_wrt_gas=False."""
    engine = start(stage, gradient_accumulation_steps=ACCUMULATION)

    def enter_twice() -> None:
        with engine.no_sync(), engine.no_sync():
            raise AssertionError("unreachable")

    def step_inside() -> None:
        with engine.no_sync():
            engine.step()

    words = [said(enter_twice), said(step_inside)]
    if stage < 2:
        with engine.no_sync():
            engine.backward(engine(batch_of(rank, 0, 0)).square().mean() / 2, scale_wrt_gas=False)
        engine.set_gradient_accumulation_boundary(is_boundary=True)
        engine.backward(engine(batch_of(rank, 0, 1)).square().mean() / 2, scale_wrt_gas=False)
        engine.step()
    loss = None if engine._agreed is None else engine._agreed.loss
    return {"said": words, "weights": weights(engine), "steps": engine.global_steps, "loss": loss}


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"apart {stage}"]:
        if stage > 1:
            refused = (
                f"ConfigError: no_sync: ZeRO stage {stage} shards gradients at every micro-batch; use stage 0 or 1"
            )
            assert rank["said"] == [refused] * 2
        else:
            assert rank["said"] == [
                "ConfigError: no_sync: it is entered already; leave it first",
                "ConfigError: step: inside no_sync or coalesce_grad_reduction gradients are not complete; leave it first",
            ]
            assert_near(rank["weights"], plain(squared, steps=1)[0])
            assert rank["steps"] == 1
            losses = [squared(Small(), batch_of(each, 0, micro)) for each in range(WORLD_SIZE) for micro in range(2)]
            assert rank["loss"] == pytest.approx(sum(losses).item() / 4, rel=1e-6)


def coalesced(rank: int, stage: int) -> tuple[torch.Tensor, list[str]]:
    """All passes of a step inside, the step outside."""
    engine = start(stage)

    def step_inside() -> None:
        with engine.coalesce_grad_reduction():
            engine.step()

    def nested() -> None:
        with engine.coalesce_grad_reduction(), engine.coalesce_grad_reduction():
            raise AssertionError("unreachable")

    words = [said(step_inside), said(nested)]
    for step in range(2):
        with engine.coalesce_grad_reduction():
            for micro in range(ACCUMULATION):
                engine.backward(engine(batch_of(rank, step, micro)).square().mean() / ACCUMULATION)
        engine.step()
    return weights(engine), words


@pytest.mark.parametrize("stage", STAGES)
def test_backward_passes_of_one_step_may_be_put_together(pair: Outcomes, stage: int) -> None:
    wanted, _ = plain(squared)
    for found, words in pair[f"coalesced {stage}"]:
        assert_near(found, wanted)
        assert [word.split(";")[0] for word in words] == [
            "ConfigError: step: inside no_sync or coalesce_grad_reduction gradients are not complete",
            "ConfigError: coalesce_grad_reduction: it is entered already",
        ]


def other_batch_size(rank: int, stage: int) -> dict[str, Any]:
    engine = start(stage)
    engine.backward(engine(samples()).square().mean())
    engine.step()
    before = engine.train_batch_size(), engine.gradient_accumulation_steps()
    words = [said(lambda size=size: engine.set_train_batch_size(size)) for size in (0, 6, -4)]
    engine.set_train_batch_size(8)
    boundaries = []
    for _ in range(4):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.backward(engine(samples()).square().mean())
        engine.step()
    sizes = engine.train_batch_size(), engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    return {
        "before": before,
        "said": words,
        "boundaries": boundaries,
        "sizes": sizes,
        "seen": (engine.global_steps, engine.global_samples),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_batch_size_changes_through_the_accumulation(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"other_batch_size {stage}"]:
        assert rank["before"] == (4, 1)
        for words, size in zip(rank["said"], (0, 6, -4), strict=True):
            assert words == (
                f"ConfigError: train_batch_size {size}: not a multiple of 4 = train_micro_batch_size_per_gpu 2 x world size "
                "2; use one"
            )
        assert rank["boundaries"] == [False, True] * 2
        assert rank["sizes"] == (8, 2, 2)
        assert rank["seen"] == (3, 4 + 8 + 8)


# questions


def questions(rank: int, stage: int) -> dict[str, Any]:
    adam = {"optimizer": {"type": "Adam", "params": {"lr": RATE, "betas": [0.8, 0.9]}}}
    engine = start(stage, gradient_accumulation_steps=ACCUMULATION, gradient_clipping=0.5, **adam)
    answers: dict[str, Any] = {
        "norm before": engine.get_global_grad_norm(),
        "applied before": engine.was_step_applied(),
    }
    applied = []
    for micro in range(ACCUMULATION):
        engine.backward(engine(batch_of(rank, 0, micro)).square().mean())
        engine.step()
        applied.append(engine.was_step_applied())
    engine.eval()
    training = engine.module.training
    engine.train()
    momentum = start(0, optimizer={"type": "SGD", "params": {"lr": RATE, "momentum": 0.7}}).get_mom()
    return answers | {
        "applied": applied,
        "norm": engine.get_global_grad_norm(),
        "rates": engine.get_lr(),
        "momentum": (engine.get_mom(), momentum),
        "modes": (training, engine.module.training),
        "sizes": (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ),
        "stage": (engine.zero_optimization_stage(), engine.zero_optimization()),
        "types": (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.dynamic_loss_scale(), engine.cur_scale),
        "clipping": engine.gradient_clipping(),
        "where": (engine.global_rank, engine.local_rank, engine.world_size, str(engine.device)),
        "config": engine.config["gradient_clipping"],
        "counted": (engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_engine_answers(pair: Outcomes, stage: int) -> None:
    _, norm = plain(squared, steps=1)
    for rank, answers in enumerate(pair[f"questions {stage}"]):
        assert (answers["norm before"], answers["applied before"]) == (None, False)
        assert answers["applied"] == [False, True]
        assert answers["norm"] == pytest.approx(norm, rel=1e-6)  # before clipping
        assert answers["rates"] == [RATE]
        assert answers["momentum"] == ([(0.8, 0.9)], [0.7])
        assert answers["modes"] == (False, True)
        assert answers["sizes"] == (8, 2, 2)
        assert answers["stage"] == (stage, stage > 0)
        assert answers["types"] == (False, False, False, 1.0)
        assert answers["clipping"] == answers["config"] == 0.5
        assert answers["where"] == (rank, rank, 2, "cpu")
        assert answers["counted"] == (1, 2, 0, 8)


def dropped(rank: int, stage: int, how: str) -> tuple[torch.Tensor, Any]:
    """What was accumulated before is forgotten, however it came."""
    engine = start(stage, gradient_accumulation_steps=ACCUMULATION)
    loss = 100 * engine(samples(77)).square().mean()
    engine.backward(loss) if how == "engine" else loss.backward()
    engine.zero_grad()
    for micro in range(ACCUMULATION):
        engine.backward(engine(batch_of(rank, 0, micro)).square().mean())
        engine.step()
    return weights(engine), [parameter.grad for parameter in engine.module.parameters()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["engine", "plain"])
def test_zero_grad_forgets_a_step_that_is_not_complete(pair: Outcomes, how: str, stage: int) -> None:
    wanted, _ = plain(squared, steps=1)
    for found, gradients in pair[f"dropped {how} {stage}"]:
        assert_near(found, wanted)
        assert gradients == [None] * len(gradients)


# whole weights


class Tied(nn.Module):
    """Two names for one parameter, one frozen parameter, two kinds of buffers."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.fixed = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("scratch", torch.rand(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.tokens(x) * self.scale + self.fixed
        return self.head(inner.to(self.head.weight.dtype)).square().mean()


def tied_step(engine: Any) -> None:
    engine.backward(engine(torch.arange(6)))
    engine.step()


def state_dicts(rank: int, stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    engine = start(stage, Tied(), **precision)
    tied_step(engine)
    trained = engine.module_state_dict()
    without = engine.module_state_dict(exclude_frozen_parameters=True)
    saved = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=False)
    told: list[Any] = [trained]
    dist.broadcast_object_list(told, src=0)
    other = start(stage, Tied(seed=4), **precision)
    other.load_module_state_dict(told[0])
    untied = {name: value for name, value in told[0].items() if name != "head.weight"}
    again = start(stage, Tied(seed=5), **precision)
    again.load_module_state_dict(untied)
    with torch.no_grad():
        same = (engine(torch.arange(6)) - other(torch.arange(6))).item()
    changed = {name: value + 1 for name, value in untied.items() if name != "fixed"}  # which comes last, then
    words = [
        said(lambda: other.load_module_state_dict({})),
        said(lambda: other.load_module_state_dict({**told[0], "more": torch.ones(1)})),
        said(lambda: other.load_module_state_dict({**changed, "fixed": torch.ones(4)})),
    ]
    other.load_module_state_dict({"fixed": torch.ones(3), "more": torch.ones(1)}, strict=False)
    after = other.module_state_dict()
    untied_too = again.module_state_dict()
    tied_step(other)  # the engine goes on from what it was given
    return {
        "trained": trained,
        "types": saved and {name: (value.dtype, value.shape) for name, value in saved.items()},
        "without": None if without is None else sorted(without),
        "same": same,
        "said": words,
        "after": after,
        "untied": untied_too,
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_weights_go_out_and_in(pair: Outcomes, precision: str, stage: int) -> None:
    first, second = pair[f"state_dicts {precision} {stage}"]
    assert second["trained"] is second["without"] is second["after"] is None
    plain_model = Tied()
    plain_model.load_state_dict(first["trained"])
    assert list(first["trained"]) == list(plain_model.state_dict())
    # What is not trained has no master below stage 3.
    types = {name: value.dtype for name, value in first["trained"].items()}
    assert types.pop("fixed") is (torch.bfloat16 if precision == "bf16" and stage < 3 else torch.float32)
    assert set(types.values()) == {torch.float32, torch.int64}
    compute = SAVED[precision][1]
    assert second["types"] is None
    assert first["types"] == {
        name: (compute if value.is_floating_point() else value.dtype, value.shape)
        for name, value in first["trained"].items()
    }
    assert torch.equal(first["trained"]["head.weight"], first["trained"]["tokens.weight"])
    assert first["without"] == ["count", "head.weight", "scale", "tokens.weight"]
    for name, value in first["trained"].items():
        assert torch.equal(first["untied"][name], value), name
        assert torch.equal(first["after"][name], torch.ones(3) if name == "fixed" else value), name
    for rank in (first, second):
        assert rank["same"] == 0
        missing, unknown, shape = rank["said"]
        assert missing.startswith("ConfigError: state dict: it has no 'tokens.weight'; pass strict=False")
        assert unknown.startswith("ConfigError: state dict: the module has no 'more'; pass strict=False")
        assert shape.startswith("ConfigError: state dict: 'fixed' has shape (4,), the module (3,); ")


def saved_file(rank: int, stage: int, precision: dict[str, Any], folder: Path) -> tuple[bool, str]:
    engine = start(stage, Tied(), **precision)
    tied_step(engine)
    in_the_way = folder / "file"
    if rank == 0:
        in_the_way.touch()
    dist.barrier()
    done = engine.save_16bit_model(folder, "weights.bin")
    return done, said(lambda: engine.save_fp16_model(in_the_way / "below"))


SAVED = {"fp32": ({}, torch.float32), "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", SAVED)
def test_weights_saved_as_one_file(pair: Outcomes, precision: str, stage: int, folder: Path) -> None:
    for done, words in pair[f"saved_file {precision} {stage}"]:
        assert done
        assert words.startswith("CheckpointError: weights ")
        assert words.endswith("not saved: rank 0: Not a directory")
    state = torch.load(folder / f"saved {precision} {stage}" / "weights.bin", weights_only=True)
    assert {value.dtype for value in state.values()} == {SAVED[precision][1], torch.int64}
    Tied(seed=9).load_state_dict(state)


# the end


def let_go(rank: int) -> bool:
    """Whether an optimizer is gone with its last name: it does not keep itself alive by what the engine has given it."""
    engine = start(1)
    optimizer = engine.optimizer
    optimizer.set_lr(2 * RATE)
    assert optimizer.get_lr() == engine.get_lr()[0] == 2 * RATE
    for micro in range(ACCUMULATION):
        engine.backward(engine(batch_of(rank, 0, micro)).sum())
        engine.step()
    weak = weakref.ref(optimizer)
    del engine
    gc.collect()
    gc.disable()
    try:
        del optimizer
        return weak() is None
    finally:
        gc.enable()


def test_an_optimizer_is_gone_with_its_last_name(pair: Outcomes) -> None:
    assert pair["let go"] == [True, True]


def trained(engine: Any, rank: int, steps: range) -> None:
    for step in steps:
        for micro in range(ACCUMULATION):
            engine.backward(engine(batch_of(rank, step, micro)).pow(2).mean())
            engine.step()


def destroyed(rank: int, stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    """A module that goes through two engines, beside one that stays in its first."""
    whole = start(stage, gradient_accumulation_steps=ACCUMULATION)
    trained(whole, rank, range(4))
    first = start(stage, gradient_accumulation_steps=ACCUMULATION, **precision)
    trained(first, rank, range(2))
    first.backward(first(batch_of(rank, 2, 0)).pow(2).mean())  # of a step that does not come to its end
    module, before = first.module, [value.clone() for value in first.module.state_dict().values()]
    first.destroy()
    if stage == 3:
        trained(first, rank, range(2, 3))
        return {"again": said(lambda: start(stage, module))}
    said_by_first = [
        said(first.destroy),
        said(lambda: first(batch_of(rank, 2, 0))),
        said(lambda: [first.step() for _ in range(ACCUMULATION)]),
        said(lambda: first.save_checkpoint(tempfile.gettempdir())),
    ]
    kept = [torch.equal(one, other) for one, other in zip(module.state_dict().values(), before, strict=True)]
    sizes = {value.untyped_storage().nbytes() == value.nbytes for value in module.parameters()}
    hooks = [len(layer._forward_pre_hooks) for layer in module.modules()]
    second = start(stage, module, gradient_accumulation_steps=ACCUMULATION, **precision)
    trained(second, rank, range(2, 4))
    equal = torch.equal(weights(second), weights(whole))
    return {"said": said_by_first, "kept": all(kept), "own": sizes, "hooks": sum(hooks), "equal": equal}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_module_of_a_destroyed_engine_goes_into_another(pair: Outcomes, stage: int, precision: str) -> None:
    for rank in pair[f"destroyed {precision} {stage}"]:
        done, *others = rank["said"]
        assert done == "no error, but None"
        gone = "engine: it was destroyed, and its module is free; give it to initialize again"
        assert [gone in words for words in others] == [True] * 3, others
        assert (rank["kept"], rank["own"], rank["hooks"]) == (True, {True}, 0)
        assert rank["equal"] == (precision == "fp32")  # in bf16, masters begin at what it computed in


def test_at_stage_3_an_engine_keeps_its_module(pair: Outcomes) -> None:
    for rank in pair["destroyed fp32 3"]:
        assert rank["again"].startswith("ConfigError: model: parameter 'gain' belongs to an engine already; call eng")


def copied(rank: int, stage: int) -> dict[str, Any]:
    """Copies and state dicts, and what is said of them."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hpc_ds").addHandler(handler)
    taken_for_whole._told.clear()
    try:
        engine = start(stage, bf16={"enabled": True})
        engine.module_state_dict()
        engine.save_16bit_model(tempfile.mkdtemp())
        engine(samples())
        given = Small().state_dict()
        with hpc_ds.zero.GatheredParameters(engine.parameters(), modifier_rank=1):
            held = engine.module.state_dict() if rank == 0 else {}
            whole = {name: (value - given[name]).abs().max().item() for name, value in held.items()}
            if rank == 1:
                engine.module.load_state_dict(
                    {name: 2 * torch.ones_like(value) for name, value in Small().state_dict().items()}
                )
        asked_for_whole = list(told)
        names = [next(iter(engine.state_dict())), next(iter(engine.module.state_dict()))]
    finally:
        logging.getLogger("hpc_ds").removeHandler(handler)
    copies = [said(lambda: copy.deepcopy(engine)), said(lambda: pickle.dumps(engine))]
    module = None if stage == 3 else copy.deepcopy(engine.module)
    alike = module is None or torch.equal(module(samples()), engine(samples()))
    mine = None if module is None else len(pickle.dumps(module))
    return {
        "before": asked_for_whole, "told": told, "names": names, "copies": copies, "alike": alike, "bytes": mine,
        "whole": whole, "loaded": weights(engine),
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_cannot_be_copied_and_its_module_alone(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"copied {stage}"]:
        for words in rank["copies"]:
            assert words.startswith("ConfigError: engine: it can be neither copied nor pickled, because module, optimi")
        assert rank["alike"]
        assert rank["names"] == ["module.gain", "gain"]
        assert rank["bytes"] is None or rank["bytes"] < 5000  # the module without the buckets of its engine


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_dict_of_gathered_parameters_is_whole(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"copied {stage}"]:
        assert all(difference < 1e-2 for difference in rank["whole"].values())
        torch.testing.assert_close(rank["loaded"], torch.full_like(rank["loaded"], 2))
    assert len(pair[f"copied {stage}"][0]["whole"]) == len(Small().state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_dict_of_parts_is_told_once(pair: Outcomes, stage: int) -> None:
    first, second = pair[f"copied {stage}"]
    assert first["before"] == second["told"] == []
    assert len(first["told"]) == (1 if stage == 3 else 0)
    for words in first["told"]:
        assert words.startswith(
            "state_dict: at ZeRO stage 3 each rank has a part of 'module.up.weight' and 3 others, and"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("surface")


def cases_of_ends() -> dict[str, Any]:
    cases: dict[str, Any] = {f"copied {stage}": (copied, (stage,)) for stage in STAGES}
    for stage in (0, 1, 2):
        cases[f"destroyed fp32 {stage}"] = (destroyed, (stage, {}))
        cases[f"destroyed bf16 {stage}"] = (destroyed, (stage, {"bf16": {"enabled": True}}))
    return cases | {"let go": (let_go, ()), "destroyed fp32 3": (destroyed, (3, {}))}


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    cases: dict[str, Any] = {"told_loss": (told_loss, ()), **cases_of_ends()}
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    for stage in STAGES:
        for form in FORMS:
            cases[f"plainly {form} {stage}"] = (plainly, (stage, form, {}))
        cases[f"plainly fp16 {stage}"] = (plainly, (stage, "dict", fp16))
        for how in HOW:
            cases[f"two_losses {how} {stage}"] = (two_losses, (stage, how))
        for how in ("halves", "chain", "no_grad", "eval"):
            cases[f"several_forwards {how} {stage}"] = (several_forwards, (stage, how))
        for how in ("engine", "plain"):
            cases[f"dropped {how} {stage}"] = (dropped, (stage, how))
        for name, (precision, _) in SAVED.items():
            cases[f"state_dicts {name} {stage}"] = (state_dicts, (stage, precision))
            place = folder / f"saved {name} {stage}"
            place.mkdir()
            cases[f"saved_file {name} {stage}"] = (saved_file, (stage, precision, place))
        for function in (mixed, after_an_error, by_hand, with_graph, apart, coalesced, other_batch_size, questions):
            cases[f"{function.__name__} {stage}"] = (function, (stage,))
    return run_cases(WORLD_SIZE, cases, worlds=2)
