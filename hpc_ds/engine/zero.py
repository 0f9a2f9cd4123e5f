"""Whole parameters, gradients and optimizer state of an engine, whatever its ZeRO stage: DeepSpeed's ``safe_*`` functions.

``hpc_ds.zero`` for scripts. Whoever asks holds a parameter of the module (``engine.module.parameters()``). What is asked
for a whole is collective: every rank asks, and for the same.

Source: https://deepspeed.readthedocs.io/en/latest/zero3.html, "Debugging" and "Modifying partitioned states"
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from hpc_ds.engine.early import gathered, is_cut
from hpc_ds.engine.external import register_external_parameter
from hpc_ds.engine.piece import own_range
from hpc_ds.engine.sharding import gather_flat
from hpc_ds.errors import ConfigError
from hpc_ds.runtime.roll_call import roll_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hpc_ds.engine.engine import Engine
    from hpc_ds.engine.piece import Piece

# Parameter -> its engine, weakly: engines keep their parameters alive, and must not be kept by them; and index of its piece.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register(engine: Engine) -> None:
    """Remember which engine has which parameters. For ``initialize``."""
    trained = {piece.name: index for index, piece in enumerate(engine.sharding.pieces)}
    for name, parameter in engine.module.named_parameters():
        _owners[parameter] = weakref.ref(engine), trained.get(name)


def forget(module: nn.Module) -> None:
    """No engine has the module's parameters any more."""
    for parameter in module.parameters():
        _owners.pop(parameter, None)


def is_owned(parameter: nn.Parameter) -> bool:
    """Whether an engine has it."""
    return parameter in _owners


def refuse_owned(model: nn.Module) -> None:
    """An engine changes its module in place, so there is one at a time for each module, and at stage 3 ever.

    Raises:
        ConfigError: an engine has some of its parameters.
    """
    for name, parameter in model.named_parameters():
        if parameter in _owners:
            raise ConfigError(
                f"model: parameter {name!r} belongs to an engine already; call engine.destroy() first, or at ZeRO stage 3 make "
                "another module, for example with copy.deepcopy() before the first initialize"
            )


def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """Collective. The whole master of a parameter, fp32; None where it is not trained."""
    engine, piece = _owner(param)
    if piece is None:
        return None
    roll_call("safe_get_full_fp32_param")
    engine.sharding.adopt()
    return gather_flat(piece, piece.master)


def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """Collective. The whole gradient, fp32, mean over ranks, unscaled; between the last ``backward`` of a step and ``step``.

    None at other times, and for a parameter that was not used.
    """
    engine, piece = _owner(param)
    if piece is None or not engine.is_gradient_accumulation_boundary():
        return None
    roll_call("safe_get_full_grad")
    whole = gather_flat(piece, _gradient(engine, piece))
    return None if whole is None else whole / engine.gradient_scale


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """Collective. A whole piece of optimizer state, as ``exp_avg``; None where there is none."""
    engine, piece = _owner(param)
    if piece is None:
        return None
    roll_call("safe_get_full_optimizer_state")
    state = _state(engine, piece, optim_state_key)
    if not any(_told(engine, [state is not None])):
        return None
    # After a load, only the rank that has a 0-dim parameter has its state: the others add nothing to it.
    return gather_flat(piece, piece.master if state is None else state)


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Collective. Write the whole master; every rank gives the same value."""
    engine, piece = _owner(param)
    if piece is not None:
        roll_call("safe_set_full_fp32_param")
        engine.sharding.adopt()
        _write(piece, piece.master, value)
        engine.sharding.publish()


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Collective. Write the whole gradient, unscaled; between the last ``backward`` of a step and ``step``."""
    engine, piece = _owner(param)
    if piece is None or not engine.is_gradient_accumulation_boundary():
        return
    roll_call("safe_set_full_grad")
    gradient = _gradient(engine, piece)
    if gradient is not None:
        _write(piece, gradient, value * engine.gradient_scale)


def safe_set_full_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Write a whole piece of optimizer state; every rank gives the same value."""
    engine, piece = _owner(param)
    state = _state(engine, piece, optim_state_key)
    if state is not None and piece is not None:
        _write(piece, state, value)


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's range of a master, 1-D fp32."""
    _, piece = _owner(param)
    return None if piece is None else piece.master.detach().flatten().clone()


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """Collective. This rank's range of a gradient, 1-D fp32, unscaled; see ``safe_get_full_grad``."""
    engine, piece = _owner(param)
    if piece is None or not engine.is_gradient_accumulation_boundary():
        return None
    roll_call("safe_get_local_grad")
    gradient = _gradient(engine, piece)
    return None if gradient is None else gradient.flatten() / engine.gradient_scale


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's range of a piece of optimizer state, 1-D."""
    state = _state(*_owner(param), optim_state_key)
    return None if state is None else state.detach().flatten().clone()


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Collective. Write this rank's range of a master."""
    engine, piece = _owner(param)
    if piece is not None:
        roll_call("safe_set_local_fp32_param")
        engine.sharding.adopt()
        _write_range(piece, piece.master, value)
        engine.sharding.publish()


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Collective. Write this rank's range of a gradient, unscaled; see ``safe_set_full_grad``."""
    engine, piece = _owner(param)
    if piece is None or not engine.is_gradient_accumulation_boundary():
        return
    roll_call("safe_set_local_grad")
    gradient = _gradient(engine, piece)
    if gradient is not None:
        _write_range(piece, gradient, value * engine.gradient_scale)


