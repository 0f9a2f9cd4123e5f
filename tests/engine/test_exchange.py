"""Sums and gathers of flat buffers, directly from rank to rank and through the backend: the same numbers either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases

import hpc_ds
from hpc_ds.engine import exchange as exchange_module
from hpc_ds.engine.exchange import DirectReduceScatter, Exchange

pytestmark = pytest.mark.ranks

WORLD_SIZES = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1000


def buffer(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """What one rank brings: other numbers on every rank, and too large for an fp16 sum."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(CHUNK * dist.get_world_size(), generator=generator) + 3
    return (values * (9000 if dtype == torch.float16 else 1)).to(dtype)


def made(direct: bool) -> Exchange:
    exchange = Exchange(torch.device("cpu"))
    assert exchange.direct == (dist.get_world_size() > 1)
    exchange.direct = exchange.direct and direct
    return exchange


def sum_of_all(rank: int, direct: bool, dtype: torch.dtype, wire: torch.dtype | None) -> bool:
    exchange, world_size = made(direct), dist.get_world_size()
    expected = torch.stack([buffer(other, dtype).to(wire or dtype).float() for other in range(world_size)]).sum(0)
    mine = expected[rank * CHUNK : (rank + 1) * CHUNK] / world_size
    total = exchange.reduce_scatter(buffer(rank, dtype), wire).wait(1 / world_size, torch.float32)
    # A chunk of this rank's own never travels, so it need not be rounded to the type that does.
    torch.testing.assert_close(total, mine, rtol=1e-6 if wire is None else 1e-2, atol=1e-6 if wire is None else 1e-2)
    return total.dtype == torch.float32


def gather(rank: int, direct: bool, dtype: torch.dtype) -> bool:
    exchange, whole = made(direct), torch.zeros(CHUNK * dist.get_world_size(), dtype=dtype)
    exchange.chunk(whole).copy_(buffer(rank, dtype)[:CHUNK])
    for work in exchange.all_gather(whole):
        work.wait()
    expected = torch.cat([buffer(other, dtype)[:CHUNK] for other in range(dist.get_world_size())])
    return torch.equal(whole, expected)


def several_at_a_time(rank: int) -> bool:
    """Reductions and gathers of several sizes that overlap do not take each other's messages."""
    exchange, world_size = made(direct=True), dist.get_world_size()
    flats = [torch.full((size * world_size,), float(rank + size)) for size in (5, 70, 900)]
    wholes = [torch.full((size * world_size,), -1.0) for size in (30, 4)]
    reductions = [exchange.reduce_scatter(flat, None) for flat in flats]
    for whole in wholes:
        exchange.chunk(whole).fill_(rank)
    works = [work for whole in wholes for work in exchange.all_gather(whole)]
    totals = [reduction.wait(1.0, torch.float32) for reduction in reversed(reductions)]
    for work in works:
        work.wait()
    ranks = sum(range(world_size))
    right = [bool((total == ranks + world_size * size).all()) for total, size in zip(totals, (900, 70, 5), strict=True)]
    return all(right) and all(sorted(set(whole.tolist())) == list(range(world_size)) for whole in wholes)


def as_fsdp2_calls_it(rank: int) -> bool:
    """Room is asked for the input first; what it is filled with is bf16, and sums are fp32."""
    world_size = dist.get_world_size()
    comm = DirectReduceScatter(made(direct=True), torch.bfloat16)
    for _ in range(2):
        sent = comm.allocate((CHUNK * world_size,), dtype=torch.float32, device=torch.device("cpu"))
        out = comm.allocate((CHUNK,), dtype=torch.float32, device=torch.device("cpu"))
        sent.copy_(buffer(rank, torch.bfloat16))
        comm(output_tensor=out, input_tensor=sent, group=dist.group.WORLD, op=dist.ReduceOp.AVG)
        expected = torch.stack([buffer(other, torch.bfloat16).float() for other in range(world_size)]).mean(0)
        torch.testing.assert_close(out, expected[rank * CHUNK : (rank + 1) * CHUNK], rtol=1e-6, atol=1e-6)
    return sent.dtype == torch.bfloat16


def train(rank: int, direct: bool, stage: int, half: bool) -> list[float]:
    """Losses of an engine whose messages go one way or the other."""
    before = exchange_module._MOST_DIRECT
    exchange_module._MOST_DIRECT = before if direct else 0
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1))
        config = {
            "train_batch_size": 12,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": half},
        }
        engine, *_ = hpc_ds.initialize(model=model, config=config)
    finally:
        exchange_module._MOST_DIRECT = before
    size = engine.train_micro_batch_size_per_gpu()
    data = torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in data:
        loss = engine(batch[rank * size : (rank + 1) * size]).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(engine._agreed.loss)
    return losses


CASES: dict[str, Any] = {
    **{
        f"sum {direct} {dtype} {wire}": (sum_of_all, (direct, dtype, wire))
        for direct in (True, False)
        for dtype in DTYPES
        for wire in (None, torch.bfloat16)
        if not (dtype == torch.float16 and wire)
    },
    **{f"gather {direct} {dtype}": (gather, (direct, dtype)) for direct in (True, False) for dtype in DTYPES},
    "several": (several_at_a_time, ()),
}
STEPS = {
    f"train {direct} {stage} {half}": (train, (direct, stage, half))
    for direct in (True, False)
    for stage in range(4)
    for half in (False, True)
}


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda world_size: f"{world_size} ranks")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    more = {"fsdp2": (as_fsdp2_calls_it, ())} if request.param > 1 else {}
    return run_cases(request.param, {**CASES, **more, **STEPS})


@pytest.mark.parametrize("case", CASES)
def test_what_arrives_is_right(outcomes: Outcomes, case: str) -> None:
    assert all(outcomes[case])


def test_fsdp2_gets_sums_of_what_travelled_in_the_compute_type() -> None:
    assert run_cases(2, {"fsdp2": (as_fsdp2_calls_it, ())})["fsdp2"] == [True, True]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_training_is_the_same_either_way(outcomes: Outcomes, stage: int, half: bool) -> None:
    directly, by_backend = (outcomes[f"train {direct} {stage} {half}"] for direct in (True, False))
    torch.testing.assert_close(directly, by_backend, rtol=1e-6 if not half else 4e-3, atol=1e-7)
