"""The config that a small DeepSpeed project begins with trains as it stands, on one rank and on two."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional

import hpc_ds

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.01}},
    "fp16": {"enabled": True},
    "zero_optimization": True,
}
STEPS = 40


def train(rank: int, file: str) -> dict[str, Any]:
    """Which quarter of the plane is a point in?"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4))
    points = torch.randn(64, 2)
    quarters = (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()
    data = torch.utils.data.TensorDataset(points, quarters)
    engine, _, loader, _ = hpc_ds.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, config=file
    )
    losses: list[float] = []
    engine.record = lambda _, **fields: losses.append(fields["loss"])
    while engine.global_steps < STEPS:
        for x, y in loader:
            loss = functional.cross_entropy(engine(x).float(), y)
            engine.backward(loss)
            engine.step()
    return {
        "losses": losses,
        "sizes": (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()),
        "stage": engine.zero_optimization_stage(),
        "scale": engine.cur_scale,
        "skipped": engine.skipped_steps,
        "types": {str(parameter.dtype) for parameter in engine.module.parameters()},
    }


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_seed_config_trains(world_size: int, tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    file.write_text(json.dumps(CONFIG))
    ranks = run_ranks(train, world_size, str(file))
    assert len({tuple(rank["losses"]) for rank in ranks}) == 1  # all ranks know the same
    for rank in ranks:
        assert rank["sizes"] == (4 // world_size, 4)
        assert (rank["stage"], rank["types"]) == (1, {"torch.float16"})
        # fp16 begins at 2**16: if that is too large steps are skipped, and none of them moves the loss away.
        assert rank["scale"] == 2.0 ** (16 - max(rank["skipped"] - 1, 0))
        assert rank["skipped"] < 5
        losses = rank["losses"]
        assert losses[0] == pytest.approx(math.log(4), rel=0.2)
        assert sum(losses[-4:]) / 4 < 0.5 * losses[0]
