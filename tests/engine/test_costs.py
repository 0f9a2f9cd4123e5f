"""What a ZeRO stage costs: messages between ranks, and bytes that a rank holds, counted."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from standing import CLIP, STAGES, engine_for, live_tensors
from torch import nn

from hpc_ds.config.memory import bytes_per_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ranks

COMMUNICATE = (
    "isend", "irecv", "send", "recv", "broadcast", "all_reduce", "reduce", "all_gather", "all_gather_into_tensor", "gather",
    "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier", "monitored_barrier",
    "batch_isend_irecv", "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list",
)  # fmt: skip


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count what is called of torch.distributed."""
    calls: Counter[str] = Counter()
    real = {name: getattr(dist, name) for name in COMMUNICATE}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in COMMUNICATE:
        setattr(dist, name, counted(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def messages(rank: int, stage: int, overflows: bool) -> list[dict[str, int]]:
    """What each of three micro-batches of a step sends, with clipping, a loss scale and a schedule; the first step is over."""
    engine = engine_for(
        stage,
        model=Chain(8),
        fp16={"enabled": True, "initial_scale_power": 4},
        gradient_accumulation_steps=3,
        gradient_clipping=CLIP,
        scheduler={"type": "WarmupLR", "params": {}},
    )
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 8)))
        engine.step()
    found = []
    for number in range(3):
        with counting() as calls:
            loss = engine(torch.ones(2, 8))
            engine.backward(loss * torch.inf if overflows and number == 1 else loss)
            engine.step()
        found.append(dict(calls))
    return found


# Two ranks and one bucket: a sum scattered, or a gathering, is one message there and one back.
GATHERED = SUMMED = Counter(isend=1, irecv=1)
AGREED = Counter(all_reduce=1)
BEFORE: dict[int, Counter[str]] = {0: Counter(), 1: Counter(), 2: SUMMED}
AT_BOUNDARY: dict[int, Counter[str]] = {
    0: SUMMED + GATHERED + AGREED,  # gradients
    1: SUMMED + AGREED + GATHERED,  # parameters
    2: SUMMED + AGREED + GATHERED,
}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("overflows", [False, True])
def test_ranks_talk_at_the_boundary_only_and_agree_once(pair: Outcomes, overflows: bool, stage: int) -> None:
    skipped = GATHERED if overflows and stage > 0 else Counter()  # parameters stay as they are
    for first, second, last in pair[f"messages {overflows} {stage}"]:
        assert first == second == dict(BEFORE[stage])
        assert last == dict(AT_BOUNDARY[stage] - skipped)


@pytest.mark.parametrize("overflows", [False, True])
def test_stage_3_agrees_once_too(pair: Outcomes, overflows: bool) -> None:
    for first, second, last in pair[f"messages {overflows} 3"]:
        assert "all_reduce" not in first | second
        assert last["all_reduce"] == 1
        assert last["isend"] == first["isend"] == second["isend"]


class Chain(nn.Module):
    """Blocks of two square matrices each: at a width of 512 they have 2.1 million parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def storages(tensors: Any) -> dict[int, int]:
    """Storage -> bytes."""
    found = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        found[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return found


def held(engine: Any, before: set[int]) -> dict[str, int]:
    """The bytes of each kind that are alive, each storage counted once; gradients are what is nothing else."""
    gc.collect()
    alive = list(live_tensors())
    alive += [tensor.grad for tensor in alive if tensor.is_leaf and tensor.grad is not None]
    left = {storage: size for storage, size in storages(alive).items() if storage not in before}
    kinds = {
        "parameters": engine.module.parameters(),
        "masters": (piece.master for piece in engine.sharding.pieces),
        "optimizer": (value for state in engine.optimizer.state.values() for value in state.values()),
    }
    sizes = {}
    for kind, tensors in kinds.items():
        sizes[kind] = sum(left.pop(storage, 0) for storage in storages(tensors))
    return {**sizes, "gradients": sum(left.values())}


def memory(rank: int, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    before = set(storages(live_tensors()))
    engine = engine_for(stage, model=Chain(512), gradient_accumulation_steps=3, gradient_clipping=1.0, **settings)
    found = []
    for number in range(5):
        engine.backward(engine(torch.ones(2, 512)))
        engine.step()
        if number in {2, 4}:  # after a step, and between micro-batches
            found.append(held(engine, before))
    return {"step": found[0], "between": found[1], "elements": sum(v.numel() for v in engine.module.parameters())}


TYPES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "fp32": ({}, {"compute": "fp32"}),
    "bf16": ({"bf16": {"enabled": True}}, {"compute": "bf16"}),
    "bf16, fp32 sums": (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"compute": "bf16", "grad_accum": "fp32"},
    ),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "types"), [*((2, types) for types in TYPES), (4, "bf16")])
def test_a_rank_holds_what_the_paper_says_and_the_config_predicts(
    request: pytest.FixtureRequest, world_size: int, types: str, stage: int
) -> None:
    outcomes: Outcomes = request.getfixturevalue("pair" if world_size == 2 else "four")
    for rank in outcomes[f"memory {types} {stage}"]:
        elements = rank["elements"]
        assert elements > 2_000_000
        predicted = bytes_per_rank(elements, stage, world_size, **TYPES[types][1])
        for kind in ("parameters", "masters", "optimizer"):
            for moment in ("step", "between"):
                assert rank[moment][kind] == pytest.approx(getattr(predicted, kind), rel=0.05), (moment, kind)
        assert rank["between"]["gradients"] == pytest.approx(predicted.gradients, rel=0.05)
        assert rank["step"]["gradients"] < 0.01 * elements  # none
        paper = {0: 16, 1: 4 + 12 / world_size, 2: 2 + 14 / world_size, 3: 16 / world_size}[stage]
        if types == "bf16":
            assert sum(rank["between"].values()) == pytest.approx(paper * elements, rel=0.05)


def memory_cases(*kinds: str) -> dict[str, Any]:
    return {f"memory {types} {stage}": (memory, (stage, TYPES[types][0])) for types in kinds for stage in STAGES}


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    """What two ranks did in all cases of this file."""
    cases: dict[str, Any] = {
        f"messages {overflows} {stage}": (messages, (stage, overflows))
        for overflows, stage in itertools.product((False, True), STAGES)
    }
    return run_cases(2, cases | memory_cases(*TYPES), worlds=2)


@pytest.fixture(scope="module")
def four() -> Outcomes:
    return run_cases(4, memory_cases("bf16"), worlds=2)
