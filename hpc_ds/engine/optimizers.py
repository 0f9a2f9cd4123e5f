"""From the config's ``optimizer`` section to a torch optimizer over pieces of parameters.

| works on                     | optimizers                                                                                  |
|------------------------------|---------------------------------------------------------------------------------------------|
| elements, so on any range    | Lion, and torch's Adam, AdamW, Adagrad, SGD and those of ``_ELEMENTWISE``                    |
| whole parameters, from ranges| Lamb (norms), Muon (matrices): they communicate                                             |
| whole parameters only        | torch's others, as Adafactor: only where every rank has all of each parameter, at stage 0    |
| more than ``step()`` has     | LBFGS (the loss again), SparseAdam (sparse gradients): refused                              |

``Muon`` is ours, not torch's, which only takes matrices.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.config.model import nearest
from hpc_ds.engine.lamb import Lamb
from hpc_ds.engine.lion import Lion
from hpc_ds.engine.muon import Muon
from hpc_ds.engine.own_optimizer import check_numbers
from hpc_ds.engine.uncorrected_adam import UncorrectedAdam
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_ds.config.training import OptimizerConfig
    from hpc_ds.engine.piece import Piece

_OURS: dict[str, type[torch.optim.Optimizer]] = {"Lamb": Lamb, "Lion": Lion, "Muon": Muon}

_ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
)  # fmt: skip

_REFUSED = {
    "LBFGS": "it computes the loss again and again inside of a step, which engine.step() cannot",
    "SparseAdam": "it takes sparse gradients only, and the engine's are dense; use Adam",
}

# DeepSpeed's own parameters: those that choose between implementations, of which we have one of each ...
_IMPLEMENTATION = {"torch_adam", "set_grad_none", "fp32_optimizer_states", "legacy_fusion"}
# ... and those that we do not do, unless they say no.
_REFUSED_PARAMS = {
    "max_grad_norm": "not an optimizer's parameter; use gradient_clipping",
    "per_head_muon": "Muon makes whole matrices orthogonal, not one for each attention head; leave it out",
}


def elementwise(optimizer_class: type) -> bool:
    """Whether an optimizer updates each element by itself, so that it may work on ranges of parameters.

    Of classes that are neither torch's nor ours nobody knows, subclasses included, unless one says so itself: ``elementwise``
    among its own attributes.
    """
    known = {Lion, UncorrectedAdam, *(getattr(torch.optim, name) for name in _ELEMENTWISE)}
    return optimizer_class in known or bool(vars(optimizer_class).get("elementwise"))


def make_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], piece_of: Mapping[Any, Piece]
) -> torch.optim.Optimizer:
    """The optimizer that the config names. Its steps are collective where it needs whole parameters.

    ``Adam`` means decoupled weight decay (AdamW) unless ``adam_w_mode`` is false, and weight decay is 0 unless given: both as in
    DeepSpeed. Adam and AdamW are fused.

    Args:
        config: the section.
        groups: of master parameters, each with what the caller sets for it.
        piece_of: what each of them is.

    Raises:
        ConfigError: there is no such optimizer, it does not take these parameters, or it cannot work on ranges of parameters.
    """
    params = _usable(config.params)
    kind, params = _chosen(config.type, params)
    _refuse_unknown(kind, params)
    on_ranges = kind in _OURS.values() or elementwise(kind)
    if on_ranges:
        check_numbers(params)
    elif not all(piece.shared for piece in piece_of.values()):
        raise ConfigError(
            f"optimizer.type {config.type!r}: it needs whole parameters, and ZeRO stages 1 to 3 give each rank ranges of them; "
            "use stage 0, or an optimizer that works element by element, as AdamW",
            key="optimizer.type",
            value=config.type,
        )
    if "piece_of" in inspect.signature(kind).parameters:
        params["piece_of"] = piece_of
    try:
        return kind(groups, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer.params: refused by {kind.__name__}: {error}; check them", key="optimizer.params"
        ) from None


def _usable(given: dict[str, Any]) -> dict[str, Any]:
    params = {key: value for key, value in given.items() if key not in _IMPLEMENTATION}
    for key, reason in _REFUSED_PARAMS.items():
        if params.pop(key, False):
            raise ConfigError(f"optimizer.params.{key}: {reason}", key=f"optimizer.params.{key}")
    if isinstance(params.get("betas"), list):
        params["betas"] = tuple(params["betas"])
    return params


def _chosen(name: str, params: dict[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class, and its parameters."""
    kind: type[torch.optim.Optimizer] = _class(name)
    if kind not in {torch.optim.Adam, torch.optim.AdamW}:
        return kind, params
    decoupled = kind is torch.optim.AdamW or bool(params.get("adam_w_mode", True))
    corrected = bool(params.get("bias_correction", True))
    params = {key: value for key, value in params.items() if key not in {"adam_w_mode", "bias_correction"}}
    params.setdefault("weight_decay", 0.0)
    if not corrected:
        return UncorrectedAdam, {**params, "decoupled_weight_decay": decoupled}
    params.setdefault("fused", not params.get("foreach"))
    return torch.optim.AdamW if decoupled else torch.optim.Adam, params


def _class(name: str) -> type[torch.optim.Optimizer]:
    torchs = {key: value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    known: dict[str, type[torch.optim.Optimizer]] = {**torchs, **_OURS}
    by_lower = {key.lower(): key for key in known}
    exact = by_lower.get(name.lower())
    if exact is None:
        usable = [key for key in known if key not in _REFUSED]
        raise ConfigError(
            f"optimizer.type {name!r}: unknown; {nearest(name, usable)}", key="optimizer.type", value=name
        )
    if exact in _REFUSED:
        message = f"optimizer.type {name!r}: refused, because {_REFUSED[exact]}"
        raise ConfigError(message, key="optimizer.type", value=name)
    return known[exact]


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def _refuse_unknown(kind: type[torch.optim.Optimizer], params: dict[str, Any]) -> None:
    known = [name for name in list(inspect.signature(kind).parameters)[1:] if name != "piece_of"]
    for key in params:
        if key not in known:
            message = f"optimizer.params.{key}: unknown to {kind.__name__}; {nearest(key, known)}"
            raise ConfigError(message, key=f"optimizer.params.{key}")
