"""From the config's ``scheduler`` section to a schedule: DeepSpeed's laws, or one of torch's by its name."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from hpc_ds.config.model import nearest
from hpc_ds.engine.cycles import LRRangeTest, OneCycle
from hpc_ds.engine.warmups import WarmupCosineLR, WarmupDecayLR, WarmupLR
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hpc_ds.config.training import SchedulerConfig

_OURS = {kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle)}

_FUNCTIONS = (
    "it takes a function, which JSON cannot hold; pass initialize lr_scheduler=, a callable from the optimizer to one"
)
_SCHEDULES = "it is made of other schedules; pass initialize lr_scheduler=, a callable from the optimizer to one"
_REFUSED = {
    "LambdaLR": _FUNCTIONS,
    "MultiplicativeLR": _FUNCTIONS,
    "SequentialLR": _SCHEDULES,
    "ChainedScheduler": _SCHEDULES,
    "ReduceLROnPlateau": "its steps need a metric, which engine.step() does not have; use another, or step one of your own",
}


def make_schedule(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that the config names: one of ours, else one of ``torch.optim.lr_scheduler``.

    Raises:
        ConfigError: there is no such schedule, or it does not take these parameters.
    """
    kind = _class(config.type)
    _check_names(kind, config.params)
    try:
        return kind(optimizer, **config.params)
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(
            f"scheduler.params: refused by {config.type}: {error}; it takes {', '.join(_parameters(kind))}",
            key="scheduler.params",
        ) from None


def _class(name: str) -> Any:
    torchs = {
        key: value
        for key, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not key.endswith("LRScheduler")
    }
    if name in _REFUSED:
        raise ConfigError(
            f"scheduler.type {name!r}: refused, because {_REFUSED[name]}", key="scheduler.type", value=name
        )
    known: dict[str, Any] = {**torchs, **_OURS}
    if name not in known:
        usable = [key for key in known if key not in _REFUSED]
        message = f"scheduler.type {name!r}: unknown; {nearest(name, usable)}"
        raise ConfigError(message, key="scheduler.type", value=name)
    return known[name]


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return {name: parameter for name, parameter in inspect.signature(kind).parameters.items() if name != "optimizer"}


def _check_names(kind: Any, params: dict[str, Any]) -> None:
    known = _parameters(kind)
    for key in params:
        if key not in known:
            message = f"scheduler.params.{key}: unknown to {kind.__name__}; {nearest(key, list(known))}"
            raise ConfigError(message, key=f"scheduler.params.{key}")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in params:
            message = f"scheduler.params.{key}: missing; {kind.__name__} has no default for it"
            raise ConfigError(message, key=f"scheduler.params.{key}")
