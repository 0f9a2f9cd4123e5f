"""Names of ``deepspeed.runtime.zero.partition_parameters`` and ``...zero.config`` that scripts look at, beside ``zero.Init``."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

ORIGINAL_ARANGE = torch.arange


class ZeroParamType(Enum):
    """What became of a parameter."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroStageEnum(int, Enum):
    """The stages of ZeRO."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3  # noqa: PIE796 - DeepSpeed's


class OffloadDeviceEnum(str, Enum):
    """Where a part of the training state is kept."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """The parts of the training state that ``engine.offload_states`` moves."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


def zero_wrapper_for_fp_tensor_constructor(
    function: Callable[..., Any], *_args: Any, **_kwargs: Any
) -> Callable[..., Any]:
    """The function as it is: ``zero.Init`` takes parameters as modules register them, and wraps no constructor of tensors.

    transformers puts its own in this place around ``zero.Init``, to keep positions in fp32, which they are here.
    """
    return function


def is_zero_param(parameter: Any) -> bool:
    """Whether ``zero.Init`` holds a parameter, or an engine at stage 3."""
    return hasattr(parameter, "ds_id")


def shutdown_init_context() -> None:
    """Nothing: ``initialize`` closes an open ``zero.Init`` by itself."""


restore_init_context = shutdown_init_context


def is_zero_supported_optimizer(optimizer: Any) -> bool:
    """Whether an optimizer may work on ranges of parameters, as at stages 1 to 3."""
    from hpc_ds.engine.lamb import Lamb
    from hpc_ds.engine.optimizers import elementwise

    return isinstance(optimizer, Lamb) or elementwise(type(optimizer))
