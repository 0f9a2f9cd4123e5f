"""The names of optimizers and schedules, known without torch: a typing error is found before a job waits for nodes.

A name that is not here may still be one of the installed torch, so the config only warns; the engine looks it up.

Source: DeepSpeed 0.19.8 (config.py, lr_schedules.py); torch 2.13 (torch.optim).
"""

from __future__ import annotations

from typing import Any

# DeepSpeed's own, in any case of letters.
OPTIMIZERS = ("Adam", "AdamW", "Adagrad", "SGD", "Lamb", "Lion", "Muon")

REFUSED_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(
        ("onebitadam", "zerooneadam", "onebitlamb"), "DeepSpeed itself has removed it (0.19.8); use Adam or Lamb"
    ),
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "there is no muP optimizer; use Adam, AdamW or SGD with groups"),
}

TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD", "SparseAdam",
)  # fmt: skip

REQUIRED = "required"  # stands for the default of a parameter that has none

_WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": None, "warmup_num_steps": 1000, "warmup_type": "log"}

# DeepSpeed's own schedules -> their parameters and defaults.
SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": {"total_num_steps": REQUIRED, **_WARMUP, "warmup_max_lr": 0.001},
    "WarmupCosineLR": {
        "total_num_steps": REQUIRED,
        "warmup_min_ratio": 0.0,
        "warmup_num_steps": 1000,
        "cos_min_ratio": 0.0001,
        "warmup_type": "log",
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 0.001,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
    "OneCycle": {
        "cycle_min_lr": REQUIRED,
        "cycle_max_lr": REQUIRED,
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
}

# Every schedule takes these too.
SCHEDULE_EXTRAS = ("last_batch_iteration",)

TORCH_SCHEDULES = (
    "ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR",
    "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau",
    "SequentialLR", "StepLR",
)  # fmt: skip

# What a schedule changes in a parameter group, and a checkpoint keeps for those that go on from it.
MOVED_BY_SCHEDULES = ("lr", "momentum", "betas")
