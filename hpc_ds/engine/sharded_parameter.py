"""What a script holds of a parameter at ZeRO stage 3: a shard, and inside of ``GatheredParameters`` the whole.

Scripts ask for parameters first and gather them then: ``for p in model.parameters(): with GatheredParameters(p): use(p.data)``.
FSDP2 puts whole parameters into the modules, beside those that the script holds. So these get a class whose functions are given
the whole instead of it, as long as there is one, and which shows what DeepSpeed's do. In forward and backward only the
whole ones take part.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from hpc_ds.engine.early import ZeroParamStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

_wholes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # ShardedParameter -> the whole one, while there is one


class ShardedParameter(DTensor):
    """A parameter of an engine at stage 3."""

    ds_persist = False

    @property
    def ds_id(self) -> int:
        """Another number for each parameter."""
        return id(self)

    @property
    def ds_shape(self) -> torch.Size:
        """Of the whole."""
        return self.shape

    @property
    def ds_numel(self) -> int:
        """Elements of the whole."""
        return self.ds_shape.numel()

    @property
    def ds_status(self) -> ZeroParamStatus:
        """Whether it is whole at the moment."""
        return ZeroParamStatus.AVAILABLE if _whole_of(self) is not self else ZeroParamStatus.NOT_AVAILABLE

    @property
    def ds_tensor(self) -> torch.Tensor:
        """1-D, this rank's part."""
        return self._local_tensor.detach().flatten()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give a function of torch what it is asked of, or the whole of that."""
        kwargs = kwargs or {}
        if len(_wholes):
            args, kwargs = tree_map_only(ShardedParameter, _whole_of, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's documents say
            return function(*args, **kwargs)


def _whole_of(parameter: ShardedParameter) -> torch.Tensor:
    """The whole, unless a forward inside of the context has dropped it."""
    whole: torch.Tensor = _wholes.get(parameter, parameter)
    return whole if whole is parameter or whole.untyped_storage().nbytes() else parameter


def be_shown(parameter: nn.Parameter) -> None:
    """Let a parameter that FSDP2 has made be a ``ShardedParameter``."""
    parameter.__class__ = ShardedParameter  # type: ignore[assignment] # torch lets a DTensor pass for a Parameter


@contextmanager
def shown_whole(wholes: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Inside, functions of torch get the whole of some parameters."""
    shown = [parameter for parameter in wholes if parameter not in _wholes]  # not by a context around this one
    _wholes.update({parameter: wholes[parameter] for parameter in shown})
    try:
        yield
    finally:
        for parameter in shown:
            _wholes.pop(parameter)


@contextmanager
def left_whole(modules: Iterable[Any]) -> Iterator[None]:
    """Inside, ``state_dict`` and ``load_state_dict`` of sharded modules meet whole parameters: FSDP2 would drop them before.

    ``with GatheredParameters(model.parameters()): torch.save(model.state_dict(), f)`` is how scripts save whole weights.
    """
    found = [pair for module in modules for pair in _hooks_of_state_dicts(module)]
    # Those that are not put aside by a context around this one.
    put_aside = [(hooks, key, hooks.pop(key)) for hooks, key in found if key in hooks]
    try:
        yield
    finally:
        for hooks, key, hook in put_aside:
            hooks[key] = hook


def _hooks_of_state_dicts(module: Any) -> Iterator[tuple[dict[int, Any], int]]:
    """FSDP2's hooks: among which they are, and by which key. There is no public way to them."""
    group = module._get_fsdp_state()._fsdp_param_group  # noqa: SLF001 - as above
    if group is None:
        return
    for layer, handle in group._module_to_pre_save_state_dict_hook_handle.items():  # noqa: SLF001 - as above
        yield layer._state_dict_pre_hooks, handle.id  # noqa: SLF001 - as above
    for layer, handle in group._module_to_pre_load_state_dict_hook_handle.items():  # noqa: SLF001 - as above
        yield layer._load_state_dict_pre_hooks, handle.id  # noqa: SLF001 - as above
    for held in group.fsdp_params:
        yield held._module_info.module._load_state_dict_post_hooks, held._post_load_hook_handle.id  # noqa: SLF001 - as above
