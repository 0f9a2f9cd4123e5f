"""Constants and types that scripts import from DeepSpeed, under its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpc_ds.compat.names import GIT_BRANCH, GIT_HASH, VERSION
from hpc_ds.runtime.by_name import default_timeout

DeepSpeedOptimizerCallable = DeepSpeedSchedulerCallable = Callable[..., Any]

version, git_hash, git_branch = VERSION, GIT_HASH, GIT_BRANCH

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
default_pg_timeout = default_timeout()
CROSS_RANK, CROSS_SIZE, LOCAL_RANK = "CROSS_RANK", "CROSS_SIZE", "LOCAL_RANK"

NCCL_BACKEND, CCL_BACKEND, MPI_BACKEND = "nccl", "ccl", "mpi"
GLOO_BACKEND, SCCL_BACKEND, HCCL_BACKEND = "gloo", "sccl", "hccl"

FORWARD_MICRO_TIMER, FORWARD_GLOBAL_TIMER = "fwd_microstep", "fwd"
BACKWARD_MICRO_TIMER, BACKWARD_GLOBAL_TIMER = "bwd_microstep", "bwd"
BACKWARD_INNER_MICRO_TIMER, BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner_microstep", "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER, BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce_microstep", "bwd_allreduce"
STEP_MICRO_TIMER, STEP_GLOBAL_TIMER = "step_microstep", "step"

NO_OPS: dict[str, bool] = {}
"""Operators that DeepSpeed would compile, by whether it can: there are none."""


def is_compile_supported() -> bool:
    """Whether there is ``torch.compile``: always."""
    return True
