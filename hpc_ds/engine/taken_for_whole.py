"""What a script is told that takes a sharded parameter for a whole one (docs/decisions/012).

At ZeRO stage 3 a parameter between uses is a DTensor. Most of what a script does to one as if it were whole fails in
torch's words, which do not know of ours. Two things are wrong and silent: reading a number from a sum over one gives this
rank's part of the sum, and writing to elements of one writes to a copy. These are refused.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from types import TracebackType

    from torch import nn

log = logging.getLogger("hpc_ds")

MESH_DIM = "hpc_ds_shard"  # by which our DTensors are known from a script's own

_CURE = (
    "at ZeRO stage 3 each rank has a part of it; call hpc_ds.zero.safe_get_full_fp32_param(parameter) on every rank, or use "
    "module.weight inside of `with hpc_ds.zero.GatheredParameters(parameters):`, where modifier_rank=0 keeps what rank 0 "
    "writes; if another module's forward uses it, call hpc_ds.zero.register_external_parameter before initialize"
)
_WORDS = ("mixed torch.Tensor and DTensor", "not supported for tensor subclasses", "_apply(): Couldn't swap")


def refuse(error: BaseException) -> None:
    """Say in our words what torch's error means.

    Raises:
        ConfigError: it comes from using a sharded parameter as if it were whole.
    """
    if _is_meant(error):
        raise ConfigError(f"parameter: its data was used as if it were whole: {_CURE}") from error


def be_told() -> None:
    """Explain such errors where they end the process, and refuse what would be wrong and silent."""
    handlers = getattr(getattr(DTensor, "_op_dispatcher", None), "_custom_op_handlers", {})
    aten = torch.ops.aten
    handlers.setdefault(aten._local_scalar_dense.default, _read_number)  # noqa: SLF001 - operators have such names
    for operator in (aten.select.int, aten.slice.Tensor, aten.index.Tensor, aten.index_put_.default):
        handlers.setdefault(operator, partial(_index, handlers))
    if not isinstance(sys.excepthook, _Explaining):
        sys.excepthook = _Explaining(sys.excepthook)


def watch_state_dict(module: nn.Module) -> None:
    """Say so, once a process, where a state dict of a sharded module has parts: a file of it on one rank loads nowhere."""
    module.register_state_dict_post_hook(_warn_of_parts)


_told: set[str] = set()


def _warn_of_parts(_module: nn.Module, state_dict: dict[str, Any], _prefix: str, _metadata: object) -> None:
    # What torch has detached; with keep_vars, as we ask for it ourselves, the parameters know what they are.
    parts = [name for name, value in state_dict.items() if type(value) is DTensor and _is_ours(value)]
    if parts and not _told and dist.get_rank() == 0:
        _told.add(parts[0])
        log.warning(
            "state_dict: at ZeRO stage 3 each rank has a part of %r and %d others, and no plain module loads them from a file; "
            "call engine.module_state_dict() or engine.save_16bit_model(folder) on every rank",
            parts[0], len(parts) - 1,
        )  # fmt: skip


class _Explaining:
    """An ``excepthook`` that adds a line to those errors."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._before(kind, error, trace)
        if _is_meant(error):
            log.error("parameter: its data may have been used as if it were whole: %s", _CURE)


def _is_meant(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def _is_ours(tensor: DTensor) -> bool:
    return MESH_DIM in (tensor.device_mesh.mesh_dim_names or ())


def _read_number(_: object, args: tuple[DTensor], __: object) -> object:
    (number,) = args
    if _is_ours(number) and any(placement.is_partial() for placement in number.placements):
        raise ConfigError(f"number from a parameter: it is this rank's part of a sum over the whole: {_CURE}")
    return number.to_local().item()


def _index(handlers: dict[Any, Any], operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    if _is_ours(args[0]) and any(placement.is_shard() for placement in args[0].placements):
        raise ConfigError(f"elements of a parameter: {_CURE}")
    handler = handlers.pop(operator)  # for a script's own DTensors, as if there were none
    try:
        return operator(*args, **kwargs)
    finally:
        handlers[operator] = handler
