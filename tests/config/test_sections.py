"""The sections that stand apart: DeepSpeed's defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_ds.config.model import Model, check
from hpc_ds.config.sections import (
    ActivationCheckpointingConfig,
    AutocastConfig,
    CompileConfig,
    FileMonitorConfig,
    FlopsProfilerConfig,
    WandbConfig,
)
from hpc_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("model", "defaults"),
    [
        (FileMonitorConfig, {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"}),
        (WandbConfig, {"enabled": False, "group": None, "team": None, "project": "deepspeed"}),
        (
            FlopsProfilerConfig,
            {
                "enabled": False,
                "recompute_fwd_factor": 0.0,
                "profile_step": 1,
                "module_depth": -1,
                "top_modules": 1,
                "detailed": True,
                "output_file": None,
            },
        ),
        (ActivationCheckpointingConfig, {"cpu_checkpointing": False}),
        (CompileConfig, {"enabled": False, "backend": "inductor", "kwargs": {}}),
        (AutocastConfig, {"enabled": False, "dtype": "bfloat16"}),
    ],
)
def test_the_defaults_are_deepspeeds(model: type[Model], defaults: dict[str, Any]) -> None:
    assert model().model_dump() == defaults


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (FlopsProfilerConfig, {"profile_step": 0}, "profile_step 0: out of range"),
        (FlopsProfilerConfig, {"recompute_fwd_factor": -0.5}, "recompute_fwd_factor -0.5: out of range"),
        (FlopsProfilerConfig, {"module_depth": -2}, "module_depth -2: out of range"),
        (FileMonitorConfig, {"job_name": ""}, "job_name ''"),
        (AutocastConfig, {"dtype": "float32"}, "dtype 'float32': not one of the choices"),
        (CompileConfig, {"backnd": "eager"}, "backnd: unknown key; did you mean 'backend'"),
    ],
)
def test_what_cannot_be_meant_is_refused(model: type[Model], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(model, data, "training config")
