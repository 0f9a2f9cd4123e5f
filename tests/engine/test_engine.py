"""What an engine offers beside training: its surface, weights as a file, a stop on request, the loader."""

from __future__ import annotations

import itertools
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from standing import (
    PRECISIONS,
    STAGES,
    Reference,
    Standing,
    advance,
    batches,
    config,
    distance,
    engine_for,
    micro_batches,
)
from torch import nn

import hpc_ds
from hpc_ds.errors import ConfigError
from hpc_ds.runtime import preemption

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks


def surface(rank: int, folder: Path) -> dict[str, Any]:
    model = Standing()
    engine, optimizer, loader, schedule = hpc_ds.initialize(
        model=model, config={"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    )
    said = {}
    for name, do in {
        "no optimizer": lambda: engine.backward(engine(batches()[0])),
        "not a scalar": lambda: engine_for(0).backward(torch.zeros(2, requires_grad=True)),
        "unknown attribute": lambda: engine.no_such_thing,
        "iterable dataset": lambda: engine_for(0, arguments={"training_data": Endless()}),
        "no model": lambda: hpc_ds.initialize(config=config(0)),
        "foreign parameter": lambda: engine_for(0, arguments={"model_parameters": [nn.Parameter(torch.zeros(2))]}),
    }.items():
        try:
            do()
        except (ConfigError, AttributeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return {
        "said": said,
        "nothing": (optimizer, loader, schedule, engine.get_lr(), engine.get_global_grad_norm()),
        "falls through": engine.twice is engine.module.twice is model.twice,
        "sizes": (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ),
        "loss": (engine(batches()[0]) - engine.forward(batches()[0])).item(),
    }


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return itertools.count()


def test_the_surface_of_an_engine(pair: Outcomes) -> None:
    for rank in pair["surface"]:
        assert rank["nothing"] == (None, None, None, [], None)
        assert rank["falls through"]
        assert rank["sizes"] == (12, 2, 3)
        assert rank["loss"] == 0
        said = rank["said"]
        assert said["no optimizer"].startswith("ConfigError: backward: the engine has no optimizer; ")
        assert said["not a scalar"].startswith("ConfigError: loss of shape (2,): not a scalar; ")
        assert said["unknown attribute"].startswith("AttributeError: 'Standing' object has no attribute")
        assert said["iterable dataset"].startswith("ConfigError: training_data: an IterableDataset has no positions")
        assert said["no model"] == "ConfigError: initialize: no model; pass model="
        assert said["foreign parameter"].startswith("ConfigError: model_parameters: one of them is not a parameter of")


def weights_file(rank: int, stage: int, precision: dict[str, Any], folder: Path) -> None:
    engine = engine_for(stage, **precision)
    advance(engine, batches()[0])
    engine(batches()[0])  # leaves whole parameters behind at stages 0-2
    assert engine.save_16bit_model(folder / "new" / "folder")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_saved_weights_load_into_the_plain_module(pair: Outcomes, folder: Path, precision: str, stage: int) -> None:
    pair[f"weights_file {precision} {stage}"]
    file = folder / f"{precision} {stage}" / "new" / "folder" / "pytorch_model.bin"
    saved = torch.load(file, weights_only=True)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {wanted}
    plain = Standing(seed=9)
    plain.load_state_dict(saved)
    once = Reference()
    once.step(batches()[0])
    close = {"fp32": 1e-6, "bf16": 2e-2}.get(precision, 2e-3)
    found = {name: value for name, value in Reference(model=plain).values.items() if name != "count"}
    assert distance(found, {name: value for name, value in once.values.items() if name != "count"}) < close
    assert [path.name for path in file.parent.iterdir()] == ["pytorch_model.bin"]


def told_to_stop(rank: int, root: Path) -> dict[str, Any]:
    """A run in which rank 1 alone is told to stop, in the middle of a step."""
    os.environ["HPCDS_RUN_DIR"] = str(root)
    try:
        engine = engine_for(3, gradient_accumulation_steps=3)
        seen = []
        for batch in batches():
            for number, micro_batch in enumerate(micro_batches(engine, batch)):
                engine.backward(engine(micro_batch))
                if rank == 1 and engine.global_steps == 1 and number == 0:
                    os.kill(os.getpid(), signal.SIGUSR2)
                seen.append((engine.global_steps, number))
                engine.step()
    except hpc_ds.Preempted as stop:
        return {"code": stop.code, "said": str(stop), "last": seen[-1]}
    finally:
        del os.environ["HPCDS_RUN_DIR"]
        preemption._request.by = None
    return {}


def test_one_rank_told_to_stop_stops_all_at_the_boundary(pair: Outcomes, folder: Path) -> None:
    first, second = pair["told_to_stop"]
    assert first == {"code": 75, "said": "checkpointed step 2 on another rank", "last": (1, 2)}
    assert second == {"code": 75, "said": "checkpointed step 2 on SIGUSR2", "last": (1, 2)}
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "global_step2"


def loader_order(rank: int) -> list[list[int]]:
    _, _, loader, _ = hpc_ds.initialize(
        model=Standing(), training_data=range(10), collate_fn=list, config=config(1, train_batch_size=4, seed=3)
    )
    return list(loader)


def test_the_loader_of_initialize_deals_an_epoch_out_to_the_ranks(pair: Outcomes) -> None:
    first, second = pair["loader_order"]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3 * 1_000_003)).tolist()
    together = [sample for halves in zip(first, second, strict=True) for half in halves for sample in half]
    assert together[:10] == order
    assert len(together) == 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    """What two ranks did in all cases of this file."""
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    cases: dict[str, Any] = {"surface": (surface, (folder,)), "loader_order": (loader_order, ())}
    for stage in STAGES:
        for name, precision in PRECISIONS.items():
            cases[f"weights_file {name} {stage}"] = (weights_file, (stage, precision, folder / f"{name} {stage}"))
    cases["told_to_stop"] = (told_to_stop, (run,))  # last: from here on the process hears signals
    return run_cases(2, cases)
