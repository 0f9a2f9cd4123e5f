"""Hugging Face's Trainer with ``--deepspeed`` trains on hpc_ds at every stage as it trains plain in one process."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hf_models import MODELS
from trainers import config, plain, train, worst

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Outcomes

pytestmark = pytest.mark.ranks

# DeepSpeed's schedules begin a step later than transformers' of the same name, so these are transformers' everywhere; the
# optimizer is that of the config or of the Trainer.
CONFIGS = {stage: config(stage, optimizer=stage != 2, scheduler=False) for stage in (0, 1, 2, 3)}
CASES = list(itertools.product(MODELS, CONFIGS))
# Of a loss in bf16: it is one of 256 numbers to a factor of 2, and the models that compute it so have it rounded twice.
BOUNDS = dict.fromkeys(MODELS, 4e-3) | {"bert": 8e-3, "t5": 8e-3}


def cases(folder: Path) -> dict[str, Any]:
    """What the ranks shall do, each in a folder of its own."""
    return {
        f"{name}-{stage}": (train, (name, CONFIGS[stage], folder / f"{name}-{stage}", {"bf16": True}))
        for name, stage in CASES
    }


@functools.cache
def wanted(name: str, folder: Path) -> dict[str, Any]:
    return plain(name, folder, bf16=True)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_it_trains_as_in_one_process(
    came: Outcomes, name: str, stage: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = wanted(name, tmp_path_factory.getbasetemp() / "alone")
    first, second = came[f"{name}-{stage}"]
    assert first["loss"] == second["loss"]
    assert worst(first["loss"], alone["loss"]) < BOUNDS[name]
