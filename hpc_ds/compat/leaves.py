"""``deepspeed.utils.z3_leaf_module``: modules that stage 3 gathers as a whole, marked before ``initialize``.

The mark is an attribute, DeepSpeed's own: scripts and libraries look at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

_MARK = "_z3_leaf"


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether a module is marked."""
    return bool(getattr(model, _MARK, False))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether a parameter is said to belong to a marked module."""
    return hasattr(model, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules in a module."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark a module, or take its mark."""
    setattr(model, _MARK, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark the modules of some classes; returns them.

    Args:
        model: where they are.
        leaf_module_classes: classes, or their names, with their modules before them or without.
        raise_if_not_found: whether it is an error that there are none.

    Raises:
        ConfigError: there are none.
    """
    return _mark_classes(model, list(leaf_module_classes), flag=True, required=raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the mark of the modules of some classes; see ``set_z3_leaf_modules``."""
    return _mark_classes(model, list(leaf_module_classes), flag=False, required=raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their names in ``named_modules``; returns them, and the names that there are not.

    Raises:
        ConfigError: there is none of some name.
    """
    return _mark_names(model, module_names, lambda name, asked: name == asked, flag, required=raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by the ends of their names; see ``set_z3_leaf_modules_by_name``."""
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
        set_z3_leaf_module(module, flag)
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
        set_z3_leaf_module(module, flag)
    return marked, missing
