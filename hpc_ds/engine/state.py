"""What of a training run must be saved, as ranges of tensors and plain data, and how it comes back.

Optimizer hyperparameters come from the config, so a changed learning rate or weight decay takes effect on resume; only
what a schedule of torch's has moved comes back, because it computes each rate from the one before. Names are those of
``module.named_parameters()`` and ranges are of flattened tensors, so any stage and world size reads the same files.
"""

from __future__ import annotations

import base64
import random
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.checkpoint.shards import Shard, own_share
from hpc_ds.config.known_names import MOVED_BY_SCHEDULES
from hpc_ds.engine.schedule import Schedule
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from hpc_ds.engine.piece import Piece
    from hpc_ds.engine.sharding import Sharding

_MODEL, _OPTIMIZER = "model.", "optimizer."
_ALIKE = {"Adam", "AdamW"}  # optimizers of the same state


def shards_to_save(sharding: Sharding, optimizer: torch.optim.Optimizer | None, *, frozen: bool = True) -> list[Shard]:
    """This rank's ranges of parameters, persistent buffers and optimizer state; what all ranks share is divided."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [
        own_share(shard.name, shard.data.view(shard.shape), rank, world_size) if shared else shard
        for shard, shared in (*_model_shards(sharding, frozen=frozen), *_optimizer_shards(sharding, optimizer))
    ]


def shards_to_load(
    stored: Mapping[str, tuple[int, ...]],
    sharding: Sharding,
    optimizer: torch.optim.Optimizer | None,
    *,
    strict: bool,
) -> list[Shard]:
    """The ranges of this process that a checkpoint fills, in place.

    State that the optimizer does not have yet is made, in the shape that the checkpoint has.

    Args:
        stored: name -> whole shape of what is in it.
        sharding: the module.
        optimizer: None leaves its state alone.
        strict: whether model and checkpoint must have the same names.

    Raises:
        CheckpointError: model and checkpoint differ in names or shapes.
    """
    shards = []
    wanted = [shard for shard, _ in _model_shards(sharding, frozen=True)]
    for shard in wanted:
        name, shape = shard.name.removeprefix(_MODEL), stored.get(shard.name)
        if shape is None and strict:
            raise CheckpointError(f"it has no {name!r}; load_module_strict=False passes it over")
        if shape is not None and shape != shard.shape:
            raise CheckpointError(
                f"{name!r} has shape {shape}, the model {shard.shape}; load it into the model that it was saved from"
            )
        if shape is not None:
            shards.append(shard)
    extra = [name for name in stored if name.startswith(_MODEL) and name not in {shard.name for shard in wanted}]
    if extra and strict:
        raise CheckpointError(
            f"the model has no {extra[0].removeprefix(_MODEL)!r}; load_module_strict=False passes it over"
        )
    if optimizer is not None:
        _make_optimizer_state(stored, sharding, optimizer)
        shards += [shard for shard, _ in _optimizer_shards(sharding, optimizer)]
    return shards


def refuse_other_optimizer(saved: object, optimizer: torch.optim.Optimizer | None) -> None:
    """An optimizer knows what to do with state of its own kind only.

    Args:
        saved: the kind that a checkpoint has the state of; None where nobody knows.
        optimizer: that shall take it up; None: nothing shall be taken up.

    Raises:
        CheckpointError: it is of another kind.
    """
    kind = type(optimizer).__name__
    if optimizer is not None and saved not in {None, kind} and {saved, kind} != _ALIKE:
        raise CheckpointError(
            f"its optimizer state is that of {saved}, and the optimizer is {kind}; use the same, or load_optimizer_states=False"
        )


def _model_shards(sharding: Sharding, *, frozen: bool) -> Iterator[tuple[Shard, bool]]:
    for piece in sharding.pieces:
        yield Shard(_MODEL + piece.name, tuple(piece.shape), piece.start, piece.master.detach().flatten()), piece.shared
    for kept in sharding.kept():
        if frozen or not kept.frozen:
            yield Shard(_MODEL + kept.name, tuple(kept.shape), kept.start, kept.tensor.detach().flatten()), kept.shared


def _optimizer_shards(sharding: Sharding, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[Shard, bool]]:
    for piece in sharding.pieces if optimizer is not None else ():
        for key, value in optimizer.state.get(piece.master, {}).items() if optimizer is not None else ():
            if not isinstance(value, torch.Tensor):
                continue
            name, flat = f"{_OPTIMIZER}{piece.name}.{key}", value.detach().flatten()
            if not piece.shape and not piece.shared:
                # Moments and step counts look alike here: whoever has the parameter has both.
                yield Shard(name, (), 0, flat[: piece.master.numel()]), False
            elif value.shape == piece.master.shape:
                yield Shard(name, tuple(piece.shape), piece.start, flat), piece.shared
            else:
                yield Shard(name, tuple(value.shape), 0, flat), True


def _make_optimizer_state(
    stored: Mapping[str, tuple[int, ...]], sharding: Sharding, optimizer: torch.optim.Optimizer
) -> None:
    keys_of: dict[str, dict[str, tuple[int, ...]]] = {}
    for full_name, shape in stored.items():
        if full_name.startswith(_OPTIMIZER):
            name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(".")
            keys_of.setdefault(name, {})[key] = shape
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for piece in sharding.pieces:
        if piece.master not in group_of:
            continue
        if _is_elsewhere(piece):
            optimizer.state.pop(piece.master, None)  # the optimizer makes it anew, in shapes that only it knows
            continue
        state, keys = optimizer.state[piece.master], keys_of.get(piece.name, {})
        for key in [key for key, value in state.items() if isinstance(value, torch.Tensor) and key not in keys]:
            del state[key]  # of steps that the checkpoint has not seen
        for key, shape in keys.items():
            state[key] = _like(key, shape, piece, state.get(key), group_of[piece.master])


def _is_elsewhere(piece: Piece) -> bool:
    """Whether a 0-dim parameter lies on another rank."""
    return not piece.shape and piece.master.numel() == 0


def _like(key: str, shape: tuple[int, ...], piece: Piece, present: object, group: dict[str, Any]) -> torch.Tensor:
    """A tensor for one piece of optimizer state: a range like its parameter's where it has its shape."""
    wanted = tuple(piece.master.shape) if shape == tuple(piece.shape) else shape
    if isinstance(present, torch.Tensor) and tuple(present.shape) == wanted:
        return present
    if key != "step" and shape == tuple(piece.shape):
        return torch.zeros_like(piece.master, requires_grad=False)
    # Step counters stay on the CPU unless a kernel on the device reads them.
    device = piece.master.device if key != "step" or group.get("fused") or group.get("capturable") else "cpu"
    return torch.zeros(shape, dtype=torch.float32, device=device)


