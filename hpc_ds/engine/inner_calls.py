"""Calls of a part of a sharded model, from outside of its forward: ``model.generate(...)``, ``model.encoder(...)``.

At ZeRO stage 3 what is in no block is gathered when the whole model is called. A script that calls a part, as generation
calls an encoder, finds it sharded, where DeepSpeed would gather it; so the first such call gathers it. Only without
gradients: those of a backward pass that the whole model knows nothing of would be lost.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn


def gather_at_inner_calls(root: nn.Module, sharded: Iterable[Any], gather: Callable[[], None]) -> None:
    """Let every module outside of blocks have its own parameters gathered when it is called by itself.

    Args:
        root: the model; its own call gathers already.
        sharded: what is gathered by itself: the blocks, and the root.
        gather: collective; gathers what is in no block.
    """
    inside = {inner for block in sharded if block is not root for inner in block.modules()}
    for module in root.modules():
        if module is not root and module not in inside and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(partial(_before_call, gather))


def _before_call(gather: Callable[[], None], module: nn.Module, _inputs: Any) -> None:
    if not torch.is_grad_enabled() and any(isinstance(own, DTensor) for own in module.parameters(recurse=False)):
        gather()
