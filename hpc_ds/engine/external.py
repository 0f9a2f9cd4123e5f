"""Parameters that a module uses though they are another module's: they have to be whole then at ZeRO stage 3 too.

Whatever is in no block belongs to the root, and is whole from the beginning of a forward to its end. So what owns such a
parameter is no block of its own, unless the whole use is inside of the block.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_users: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Parameter -> WeakSet of the modules that use it


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say, before ``initialize``, that a module's forward uses a parameter that is not its own.

    Below ZeRO stage 3, where parameters are always whole, it changes nothing.

    Raises:
        ConfigError: it is no parameter, or is sharded by an engine already.
    """
    _refuse_sharded("register_external_parameter", module, parameter)
    if parameter not in _users:
        _users[parameter] = weakref.WeakSet()
    _users[parameter].add(module)


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Take back what ``register_external_parameter`` said.

    Raises:
        ConfigError: it was not said, or see there.
    """
    _refuse_sharded("unregister_external_parameter", module, parameter)
    if module not in _users.get(parameter, ()):
        raise ConfigError(
            f"unregister_external_parameter: the parameter is not registered with this {type(module).__name__}; call it with "
            "what register_external_parameter was called with"
        )
    _users[parameter].discard(module)


def _refuse_sharded(who: str, module: object, parameter: object) -> None:
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise ConfigError(
            f"{who}: a {type(module).__name__} and a {type(parameter).__name__}; pass a module and a parameter"
        )
    if isinstance(parameter, DTensor):
        raise ConfigError(f"{who}: an engine has sharded the parameter already; call it before initialize")


def blocks_without_external(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of some blocks that may be gathered by themselves."""
    return [block for block in blocks if not _is_used_outside(block)]


def _is_used_outside(block: nn.Module) -> bool:
    inside = set(block.modules())
    return any(user not in inside for parameter in block.parameters() for user in _users.get(parameter, ()))
