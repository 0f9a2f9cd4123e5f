"""The names that the config knows without torch are those of the engine and of torch: parameters and defaults too."""

from __future__ import annotations

import inspect

import pytest
import torch

from hpc_ds.config.known_names import (
    REQUIRED,
    SCHEDULE_EXTRAS,
    SCHEDULES,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULES,
)
from hpc_ds.engine import schedules

NEW_IN_TORCH = {"Muon"}  # not in 2.7, the oldest that is supported; the engine has its own


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_the_parameters_that_the_config_lets_pass(name: str) -> None:
    parameters = inspect.signature(getattr(schedules, name)).parameters
    assert set(parameters) == {"optimizer", *SCHEDULES[name], *SCHEDULE_EXTRAS}
    expected = {
        key: inspect.Parameter.empty if default is REQUIRED else default for key, default in SCHEDULES[name].items()
    }
    assert {key: parameters[key].default for key in SCHEDULES[name]} == expected


def test_the_names_of_torch_are_known() -> None:
    """A newer torch may have more; it may not lack one that the config takes without a word."""
    assert [name for name in TORCH_OPTIMIZERS if not hasattr(torch.optim, name) and name not in NEW_IN_TORCH] == []
    assert [name for name in TORCH_SCHEDULES if not hasattr(torch.optim.lr_scheduler, name)] == []
