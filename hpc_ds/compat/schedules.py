"""``deepspeed.runtime.lr_schedules``: the engine's schedules, the names of their parameters, and options of a command line.

Source: https://deepspeed.readthedocs.io/en/latest/schedulers.html, release 0.19.8
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hpc_ds.engine.cycles import LRRangeTest, OneCycle
from hpc_ds.engine.warmups import WarmupCosineLR, WarmupDecayLR, WarmupLR
from hpc_ds.errors import ConfigError

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE = LRRangeTest.__name__, OneCycle.__name__
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = WarmupLR.__name__, WarmupDecayLR.__name__, WarmupCosineLR.__name__
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"

# Option -> its default, as DeepSpeed's command line has it, which is not always the schedule's own; by what takes it.
_RANGE_TEST: dict[str, Any] = {
    "lr_range_test_min_lr": 0.001, "lr_range_test_step_rate": 1.0, "lr_range_test_step_size": 1000,
    "lr_range_test_staircase": False,
}  # fmt: skip
_CYCLE: dict[str, Any] = {
    "cycle_first_step_size": 1000, "cycle_first_stair_count": -1, "cycle_second_step_size": -1, "cycle_second_stair_count": -1,
    "decay_step_size": 1000, "cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "decay_lr_rate": 0.0, "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.9, "decay_mom_rate": 0.0,
}  # fmt: skip
_WARMUP: dict[str, Any] = {
    "warmup_min_lr": 0.0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000, "warmup_type": WARMUP_LOG_RATE,
}  # fmt: skip
_COSINE: dict[str, Any] = {
    "warmup_num_steps": 1000, "warmup_type": WARMUP_LOG_RATE, "warmup_min_ratio": 0.01, "cos_min_ratio": 0.01,
}  # fmt: skip
_OF_SCHEDULE = {
    LR_RANGE_TEST: _RANGE_TEST,
    ONE_CYCLE: _CYCLE,
    WARMUP_LR: _WARMUP,
    WARMUP_DECAY_LR: _WARMUP,
    WARMUP_COSINE_LR: _COSINE,
}
_OPTIONS = {LR_SCHEDULE: None, **_RANGE_TEST, **_CYCLE, "cycle_momentum": False, **_WARMUP, **_COSINE}

# WARMUP_NUM_STEPS = "warmup_num_steps", and so on.
globals().update({name.upper(): name for name in (*_OPTIONS, "edge_value", "mid_value", "total_num_steps")})


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of schedules to a script's, with the defaults of DeepSpeed's."""
    group = parser.add_argument_group("Convergence Tuning", "learning rate schedules, with DeepSpeed's names")
    for name, default in _OPTIONS.items():
        if isinstance(default, bool):
            group.add_argument(f"--{name}", action="store_true", default=default)
        else:
            group.add_argument(f"--{name}", type=str if default is None else type(default), default=default)
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of schedules on this script's command line, and what else is on it."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def override_lr_range_test_params(args: Any, params: dict[str, Any]) -> None:
    """Set the parameters of LRRangeTest that a command line has."""
    _override(args, params, _RANGE_TEST)


def override_1cycle_params(args: Any, params: dict[str, Any]) -> None:
    """Set the parameters of OneCycle that a command line has."""
    _override(args, params, _CYCLE)


def override_warmupLR_params(args: Any, params: dict[str, Any]) -> None:  # noqa: N802 - DeepSpeed's name
    """Set the parameters of WarmupLR that a command line has."""
    _override(args, params, _WARMUP)


def override_warmupCosineLR_params(args: Any, params: dict[str, Any]) -> None:  # noqa: N802 - DeepSpeed's name
    """Set the parameters of WarmupCosineLR that a command line has."""
    _override(args, params, _COSINE)


def override_params(args: Any, params: dict[str, Any]) -> None:
    """Set the parameters of all schedules that a command line has."""
    _override(args, params, {**_RANGE_TEST, **_CYCLE, **_WARMUP, **_COSINE})


def _override(args: Any, params: dict[str, Any], names: dict[str, Any]) -> None:
    params.update({name: getattr(args, name) for name in names if getattr(args, name, None) is not None})


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str | None]:
    """The ``scheduler`` section that a command line means; or None, and why."""
    name = getattr(args, LR_SCHEDULE, None)
    if name is None:
        return None, f"--{LR_SCHEDULE} not specified on command line"
    if name not in _OF_SCHEDULE:
        return None, f"{name} is not supported LR schedule"
    params: dict[str, Any] = {}
    _override(args, params, _OF_SCHEDULE[name])
    return {"type": name, "params": params}, None


def get_lr_from_config(config: dict[str, Any]) -> tuple[float | None, str]:
    """The learning rate that a ``scheduler`` section names; or None, and why."""
    for key in ("type", "params"):
        if key not in config:
            return None, f"LR schedule {key} not defined in config"
    name = config["type"]
    if name not in _OF_SCHEDULE:
        return None, f"{name} is not a valid LR schedule"
    if name == WARMUP_COSINE_LR:
        return None, f"{name} scales the optimizer learning rate by a ratio, so its params define no lr"
    rate = {LR_RANGE_TEST: "lr_range_test_min_lr", ONE_CYCLE: "cycle_max_lr"}.get(name, "warmup_max_lr")
    return config["params"][rate], ""


def get_torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """An optimizer of torch's, or the one that something wraps as ``optimizer``.

    Raises:
        ConfigError: it is neither.
    """
    for one in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(one, torch.optim.Optimizer):
            return one
    raise ConfigError(f"optimizer {type(optimizer).__name__}: not a torch.optim.Optimizer; pass one")


def update_lr(param_groups: list[dict[str, Any]], lrs: list[float]) -> list[float]:
    """Set the rate of every group; returns the rates."""
    for group, rate in zip(param_groups, lrs, strict=True):
        group["lr"] = rate
    return [group["lr"] for group in param_groups]