def plain_optimizer_state(sharding: Sharding, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps beside tensors, as a step count that is a number: parameter -> key -> value."""
    if optimizer is None:
        return {}
    found = {
        piece.name: {
            key: value
            for key, value in optimizer.state.get(piece.master, {}).items()
            if not isinstance(value, torch.Tensor) and value is not None
        }
        for piece in sharding.pieces
    }
    return {name: plain for name, plain in found.items() if plain}


def load_plain_optimizer_state(
    sharding: Sharding, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]]
) -> None:
    """Take up ``plain_optimizer_state``."""
    for piece in sharding.pieces:
        if _is_elsewhere(piece):
            continue
        plain, state = states.get(piece.name, {}), optimizer.state[piece.master]
        for key in [key for key, value in state.items() if not isinstance(value, torch.Tensor) and key not in plain]:
            del state[key]  # of steps that the checkpoint has not seen
        state.update(plain)


def schedule_state(lr_scheduler: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """The state of a schedule, and what it has made of the optimizer's groups."""
    if lr_scheduler is None:
        return None
    groups = [] if optimizer is None else optimizer.param_groups
    moved = [{key: group[key] for key in MOVED_BY_SCHEDULES if key in group} for group in groups]
    return {"schedule": lr_scheduler.state_dict(), "moved": moved}


def load_schedule_state(lr_scheduler: Any, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Take up ``schedule_state``; ours know their rates by the index alone."""
    lr_scheduler.load_state_dict(state["schedule"])
    if optimizer is not None and not isinstance(lr_scheduler, Schedule):
        for group, moved in zip(optimizer.param_groups, state["moved"], strict=False):
            group.update(moved)


def tied_names(module: nn.Module) -> dict[str, str]:
    """The names of parameters and buffers beside their first: name -> the first, under which a checkpoint has it."""
    first = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    kept = module.state_dict(keep_vars=True)
    return {name: first[id(value)] for name, value in kept.items() if first.get(id(value), name) != name}


def random_states() -> dict[str, Any]:
    """The random-number states of this rank, as plain types."""
    states: dict[str, Any] = {"torch": _text(torch.get_rng_state()), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Take up ``random_states``; those of a device or library that is not here now are passed over."""
    torch.set_rng_state(_bytes(states["torch"]))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))
    if "numpy" in states and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        kind, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), position, has_gauss, cached))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
