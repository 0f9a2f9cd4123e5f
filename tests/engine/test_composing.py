"""Offload and torch.compile change where numbers live and who computes them, not the numbers: at every stage."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from standing import (
    CLIP,
    PRECISIONS,
    STAGES,
    Reference,
    Standing,
    advance,
    batches,
    config,
    distance,
    engine_for,
    reference,
    values_of,
)

import hpc_ds

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks

BOUNDS = {"fp32": 1e-6, "bf16": 4e-3}  # see test_laws.py
CPU = {"device": "cpu"}
OFFLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "optimizer 1": (1, {"offload_optimizer": CPU}),
    "optimizer 2": (2, {"offload_optimizer": CPU}),
    "optimizer 3": (3, {"offload_optimizer": CPU}),
    "param 3": (3, {"offload_param": CPU}),
    "both 3": (3, {"offload_optimizer": CPU, "offload_param": {"device": "cpu", "pin_memory": False}}),
}


def wanted(precision: str) -> Reference:
    if precision == "fp32":
        return reference(CLIP)
    made = Reference(precision=precision, parts=(2, 3))
    for batch in batches():
        made.step(batch, CLIP)
    return made


def offload(rank: int, name: str, precision: str) -> dict[str, torch.Tensor]:
    stage, section = OFFLOADS[name]
    engine = engine_for(
        stage,
        zero_optimization={"stage": stage, **section},
        gradient_accumulation_steps=3,
        gradient_clipping=CLIP,
        **PRECISIONS[precision],
    )
    for batch in batches():
        advance(engine, batch)
    return values_of(engine)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_changes_no_number(pair: Outcomes, name: str, precision: str) -> None:
    for values in pair[f"offload {name} {precision}"]:
        assert distance(values, wanted(precision).values) < BOUNDS[precision]


COMPILE = {"enabled": True, "backend": "aot_eager"}


def compiled(rank: int, stage: int, precision: str, folder: Path) -> dict[str, Any]:
    """Half of the steps, a save, and the rest in a new engine that was loaded; one block is checkpointed."""

    def make(seed: int) -> Any:
        settings = config(
            stage, compile=COMPILE, gradient_accumulation_steps=3, gradient_clipping=CLIP, **PRECISIONS[precision]
        )
        return hpc_ds.initialize(model=Standing(seed=seed), config=settings)[0]

    torch._dynamo.reset()
    engine = make(seed=1 + rank)
    engine_names = list(engine.module.state_dict())
    for batch in batches()[:2]:
        advance(engine, batch)
    engine.save_checkpoint(folder)
    engine = make(seed=1)
    engine.load_checkpoint(folder)
    for batch in batches()[2:]:
        advance(engine, batch)
    return {
        "values": values_of(engine),
        "names": engine_names == list(Standing().state_dict()),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", BOUNDS)
def test_compiled_blocks_train_and_resume_as_they_would_uncompiled(pair: Outcomes, precision: str, stage: int) -> None:
    for rank in pair[f"compiled {precision} {stage}"]:
        assert distance(rank["values"], wanted(precision).values) < BOUNDS[precision]
        assert rank["names"]
        assert rank["graphs"] > 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What two ranks did in all cases of this file."""
    folder = tmp_path_factory.mktemp("composing")
    cases: dict[str, Any] = {
        f"offload {name} {precision}": (offload, (name, precision))
        for name, precision in itertools.product(OFFLOADS, BOUNDS)
    }
    for precision, stage in itertools.product(BOUNDS, STAGES):
        cases[f"compiled {precision} {stage}"] = (compiled, (stage, precision, folder / f"{precision} {stage}"))
    return run_cases(2, cases, worlds=2)
