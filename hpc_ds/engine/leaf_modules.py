"""Leaf modules: what ZeRO stage 3 gathers as a whole, and of which ranks may use different parts in a step.

FSDP2 sums the gradients of a block laid one behind the other, so every rank must have the same ones. In a leaf module, say a
mixture of experts, those that this rank does not call get gradients of zero: its output is tied to their parameters. Whether an
expert was used at all, and is to be updated, is known from the calls, and where its weights are used without a call, from
gradients that are not zero.

The mark is an attribute, DeepSpeed's own: scripts and libraries look at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hpc_ds.config.sections import LeafModuleConfig

_MARK = "_z3_leaf"


def is_leaf_module(model: nn.Module) -> bool:
    """Whether a module is marked."""
    return bool(getattr(model, _MARK, False))


def is_of_leaf_module(model: nn.Parameter) -> bool:
    """Whether a parameter is said to belong to a marked module, by whoever says so: marks are on modules."""
    return hasattr(model, "ds_z3_leaf_module")


def get_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules in a module."""
    return [module for module in model.modules() if is_leaf_module(module)]


def set_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark a module before ``initialize``, or take its mark."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(f"leaf module {type(model).__name__}: it is sharded already; mark it before initialize")
    setattr(model, _MARK, flag)


def set_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark the modules of some classes before ``initialize``; returns them.

    Args:
        model: where they are.
        leaf_module_classes: classes, or their names, with their modules before them or without.
        raise_if_not_found: whether it is an error that there are none.

    Raises:
        ConfigError: there are none, or ``initialize`` has been called.
    """
    return _mark_classes(model, list(leaf_module_classes), flag=True, required=raise_if_not_found)


def unset_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the mark of the modules of some classes; see ``set_leaf_modules``."""
    return _mark_classes(model, list(leaf_module_classes), flag=False, required=raise_if_not_found)


def set_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their names in ``named_modules``; returns them, and the names that there are not.

    Raises:
        ConfigError: there is none of some name, or ``initialize`` has been called.
    """
    return _mark_names(model, module_names, lambda name, asked: name == asked, flag, required=raise_if_not_found)


def set_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by the ends of their names; see ``set_leaf_modules_by_name``."""
    return _mark_names(model, module_name_suffixes, str.endswith, flag, required=raise_if_not_found)


def _mark_classes(model: nn.Module, classes: list[Any], *, flag: bool, required: bool) -> list[nn.Module]:
    kinds = tuple(one for one in classes if isinstance(one, type))
    names = {one for one in classes if isinstance(one, str)}
    found = [module for module in model.modules() if isinstance(module, kinds) or names & _names_of(type(module))]
    if not found and required:
        raise ConfigError(
            f"leaf modules {classes!r}: {type(model).__name__} has none of these classes; name one it has"
        )
    for module in found:
        set_leaf_module(module, flag)
    return found


def _names_of(kind: type) -> set[str]:
    return {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}


def _mark_names(
    model: nn.Module, asked: Iterable[str], fits: Callable[[str, str], bool], flag: bool, *, required: bool
) -> tuple[list[nn.Module], list[str]]:
    modules = dict(model.named_modules())
    by_name = {one: [module for name, module in modules.items() if fits(name, one)] for one in asked}
    missing = [one for one, found in by_name.items() if not found]
    if missing and required:
        raise ConfigError(
            f"leaf module {missing[0]!r}: {type(model).__name__} has no module of this name; name one it has"
        )
    marked = list(dict.fromkeys(module for found in by_name.values() for module in found))
    for module in marked:
        set_leaf_module(module, flag)
    return marked, missing


# what stage 3 makes of them


def mark_as_configured(model: nn.Module, config: LeafModuleConfig) -> None:
    """Mark what ``zero_optimization.leaf_module`` names.

    Raises:
        ConfigError: there is no module of a name; classes need not be there, since a config may be for several models.
    """
    set_leaf_modules(model, config.classes, raise_if_not_found=False)
    set_leaf_modules_by_name(model, config.names)
    set_leaf_modules_by_suffix(model, config.name_suffixes)


class LeafModules:
    """The marked modules of a model, those in others left out.

    Attributes:
        modules: they.
        names: of their trainable parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch their calls. Before FSDP2 does: its hooks drop parameters after a forward."""
        marked = get_leaf_modules(model)
        inside = {inner for module in marked for inner in module.modules() if inner is not module}
        self.modules = [module for module in marked if module not in inside]
        name_of = {parameter: name for name, parameter in model.named_parameters()}
        self._names: dict[nn.Module, set[str]] = {}  # of a module's own parameters
        self._called: set[nn.Module] = set()  # in the leaf's forward that is going on
        self._used: set[str] = set()  # in calls of this step
        for leaf in self.modules:
            leaf.register_forward_pre_hook(self._begin)
            leaf.register_forward_hook(self._tie)
            for owner in leaf.modules():
                own = {name_of[each] for each in owner.parameters(recurse=False) if each.requires_grad}
                if own:
                    self._names[owner] = own
                    owner.register_forward_pre_hook(self._note)
        self.names = {name for own in self._names.values() for name in own}

    def outside(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Those of some modules that are not in a leaf."""
        inside = {inner for leaf in self.modules for inner in leaf.modules() if inner is not leaf}
        return [module for module in modules if module not in inside]

    def were_used(self, gradients: dict[str, torch.Tensor]) -> set[str]:
        """Which of some parameters this rank used in the step: called, or with a gradient that is not zero."""
        asked = [name for name in gradients if name not in self._used]
        tells = torch.stack([gradients[name].any() for name in asked]).tolist() if asked else []
        return {*(self._used & gradients.keys()), *(name for name, tell in zip(asked, tells, strict=True) if tell)}

    def forget(self) -> None:
        """A step has ended."""
        self._used.clear()

    def _begin(self, leaf: nn.Module, _: Any) -> None:
        self._called.difference_update(leaf.modules())
        self._note(leaf, None)

    def _note(self, owner: nn.Module, _: Any) -> None:
        self._called.add(owner)
        if torch.is_grad_enabled():
            self._used |= self._names.get(owner, set())

    def _tie(self, leaf: nn.Module, _: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        idle = [
            parameter
            for owner in leaf.modules()
            if owner not in self._called
            for parameter in owner.parameters(recurse=False)
            if parameter.requires_grad
        ]
        values, form = tree_flatten(output)
        places = [at for at, each in enumerate(values) if isinstance(each, torch.Tensor) and each.is_floating_point()]
        if not idle or not places:
            return output
        tied = _Tied.apply(len(places), *(values[place] for place in places), *idle)  # type: ignore[no-untyped-call] # torch's stubs
        for place, value in zip(places, tied, strict=True):
            values[place] = value
        return tree_unflatten(values, form)


class _Tied(torch.autograd.Function):
    """Passes on some tensors, and gives gradients of zero to others."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.idle = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors[count:]]
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.idle)
        return (None, *gradients, *zeros)
