"""``torch_autocast``: parameters stay fp32, and torch decides for each operation of a forward whether it runs lower.

As in DeepSpeed the whole forward runs under autocast. Its ``lower_precision_safe_modules`` names the classes whose
gradients may be *communicated* lower; ours travel as ``communication_data_type`` says.

Source: https://docs.pytorch.org/docs/stable/amp.html; DeepSpeed 0.19.8, runtime/torch_autocast.py
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hpc_ds.config.sections import AutocastConfig

log = logging.getLogger("hpc_ds")

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "torch.bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "torch.float16": torch.float16,
}


def autocast_dtype(config: AutocastConfig) -> torch.dtype:
    """The lower precision; float16 needs a loss scale."""
    return _DTYPES[config.dtype]


def autocast_context(config: AutocastConfig, device_type: str, cache: bool = True) -> AbstractContextManager[Any]:
    """What the engine's forward runs in: the config decides, also under a script's own autocast.

    Args:
        config: the section.
        device_type: ``cuda`` or ``cpu``.
        cache: keep the lowered copy of a parameter until the forward ends; False where parameters are dropped before
            (stage 3), or the copies would stay.
    """
    foreign = torch.is_autocast_enabled(device_type)
    if config.enabled:
        # nested contexts share one cache of parameters, whatever their types
        return torch.autocast(device_type, dtype=autocast_dtype(config), cache_enabled=cache and not foreign)
    if foreign:
        _tell_of_foreign_autocast()
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@cache
def _tell_of_foreign_autocast() -> None:
    """Once a process: it holds for every forward."""
    log.warning(
        "torch.autocast around the engine is switched off inside of it; set torch_autocast, bf16 or fp16 in the config"
    )
