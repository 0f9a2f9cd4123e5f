"""Which optimizer updates what: the config's or the client's own, moved from the module's parameters onto the masters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.engine.lamb import Lamb
from hpc_ds.engine.optimizers import elementwise, make_optimizer
from hpc_ds.engine.piece import own_range
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from hpc_ds.config.training import TrainingConfig
    from hpc_ds.engine.piece import Piece
    from hpc_ds.engine.sharding import Sharding


class Asked:
    """What an optimizer shall update, by the names that parameters have before and after sharding.

    Attributes:
        names: parameters, or groups of them; None for all that need gradients.
        states: of the client's optimizer, by name.
    """

    def __init__(self, model: nn.Module, optimizer: Any, model_parameters: Any) -> None:
        self._name_of = {parameter: name for name, parameter in model.named_parameters()}
        self.states: dict[str, dict[str, Any]] = {}
        if isinstance(optimizer, torch.optim.Optimizer):
            model_parameters = optimizer.param_groups
            self.states = {name: optimizer.state[one] for one, name in self._name_of.items() if one in optimizer.state}
        self.names = None if model_parameters is None else [self._by_name(item) for item in model_parameters]

    def _by_name(self, item: Any) -> Any:
        if isinstance(item, tuple):  # an entry of named_parameters()
            item = item[1]
        if isinstance(item, dict):
            parameters = [item["params"]] if isinstance(item["params"], torch.Tensor) else item["params"]
            return {**item, "params": [self._by_name(parameter) for parameter in parameters]}
        if item not in self._name_of:
            raise ConfigError("model_parameters: one of them is not a parameter of the model; pass model.parameters()")
        return self._name_of[item]

    def groups(self, sharding: Sharding) -> list[dict[str, Any]]:
        """Groups of the masters that the optimizer shall update; a frozen parameter has none."""
        masters = {piece.name: piece.master for piece in sharding.pieces}
        if self.names is None:
            return [{"params": list(masters.values())}]
        grouped = [item for item in self.names if isinstance(item, dict)]
        single = [item for item in self.names if not isinstance(item, dict)]
        groups = grouped + ([{"params": single}] if single else [])
        return [{**group, "params": [masters[name] for name in group["params"] if name in masters]} for group in groups]


def choose_optimizer(
    given: Any, asked: Asked, config: TrainingConfig, sharding: Sharding
) -> torch.optim.Optimizer | None:
    """The client's optimizer, moved onto the masters, or the config's; None where neither is asked for.

    Args:
        given: an instance, a callable from parameters to one, or None.
        asked: what it shall update.
        config: names an optimizer where none is given.
        sharding: has the masters.

    Raises:
        ConfigError: it has taken steps, or would be wrong on ranges of parameters.
    """
    groups = asked.groups(sharding)
    piece_of = {piece.master: piece for piece in sharding.pieces}
    if given is None:
        return None if config.optimizer is None else make_optimizer(config.optimizer, groups, piece_of)
    if isinstance(given, torch.optim.Optimizer):
        made = _moved(given, groups, asked.states, sharding)
    else:
        flat = asked.names is None or not any(isinstance(item, dict) for item in asked.names)
        made = given(groups[0]["params"] if flat else groups)
    stage = config.zero_optimization.stage
    if isinstance(made, Lamb):
        made.piece_of = piece_of
    elif stage > 0 and not elementwise(type(made)) and not config.zero_allow_untested_optimizer:
        raise ConfigError(
            f"optimizer {type(made).__name__}: at ZeRO stage {stage} it sees ranges of parameters, which is right only if it "
            "treats each element by itself; set zero_allow_untested_optimizer to true if it does, else use stage 0"
        )
    return made


def _moved(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    states: dict[str, dict[str, Any]],
    sharding: Sharding,
) -> torch.optim.Optimizer:
    """A client's optimizer over the masters; some, as Adagrad, have state before their first step."""
    if any(_steps(state) > 0 for state in states.values()):
        raise ConfigError(
            "optimizer: it has taken steps already; hand it over fresh and load its state as a checkpoint"
        )
    optimizer.state.clear()
    for piece in sharding.pieces:
        if piece.name in states:
            optimizer.state[piece.master] = {
                key: value if key == "step" else _own(value, piece) for key, value in states[piece.name].items()
            }
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = own["params"]
    return optimizer


def _steps(state: dict[str, Any]) -> float:
    """Steps taken by an optimizer; one whose state says nothing of it makes its state in the first."""
    return float(state.get("step", 1))


def _own(value: Any, piece: Piece) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != piece.shape:
        return value
    master = piece.master
    return own_range(value, piece.start, master).to(master.device, master.dtype).clone()
