"""Modules made on the meta device, where tensors have shapes and no values, become real piece by piece.

A value comes from where the module's author put it: ``reset_parameters`` of each module, as in torch, and ``_init_weights`` of
the model around it, as in transformers. Modules are filled in the order in which they stand in the model, so one seed gives
the values that it gives on the CPU, wherever modules draw theirs in ``reset_parameters``. What neither fills is an error, not
whatever was in memory.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def refuse_what_cannot_be_made(model: nn.Module) -> None:
    """Look before anything is changed.

    Raises:
        ConfigError: a module on the meta device has no way to give values to its own tensors.
    """
    for name, module, initialize in _with_initializers(model):
        if _on_meta(module) and not hasattr(module, "reset_parameters") and initialize is None:
            raise ConfigError(
                f"model: module {name or type(module).__name__!r} is on the meta device and has no reset_parameters; write one "
                "that fills its parameters and buffers, or make the module on the CPU"
            )


class Deferred:
    """A model of which parts may be on the meta device."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._modules = list(_with_initializers(model))
        uses = Counter(value for owner in model.modules() for value in owner._parameters.values())  # noqa: SLF001 - with repeats
        # What is tied stays so whenever its other places are made real. The rest must not be kept: shards replace it.
        self._made: dict[nn.Parameter, nn.Parameter | None] = {
            value: None for value, count in uses.items() if value is not None and value.is_meta and count > 1
        }

    def make_real(self, module: nn.Module | None = None, *, until: nn.Module | None = None) -> None:
        """Give storage and values to what is still on the meta device.

        Args:
            module: inside of it; default: everywhere.
            until: only before this module, in the order of the model.

        Raises:
            ConfigError: something was not filled.
        """
        inside = None if module is None else set(module.modules())
        for name, owner, initialize in self._modules:
            if owner is until:
                break
            if (inside is None or owner in inside) and _on_meta(owner):
                self._fill(name, owner, initialize)

    def _fill(self, name: str, owner: nn.Module, initialize: Callable[[nn.Module], None] | None) -> None:
        filled = self._make_parameters(owner)
        for key, buffer in owner._buffers.items():  # noqa: SLF001 - as above
            if buffer is not None and buffer.is_meta:
                owner._buffers[key] = _marked(buffer, self._device)  # noqa: SLF001 - to replace them in place
        with torch.no_grad():
            reset = getattr(owner, "reset_parameters", None)
            if reset is not None:
                reset()
            if initialize is not None:
                initialize(owner)
            for parameter, value in filled.items():
                parameter.copy_(value)
        _refuse_unfilled(name, owner)

    def _make_parameters(self, owner: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        """Give storage to a module's own parameters; returns the tied ones that another has filled, with their values."""
        filled = {}
        for key, parameter in owner._parameters.items():  # noqa: SLF001 - to replace them in place
            if parameter is None or not parameter.is_meta:
                continue
            made = self._made.get(parameter)
            if made is not None:
                filled[made] = made.detach().clone()
            else:
                made = nn.Parameter(_marked(parameter, self._device), requires_grad=parameter.requires_grad)
            if parameter in self._made:
                self._made[parameter] = made
            owner._parameters[key] = made  # noqa: SLF001 - as above
        return filled


def _with_initializers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module with its name and the ``_init_weights`` of the innermost model around it that has one."""
    initializers: dict[nn.Module, Any] = {}
    for name, module in model.named_modules():
        initializers[module] = getattr(module, "_init_weights", initializers.get(module))
        for child in module.children():
            initializers.setdefault(child, initializers[module])
        yield name, module, initializers[module]


def _marked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor like another, with values that nobody would fill in, where its type has such."""
    mark = _mark(tensor.dtype)
    empty = torch.empty_like(tensor, device=device)
    return empty if mark is None else empty.fill_(mark)


def _mark(dtype: torch.dtype) -> float | None:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return torch.iinfo(dtype).min if dtype in {torch.int16, torch.int32, torch.int64} else None


def _refuse_unfilled(name: str, owner: nn.Module) -> None:
    named = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    for key, tensor in named:
        mark = _mark(tensor.dtype)
        if mark is None or not tensor.numel():
            continue
        unfilled = tensor.isnan() if mark != mark else tensor == mark  # noqa: PLR0124 - NaN
        if bool(unfilled.any()):
            raise ConfigError(
                f"model: {key!r} of module {name or type(owner).__name__!r} is on the meta device, and neither its "
                "reset_parameters nor the model's _init_weights gives it values; write one that does, or make the module on the "
                "CPU"
            )


def _on_meta(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_meta for tensor in own)
