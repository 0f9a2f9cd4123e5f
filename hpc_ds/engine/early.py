"""Parameters that are sharded before there is an engine: what ``zero.Init`` leaves of them, and how they become whole again.

Such a parameter has no elements. Its values are cut into equal ranges of the flattened whole, one for each rank, the last filled
up with zeros. A script sees what DeepSpeed shows: ``ds_id``, ``ds_shape``, ``ds_numel``, ``ds_status`` and ``ds_tensor``, which is
this rank's range. They are gone once an engine has the parameter.
"""

from __future__ import annotations

import enum
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn
    from torch.utils.hooks import RemovableHandle


class ZeroParamStatus(enum.Enum):
    """Whether a parameter has its elements, as ``parameter.ds_status`` says."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


@dataclass(eq=False, slots=True)
class _Cut:
    """What is left of a parameter.

    Attributes:
        number: the same on every rank, in the order in which parameters were cut.
        shape: of the whole.
        part: 1-D, this rank's range, as long as every other rank's.
        device: where the whole is put.
        gathered: how many contexts want it whole at the moment; it is written to, by us as by a script, only meanwhile.
        written: one of them has written to it.
    """

    number: int
    shape: torch.Size
    part: torch.Tensor
    device: torch.device
    gathered: int = 0
    written: bool = False


_ATTRIBUTES = ("ds_id", "ds_shape", "ds_numel", "ds_status", "ds_tensor", "ds_persist")
_cuts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Parameter -> _Cut
_guards: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()
_numbers = itertools.count()


def current_device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_cut(parameter: object) -> bool:
    """Whether it was sharded early, and no engine has it yet."""
    return isinstance(parameter, torch.Tensor) and parameter in _cuts


def cut(owner: nn.Module, place: torch.device | None) -> None:
    """Collective. Shard a module's own parameters, from rank 0's values.

    Args:
        owner: its submodules are left alone, and so is what has no values yet: a parameter on the meta device, or a lazy one.
        place: where the parts are kept; default: where this rank computes.
    """
    own = [parameter for parameter in owner._parameters.values() if parameter is not None]  # noqa: SLF001 - with repeats
    for parameter in own:
        if type(parameter.data) is torch.Tensor and not parameter.is_meta and not is_cut(parameter):
            _cut(parameter, place)
    if any(map(is_cut, own)) and owner not in _guards:
        _guards[owner] = owner.register_forward_pre_hook(_refuse_unready)


def _cut(parameter: nn.Parameter, place: torch.device | None) -> None:
    device = current_device()
    whole = parameter.data.to(device).contiguous()
    _send(whole, 0)
    shape, length = whole.shape, -(-whole.numel() // dist.get_world_size())
    part = torch.zeros(length, dtype=whole.dtype, device=place or device)
    made = _cuts[parameter] = _Cut(next(_numbers), shape, part, device, gathered=1)
    _keep(made, whole)
    parameter.ds_id = made.number  # type: ignore[attr-defined] # as all of these
    parameter.ds_shape, parameter.ds_numel = shape, whole.numel()  # type: ignore[attr-defined]
    parameter.ds_tensor, parameter.ds_persist = part, False  # type: ignore[attr-defined]
    _let_go(parameter, made)


def _send(whole: torch.Tensor, source: int) -> None:
    if dist.get_world_size() > 1 and whole.numel():
        dist.broadcast(whole.view(-1).view(torch.uint8), src=source)  # bytes: of any type, by any backend


def _keep(made: _Cut, whole: torch.Tensor) -> None:
    """Copy this rank's range out of the whole."""
    start = min(dist.get_rank() * made.part.numel(), whole.numel())
    own = whole.flatten().narrow(0, start, min(made.part.numel(), whole.numel() - start))
    made.part.narrow(0, 0, own.numel()).copy_(own)


def _let_go(parameter: nn.Parameter, made: _Cut) -> None:
    if made.gathered == 1:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=made.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
        made.written = False
    made.gathered -= 1  # only now: a write to one that nobody has gathered would be a script's


