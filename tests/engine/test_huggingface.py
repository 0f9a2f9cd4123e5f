"""Hugging Face models, tiny ones made from configs, train as in one process at every stage, and go back to the plain model."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hf_models import MODELS, VOCABULARY
from ranks import Outcomes, run_cases
from standing import PRECISIONS, SAMPLES, STAGES, Reference, distance, engine_for, micro_batches, torchs, values_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

pytest.importorskip("transformers", reason="transformers: not installed; pip install 'hpc-ds[dev]'")

pytestmark = pytest.mark.ranks

PLACES, STEPS = 7, 2
# Relative, of losses, of norms, and of the model as a whole: the gradient of a bias of keys is 0 but for rounding.
BOUNDS = {"fp32": 1e-6, "bf16": 4e-3}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

CASES = list(itertools.product(MODELS, BOUNDS, STAGES))


@functools.cache
def texts() -> torch.Tensor:
    """(steps, samples, places)."""
    return torch.randint(VOCABULARY, (STEPS, SAMPLES, PLACES), generator=torch.Generator().manual_seed(5))


def make(name: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def loss_of(model: Any, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text, labels=text).loss


def train(rank: int, name: str, precision: str, stage: int, folder: Path) -> dict[str, Any]:
    engine = engine_for(
        stage,
        model=make(name, 1 + rank),
        gradient_accumulation_steps=2,
        optimizer={"type": "SGD", "params": SGD},
        **PRECISIONS[precision],
    )
    losses = []
    for batch in texts():
        losses.append([])
        for micro_batch in micro_batches(engine, batch):
            loss = loss_of(engine, micro_batch)
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
    engine.save_16bit_model(folder)
    whole = engine.module_state_dict()
    plain = make(name, seed=9)
    if dist.get_rank() == 0:
        plain.load_state_dict(whole)
    return {
        "losses": [sum(of_step) / len(of_step) for of_step in losses],
        "norm": engine.get_global_grad_norm(),
        "values": values_of(engine),
        "blocks": sum(1 for module in engine.module.modules() if type(module).__name__.startswith("FSDP")),
        "loaded": dict(plain.named_parameters()) if whole is not None else None,
    }


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The relative distance of two models."""
    assert one.keys() == other.keys()
    first, second = (torch.cat([some[name].double().flatten() for name in one]) for some in (one, other))
    return ((first - second).norm() / second.norm()).item()


@functools.cache
def wanted(name: str, precision: str) -> Reference:
    made = Reference(torchs(torch.optim.SGD, **SGD), model=make(name), precision=precision, parts=(2, 2), loss=loss_of)
    for batch in texts():
        made.step(batch)
    return made


@pytest.mark.parametrize(("name", "precision", "stage"), CASES)
def test_it_trains_as_in_one_process(pair: Outcomes, name: str, precision: str, stage: int) -> None:
    ranks, single, bound = pair[f"{name} {precision} {stage}"], wanted(name, precision), BOUNDS[precision]
    losses = [sum(of_step) / 2 for of_step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(single.losses, rel=bound)
    for rank in ranks:
        assert rank["norm"] == pytest.approx(single.norms[-1], rel=bound)
        trained = {key: value for key, value in single.values.items() if key in rank["values"]}
        assert single.masters.keys() <= trained.keys()
        assert apart(rank["values"], trained) < bound
    if stage == 3:
        assert ranks[0]["blocks"] > 2  # its layers are found, and the root


@pytest.mark.parametrize(("name", "precision", "stage"), CASES)
def test_its_weights_go_back_to_the_plain_model(
    pair: Outcomes, folder: Path, name: str, precision: str, stage: int
) -> None:
    first, second = pair[f"{name} {precision} {stage}"]
    assert second["loaded"] is None
    masters = {key: first["values"][key] for key in first["loaded"]}
    assert distance(first["loaded"], masters) == 0
    plain = make(name, seed=9)
    saved = torch.load(folder / f"{name} {precision} {stage}" / "pytorch_model.bin", weights_only=True)
    plain.load_state_dict(saved)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rounded = {key: value.to(dtype).float() for key, value in masters.items()}
    assert distance(dict(plain.named_parameters()), rounded) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    """What two ranks did in all cases of this file."""
    return run_cases(
        2,
        {
            f"{name} {precision} {stage}": (train, (name, precision, stage, folder / f"{name} {precision} {stage}"))
            for name, precision, stage in CASES
        },
        worlds=2,
    )
