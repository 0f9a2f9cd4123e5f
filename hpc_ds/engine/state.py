"""What of a training run must be saved, as tensors by name and plain data, and how it comes back.

Optimizer hyperparameters come from the config, so a changed learning rate or weight decay takes effect on resume; only
what a schedule of torch's has moved comes back, because it computes each rate from the one before. Names are those of
``module.named_parameters()``, so any stage and world size reads the same files.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from hpc_ds.checkpoint.agree import own_rank, world_size
from hpc_ds.checkpoint.shards import DTYPES, Shard, own_share
from hpc_ds.engine.schedule import Schedule
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from hpc_ds.checkpoint.stored import Stored, StoredTensor

_MODEL, _OPTIMIZER = "model.", "optimizer."
_MOVED_BY_SCHEDULES = ("lr", "momentum", "betas")


def shards_to_save(module: nn.Module, optimizer: torch.optim.Optimizer | None, *, frozen: bool = True) -> list[Shard]:
    """What this rank writes of parameters, persistent buffers and the optimizer's tensors.

    A tensor that several ranks hold is split among them.
    """
    tensors = {_MODEL + name: tensor for name, tensor in _model_tensors(module, frozen=frozen).items()}
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{_OPTIMIZER}{name}.{key}"] = value
    return [_to_write(name, tensor) for name, tensor in tensors.items()]


def shards_to_load(
    stored: Stored, module: nn.Module, optimizer: torch.optim.Optimizer | None, *, strict: bool
) -> list[Shard]:
    """The ranges that this rank holds, to be filled in place from a checkpoint.

    State that the optimizer does not have yet is made, in the shape that the checkpoint has.

    Raises:
        CheckpointError: model and checkpoint differ in names or shapes.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _model_tensors(module).items():
        entry = stored.tensors.get(_MODEL + name)
        if entry is None:
            if strict:
                raise CheckpointError(f"it has no {name!r}; load_module_strict=False passes it over")
        elif entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name!r} has shape {entry.shape}, the model {tuple(tensor.shape)}; load it into the model that it was "
                "saved from"
            )
        else:
            tensors[_MODEL + name] = tensor
    _refuse_extra(stored, tensors, strict=strict)
    if optimizer is not None:
        tensors |= _optimizer_tensors(stored.tensors, module, optimizer)
    return [_held(name, tensor) for name, tensor in tensors.items()]


def _held(name: str, tensor: torch.Tensor) -> Shard:
    """The range of a tensor that this rank holds; memory is shared with it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Shard(name, tuple(tensor.shape), 0, tensor.view(-1))
    rows, start = tensor.shape[0], 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            # FSDP2 cuts as torch.chunk does: all parts but the last ones have the same size.
            start = min(rows, tensor.device_mesh.get_local_rank(dim) * -(-rows // tensor.device_mesh.size(dim)))
    row = tensor[:0].numel() if rows == 0 else tensor.numel() // rows
    return Shard(name, tuple(tensor.shape), start * row, tensor.to_local().view(-1))


def _to_write(name: str, tensor: torch.Tensor) -> Shard:
    """The range of a tensor that this rank writes."""
    held = _held(name, tensor)
    if held.data.numel() < tensor.numel() or not held.data.numel():
        return held
    return own_share(name, held.data.view(tensor.shape), own_rank(), world_size())


def plain_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps beside tensors, as a step count that is a number: parameter -> key -> value."""
    if optimizer is None:
        return {}
    found = {
        name: {key: value for key, value in optimizer.state[parameter].items() if not isinstance(value, torch.Tensor)}
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
    }
    return {name: plain for name, plain in found.items() if plain}


def load_plain_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]]
) -> None:
    """Take up ``plain_optimizer_state``."""
    parameters = dict(module.named_parameters())
    for name, plain in states.items():
        if name in parameters:
            optimizer.state[parameters[name]].update(plain)


def schedule_state(lr_scheduler: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """The state of a schedule, and what it has made of the optimizer's groups."""
    if lr_scheduler is None:
        return None
    groups = [] if optimizer is None else optimizer.param_groups
    moved = [{key: group[key] for key in _MOVED_BY_SCHEDULES if key in group} for group in groups]
    return {"schedule": lr_scheduler.state_dict(), "moved": moved}


def load_schedule_state(lr_scheduler: Any, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Take up ``schedule_state``; ours know their rates by the index alone."""
    lr_scheduler.load_state_dict(state["schedule"])
    if optimizer is not None and not isinstance(lr_scheduler, Schedule):
        for group, moved in zip(optimizer.param_groups, state["moved"], strict=False):
            group.update(moved)


def random_states() -> dict[str, Any]:
    """The random-number states of this rank, as plain types and tensors."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [kind, torch.tensor(keys.astype("int64")), position, has_gauss, cached]
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Take up ``random_states``; those of a device or library that is not here now are passed over."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states and "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = states["numpy"]
        sys.modules["numpy"].random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))


def _model_tensors(module: nn.Module, *, frozen: bool = True) -> dict[str, torch.Tensor]:
    parameters = {name: value for name, value in module.named_parameters() if frozen or value.requires_grad}
    kept = module.state_dict(keep_vars=True)  # leaves out non-persistent buffers
    buffers = {name: value for name, value in module.named_buffers() if name in kept}
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}


def _refuse_extra(stored: Stored, tensors: dict[str, torch.Tensor], *, strict: bool) -> None:
    extra = [name.removeprefix(_MODEL) for name in stored.tensors if name.startswith(_MODEL) and name not in tensors]
    if extra and strict:
        raise CheckpointError(f"the model has no {extra[0]!r}; load_module_strict=False passes it over")


def _optimizer_tensors(
    stored: dict[str, StoredTensor], module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    keys_of: dict[str, list[str]] = {}
    for full_name in stored:
        if full_name.startswith(_OPTIMIZER):
            name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(".")
            keys_of.setdefault(name, []).append(key)
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name, state = names[parameter], optimizer.state[parameter]
            keys = keys_of.get(name, [])
            for key in set(state) - set(keys):
                del state[key]  # of steps that the checkpoint has not seen
            for key in keys:
                full_name = f"{_OPTIMIZER}{name}.{key}"
                state[key] = tensors[full_name] = _like(stored[full_name], parameter, state.get(key), group)
    return tensors


def _like(entry: StoredTensor, parameter: nn.Parameter, present: object, group: dict[str, Any]) -> torch.Tensor:
    """A tensor for one piece of optimizer state: sharded like its parameter where it has its shape."""
    if isinstance(present, torch.Tensor) and tuple(present.shape) == entry.shape:
        return present
    if entry.shape == tuple(parameter.shape) and parameter.dim() > 0:
        return torch.zeros_like(parameter, dtype=DTYPES[entry.dtype], requires_grad=False)
    # Step counters stay on the CPU unless a kernel on the device reads them.
    device = parameter.device if group.get("fused") or group.get("capturable") or parameter.dim() == 0 else "cpu"
    return torch.zeros(entry.shape, dtype=DTYPES[entry.dtype], device=device)