def _want(parameter: nn.Parameter, made: _Cut) -> None:
    """Collective. Give a parameter its elements, in the type that it has now."""
    made.gathered += 1
    if made.gathered > 1:
        return
    part, world_size = made.part.to(made.device), dist.get_world_size()
    parts = torch.empty(world_size * part.numel(), dtype=part.dtype, device=part.device)
    if part.numel():
        dist.all_gather(list(parts.view(torch.uint8).chunk(world_size)), part.view(torch.uint8))
    whole = parts.narrow(0, 0, made.shape.numel()).view(made.shape)
    # A view would keep what is filled up alive.
    parameter.data = whole.to(parameter.dtype) if len(parts) == whole.numel() else whole.to(parameter.dtype, copy=True)
    parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], writer: int | None) -> Iterator[None]:
    """Collective. Parameters that are cut have their elements inside; others are passed over.

    Args:
        parameters: in any order, the same on every rank.
        writer: what this rank writes to them is everybody's afterwards; None: what is written is lost.
    """
    asked = {id(parameter): parameter for parameter in parameters if is_cut(parameter)}
    found = sorted(((parameter, _cuts[parameter]) for parameter in asked.values()), key=lambda each: each[1].number)
    for parameter, made in found:
        _want(parameter, made)
    try:
        yield
        for parameter, made in found:
            if is_cut(parameter):  # no engine has taken it meanwhile
                _take_up(parameter, made, writer)
    finally:
        for parameter, made in found:
            if is_cut(parameter):
                _let_go(parameter, made)


def _take_up(parameter: nn.Parameter, made: _Cut, writer: int | None) -> None:
    """Collective where there is a writer. Keep what was written, once nobody writes to it any more."""
    if writer is not None:
        if parameter.shape != made.shape:
            raise ConfigError(
                f"parameter of shape {tuple(made.shape)}: its data was replaced by one of shape {tuple(parameter.shape)} inside "
                "of GatheredParameters; write its values with copy_()"
            )
        whole = parameter.data.to(made.device).contiguous()
        _send(whole, writer)
        parameter.data, made.written = whole, True
    if made.written and made.gathered == 1:
        _keep(made, parameter.data)


def restore(module: nn.Module) -> set[nn.Parameter]:
    """Collective. Make parameters of a module and all in it ordinary again, with all their elements; returns those."""
    restored = set()
    for owner in module.modules():
        for parameter in owner._parameters.values():  # noqa: SLF001 - as above
            if parameter is not None and is_cut(parameter):
                _want(parameter, _cuts[parameter])
                del _cuts[parameter]
                for name in _ATTRIBUTES:
                    delattr(parameter, name)
                restored.add(parameter)
        if owner in _guards:
            _guards.pop(owner).remove()
        elif _refuse_unready in owner._forward_pre_hooks.values():  # noqa: SLF001 - there is no public way
            _refuse_empty_copy(owner)
    return restored


def _refuse_empty_copy(owner: nn.Module) -> None:
    """A copy of a module keeps its guard, and nothing else of what we know of it."""
    if any(parameter.shape == (0,) and not is_cut(parameter) for parameter in owner.parameters(recurse=False)):
        raise ConfigError(
            f"model: it has a copy of a {type(owner).__name__} that was sharded by zero.Init, with nothing in it; copy it "
            "inside of `with hpc_ds.zero.GatheredParameters(parameters):`"
        )


def lacks_elements(tensor: object) -> bool:
    """Whether it is a parameter that is cut, and that nobody has gathered at the moment."""
    return is_cut(tensor) and not _cuts[tensor].gathered


def _refuse_unready(module: nn.Module, _: object) -> None:
    if module not in _guards:
        _refuse_empty_copy(module)
    for name, parameter in module.named_parameters(recurse=False):
        if lacks_elements(parameter):
            raise ConfigError(
                f"parameter {name!r} of a {type(module).__name__}: it was sharded by zero.Init, and this rank has a part of it; "
                "pass the model to initialize and call the engine, or gather it with "
                "`with hpc_ds.zero.GatheredParameters(parameters):`"
            )