def safe_set_local_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Write this rank's range of a piece of optimizer state."""
    engine, piece = _owner(param)
    state = _state(engine, piece, optim_state_key)
    if state is not None and piece is not None:
        _write_range(piece, state, value)


@contextmanager
def GatheredParameters(  # noqa: N802 - DeepSpeed's name
    params: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Parameters are whole inside. Collective.

    At stage 3 the module has the whole ones meanwhile (``module.weight``), and torch's functions get them instead of those that a
    script holds (``parameter.data``). Before ``initialize`` the parameters themselves are whole; after an error inside, nothing
    of what was written is kept of those.

    Args:
        params: parameters of engines, or sharded by ``zero.Init``; others are passed over.
        modifier_rank: what this rank writes to them is everybody's afterwards; None: they are only read, and what is written at
            stage 3, or before ``initialize``, is lost.
        fwd_module: its forward uses those that ``zero.Init`` sharded, see ``register_external_parameter``.
        enabled: False does nothing.
    """
    asked = [params] if isinstance(params, torch.Tensor) else list(params)
    early = [cast("nn.Parameter", param) for param in asked if is_cut(param)]
    mine = [cast("nn.Parameter", param) for param in asked if param in _owners]
    if not enabled or not (early or mine):
        yield
        return
    for parameter in early if fwd_module is not None else ():
        register_external_parameter(cast("nn.Module", fwd_module), parameter)
    roll_call("GatheredParameters")
    with gathered(early, modifier_rank), _gathered_by_engine(mine, modifier_rank):
        yield


@contextmanager
def _gathered_by_engine(parameters: list[nn.Parameter], writer: int | None) -> Iterator[None]:
    engines = list(dict.fromkeys(_owner(parameter)[0] for parameter in parameters))
    with ExitStack() as stack:
        for engine in engines:
            own = [parameter for parameter in parameters if _owner(parameter)[0] is engine]
            stack.enter_context(engine.sharding.gathered(own, writer))
        yield
    for engine in engines if writer is not None else ():
        engine.sharding.publish()


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """Collective. Parameters are whole inside, and stay so: each rank may call the model as often as it likes, or not at all.

    Args:
        model: an engine or its module; given back as it is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter in _owners]
    if not parameters:
        with GatheredParameters(model.parameters()):
            yield model
        return
    roll_call("unwrap_model_for_generation")
    with _owner(parameters[0])[0].sharding.whole():
        yield model


def _owner(param: nn.Parameter) -> tuple[Engine, Piece | None]:
    reference, index = cast("tuple[Callable[[], Engine | None], int | None]", _owners.get(param, (lambda: None, None)))
    engine = reference()
    if engine is None:
        raise ConfigError(
            "parameter: it belongs to no engine; pass one of engine.module.parameters(), outside of GatheredParameters, and "
            "keep the engine"
        )
    return engine, None if index is None else engine.sharding.pieces[index]


def _gradient(engine: Engine, piece: Piece) -> torch.Tensor | None:
    """Collective. This rank's part of a gradient; None where no rank used the parameter, the same on every rank."""
    sharding = engine.sharding
    sharding.complete_gradients()
    users = _told(engine, sharding.used())
    sharding.refuse_different_use(users)
    used = users[sharding.pieces.index(piece)] > 0
    return sharding.gradient(piece) if used else None


def _told(engine: Engine, here: Sequence[bool]) -> list[int]:
    """Collective. How many ranks say yes, for each of some questions."""
    counts = torch.tensor(here, dtype=torch.int64, device=engine.device)
    dist.all_reduce(counts)
    return [int(count) for count in counts.tolist()]


def _state(engine: Engine, piece: Piece | None, key: str) -> torch.Tensor | None:
    if piece is None or engine.optimizer is None:
        return None
    state = engine.optimizer.state.get(piece.master, {}).get(key)
    # The step of a 0-dim parameter has its shape, and only where that parameter is.
    ranged = isinstance(state, torch.Tensor) and state.shape == piece.master.shape and key != "step"
    return state if ranged else None


def _write(piece: Piece, own: torch.Tensor, value: torch.Tensor) -> None:
    if value.shape != piece.shape:
        raise ConfigError(
            f"value of shape {tuple(value.shape)}: {piece.name!r} has shape {tuple(piece.shape)}; give the whole value"
        )
    with torch.no_grad():
        own.copy_(own_range(value, piece.start, own))


def _write_range(piece: Piece, own: torch.Tensor, value: torch.Tensor) -> None:
    if value.numel() != own.numel():
        raise ConfigError(
            f"value of {value.numel()} elements: this rank has {own.numel()} of {piece.name!r}; give as many as the getter"
        )
    with torch.no_grad():
        own.copy_(value.reshape(own.shape))
