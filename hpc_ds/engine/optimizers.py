"""From the config's ``optimizer`` section to a torch optimizer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.config.model import nearest
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hpc_ds.config.training import OptimizerConfig

# DeepSpeed's own options of optimizers, which choose between implementations that we do not have.
_IMPLEMENTATION_OPTIONS = {"torch_adam", "adam_w_mode", "bias_correction", "legacy_fusion"}


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that the config names, over sharded parameters or groups of them.

    ``Adam`` means decoupled weight decay (AdamW) unless ``adam_w_mode`` is false, and weight decay is 0 unless given:
    both as in DeepSpeed. Adam and AdamW are fused.

    Raises:
        ConfigError: torch has no such optimizer, or it does not take these parameters.
    """
    name, params = config.type, dict(config.params)
    adam_w_mode = bool(params.get("adam_w_mode", True))
    if "max_grad_norm" in params:
        raise ConfigError("optimizer.params.max_grad_norm: not an optimizer's parameter; use gradient_clipping")
    params = {key: value for key, value in params.items() if key not in _IMPLEMENTATION_OPTIONS}
    if name.lower() in {"adam", "adamw"}:
        name = "AdamW" if name.lower() == "adamw" or adam_w_mode else "Adam"
        params.setdefault("weight_decay", 0.0)
        params.setdefault("fused", True)
    kind = _class(name)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    unknown = set(params) - set(inspect.signature(kind).parameters)
    if unknown:
        key = min(unknown)
        cure = nearest(key, list(inspect.signature(kind).parameters)[1:])
        raise ConfigError(f"optimizer.params.{key}: unknown to {name}; {cure}", key=f"optimizer.params.{key}")
    try:
        return kind(list(parameters), **params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.params: refused by {name}: {error}; check them", key="optimizer.params") from None


def _class(name: str) -> type[torch.optim.Optimizer]:
    known = {key: value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    by_lower: dict[str, type[torch.optim.Optimizer]] = {key.lower(): value for key, value in known.items()}
    if name.lower() not in by_lower:
        raise ConfigError(
            f"optimizer.type {name!r}: unknown; {nearest(name, list(known))}", key="optimizer.type", value=name
        )
    return by_lower[name.lower()]


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
