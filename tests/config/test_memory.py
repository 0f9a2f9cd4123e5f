"""Bytes on a rank, against the numbers of the ZeRO paper and the table of the module, worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.config.memory import STAGES, Memory, bytes_per_rank, memory_of, state_bytes
from hpc_ds.config.sections import OptimizerConfig
from hpc_ds.config.training import load_training

# The paper's table 1: 7.5 billion parameters, mixed-precision Adam, 64 ranks, in GB. Stage 1: 31.4, 2: 16.6, 3: 1.88.
PAPER = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.88}


@pytest.mark.parametrize(("stage", "gigabytes"), PAPER.items())
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_mixed_precision_adam_is_as_in_the_paper(stage: int, gigabytes: float, compute: str) -> None:
    found = bytes_per_rank(7_500_000_000, stage, 64, compute=compute)
    assert found.total / 1e9 == pytest.approx(gigabytes, rel=0.005)  # the paper rounds


# stage, compute, accumulated type -> bytes of 1000 parameters on one of 4 ranks: parameters, masters, gradients, state.
ROWS: list[tuple[int, str, str | None, tuple[float, float, float, float]]] = [
    (0, "fp32", None, (4000, 0, 4000, 8000)),
    (1, "fp32", None, (4000, 0, 4000, 2000)),
    (2, "fp32", None, (4000, 0, 1000, 2000)),
    (3, "fp32", None, (1000, 0, 1000, 2000)),
    (0, "bf16", None, (2000, 4000, 2000, 8000)),
    (1, "bf16", None, (2000, 1000, 2000, 2000)),
    (2, "bf16", None, (2000, 1000, 500, 2000)),
    (3, "bf16", None, (1000, 0, 1000, 2000)),
    (0, "fp16", "fp32", (2000, 4000, 4000, 8000)),
    (1, "fp16", "fp32", (2000, 1000, 4000, 2000)),
    (2, "fp16", "fp32", (2000, 1000, 1000, 2000)),
    (3, "fp16", "fp32", (1000, 0, 1000, 2000)),
    (2, "fp32", "bf16", (4000, 0, 500, 2000)),
]


@pytest.mark.parametrize(("stage", "compute", "grad_accum", "parts"), ROWS)
def test_each_stage_holds_what_the_table_says(
    stage: int, compute: str, grad_accum: str | None, parts: tuple[float, float, float, float]
) -> None:
    found = bytes_per_rank(1000, stage, 4, compute=compute, grad_accum=grad_accum)
    assert found == Memory(*parts, on_host=0)
    assert found.total == sum(parts)


# What is offloaded, stage -> bytes in host memory, of the bf16 rows above.
OFFLOADS: list[tuple[set[str], int, float]] = [
    ({"optimizer"}, 0, 0),
    ({"optimizer"}, 1, 3000),
    ({"optimizer"}, 2, 3000),
    ({"optimizer"}, 3, 2000),
    ({"param"}, 2, 0),
    ({"param"}, 3, 4000),
    ({"optimizer", "param"}, 3, 4000),
]


@pytest.mark.parametrize(("offload", "stage", "on_host"), OFFLOADS, ids=str)
def test_offloaded_bytes_are_in_host_memory(offload: set[str], stage: int, on_host: float) -> None:
    found = bytes_per_rank(1000, stage, 4, compute="bf16", offload=frozenset(offload))
    assert found.on_host == on_host
    assert found.total == bytes_per_rank(1000, stage, 4, compute="bf16").total


OPTIMIZERS: list[tuple[str, dict[str, Any], int]] = [
    ("Adam", {}, 8),
    ("adamw", {"lr": 1}, 8),
    ("AdamW", {"amsgrad": True}, 12),
    ("Lamb", {}, 8),
    ("SGD", {}, 0),
    ("sgd", {"momentum": 0.0}, 0),
    ("SGD", {"momentum": 0.9}, 4),
    ("Lion", {}, 4),
    ("Adagrad", {}, 4),
    ("Muon", {}, 4),
    ("RMSprop", {}, 4),
    ("RMSprop", {"momentum": 0.9, "centered": True}, 12),
    ("SomethingOfANewTorch", {}, 8),
]


@pytest.mark.parametrize(("name", "params", "size"), OPTIMIZERS, ids=str)
def test_optimizers_keep_so_much_for_a_parameter(name: str, params: dict[str, Any], size: int) -> None:
    assert state_bytes(OptimizerConfig(type=name, params=params)) == size


def test_an_optimizer_of_the_script_is_taken_for_adam() -> None:
    assert state_bytes(None) == 8


def test_a_config_says_all_that_is_needed() -> None:
    config = load_training(
        {
            "bf16": {"enabled": True},
            "optimizer": {"type": "SGD", "params": {"momentum": 0.9}},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        }
    )[0]
    assert memory_of(config, 2, 4, 1000) == Memory(2000, 1000, 1000, 1000, on_host=2000)
    assert memory_of(config, 0, 4) == Memory(2, 4, 4, 4, on_host=0)


@given(
    st.integers(1, 10**12),
    st.integers(1, 4096),
    st.sampled_from(["fp32", "bf16", "fp16"]),
    st.sampled_from([None, "fp32"]),
    st.sampled_from([0, 4, 8, 12]),
)
def test_a_higher_stage_never_holds_more(
    parameters: int, world_size: int, compute: str, grad_accum: str | None, state: int
) -> None:
    totals = [
        bytes_per_rank(parameters, stage, world_size, compute=compute, grad_accum=grad_accum, state=state).total
        for stage in STAGES
    ]
    assert all(more >= less * (1 - 1e-12) for more, less in itertools.pairwise(totals))
    one = bytes_per_rank(parameters, 0, 1, compute=compute, grad_accum=grad_accum, state=state).total
    assert totals[0] == one
