"""``zero.Init``: a model that no rank could hold is sharded while it is being made.

A module is complete once it is registered in another one, the outermost when the context ends. Its own parameters are sharded
then (``early.py``), from rank 0's values, so that a rank never holds more than what is being made at the moment.

Source: https://deepspeed.readthedocs.io/en/latest/zero3.html, "Constructing Massive Models"
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from hpc_ds.config.load import read_training_config
from hpc_ds.engine.early import cut, gathered, lacks_elements
from hpc_ds.engine.zero import is_owned
from hpc_ds.errors import ConfigError
from hpc_ds.runtime.process_group import init_distributed

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

_ACCEPTED = {"tensor_overrides", "sequence_data_parallel_group"}
_UNSUPPORTED = {
    "zero_param_parallel_group": "there is no second group of ranks to shard over",
    "zero_quantized_weights": "weights travel as they are",
    "zero_quantized_nontrainable_weights": "weights are kept as they are",
    "param_swapper": "nothing is swapped to NVMe",
}

_contexts: list[Init] = []


class Init:
    """A context: every parameter of a module made inside is sharded as soon as its module is complete. Collective.

    Also ``Init(module=model)`` shards a model that is there already. Joins the process group where that has not been done.

    Parameters keep the type that they are made in, since the masters of the engine are made from them: a model made in fp32 and
    trained in bf16 has masters with all its digits (docs/decisions/020). Modules on the meta device are left to ``initialize``.
    Inside, ``module.apply(function)`` gathers what each module has, and keeps what rank 0 makes of it.
    """

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,  # noqa: ARG002 - autograd keeps no copy of a gathered weight anyway
        remote_device: str | None = None,
        pin_memory: bool = False,  # noqa: ARG002 - initialize copies each part once
        config_dict_or_path: dict[str, Any] | str | Path | None = None,
        config: dict[str, Any] | str | Path | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: object = None,
        **others: Any,
    ) -> None:
        """Say how to shard.

        Args:
            module: a model to shard at once.
            data_parallel_group: only of all ranks.
            mem_efficient_linear: accepted.
            remote_device: "cpu" keeps the parts in host memory; default: where the config offloads parameters to, else where this
                rank computes.
            pin_memory: accepted.
            config_dict_or_path: the training config; only ``zero_optimization.offload_param`` is read here.
            config: another name of it.
            enabled: False does nothing.
            dtype: of what is made inside without a type of its own, and of the floating-point parameters of ``module``.
            mpu: must be None: there is no model parallelism.
            others: DeepSpeed's other arguments; what would change results or memory is refused.

        Raises:
            ConfigError: an argument is not supported.
            RankError: see ``init_distributed``.
        """
        _refuse_unsupported(mpu, others)
        given = config if config_dict_or_path is None else config_dict_or_path
        self._place = _place(remote_device, {} if given is None else read_training_config(given)[0])
        self._enabled, self._dtype = enabled, dtype
        self._pending: dict[
            nn.Module, None
        ] = {}  # modules whose parameters are not sharded yet, in the order of making
        self._stack = ExitStack()
        if enabled:
            init_distributed()
            _refuse_part_of_the_ranks(data_parallel_group or others.get("sequence_data_parallel_group"))
        if enabled and module is not None:
            for owner in module.modules():
                for parameter in owner.parameters(recurse=False):
                    if dtype is not None and parameter.is_floating_point():
                        parameter.data = parameter.data.to(dtype)
                cut(owner, self._place)

    def __enter__(self) -> None:
        """Watch what is made."""
        if self._enabled:
            if not _contexts:
                self._watch()
            _contexts.append(self)
            if self._dtype is not None:
                self._stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self._dtype)

    def _watch(self) -> None:
        """From the outermost context on until it ends."""
        self._stack.callback(setattr, nn.Module, "apply", nn.Module.apply)
        nn.Module.apply = _apply_to_whole  # type: ignore[method-assign, assignment]
        self._stack.enter_context(_WholeForWrites())
        for handle in (
            hooks.register_module_parameter_registration_hook(_note),
            hooks.register_module_module_registration_hook(_complete),
        ):
            self._stack.callback(handle.remove)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shard what is left; after an error nothing, for the other ranks may not be here."""
        if not self._enabled:
            return
        self._stack.__exit__(kind, error, trace)
        _contexts.remove(self)
        if kind is None:
            for owner in self._pending:
                _cut(owner, self._place)
        self._pending.clear()


def _note(owner: nn.Module, _: str, parameter: nn.Parameter | None) -> None:
    if parameter is not None and not any(owner in context._pending for context in _contexts):  # noqa: SLF001 - of the same file
        _contexts[-1]._pending[owner] = None  # noqa: SLF001 - as above


def _complete(_: nn.Module, __: str, module: nn.Module | None) -> None:
    for owner in () if module is None else module.modules():
        for context in _contexts:
            if owner in context._pending:  # noqa: SLF001 - as above
                del context._pending[owner]  # noqa: SLF001 - as above
                _cut(owner, context._place)  # noqa: SLF001 - as above


def _cut(owner: nn.Module, place: torch.device | None) -> None:
    """Collective. Shard a module's own parameters, unless an engine has been made of them meanwhile."""
    if not any(map(is_owned, owner.parameters(recurse=False))):
        cut(owner, place)


def _apply_to_whole(module: nn.Module, function: Callable[[nn.Module], None]) -> nn.Module:
    """``Module.apply`` whose function sees whole parameters: those of the module that it is given, and of its children."""
    for child in module.children():
        child.apply(function)
    near = [parameter for each in (module, *module.children()) for parameter in each.parameters(recurse=False)]
    with gathered(near, 0):
        function(module)
    return module


class _WholeForWrites(TorchFunctionMode):
    """Lets a constructor write to parameters of the modules that it has made, as if they were not sharded yet.

    ``nn.init.normal_(self.head.weight)``, ``self.head.weight.data.mul_(2)`` and ``nn.init.zeros_(self.head.weight[0])`` would write
    to nothing, or fail. Of what a view is taken stays whole for a while. Looking at shapes gathers nothing: a script may do so on
    one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self._data: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what was seen as ``parameter.data`` -> the parameter
        self._open: dict[nn.Parameter, AbstractContextManager[None]] = {}  # what has views, the oldest first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shard again what has views."""
        for context in self._open.values():
            context.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call] # torch's stubs

    def __torch_function__(
        self, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        writes = _in_place(name) or function == _SET_DATA
        if writes or name in _VIEWS:
            found = [
                self._data.get(each, each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
            ]
            wanted = [each for each in found if lacks_elements(each)]
            if wanted and writes:
                with gathered(wanted, 0):
                    return function(*self._whole(args), **self._whole(kwargs))
            for parameter in wanted:
                self._keep_whole(parameter)
            args, kwargs = self._whole(args), self._whole(kwargs)
        value = function(*args, **kwargs)
        if function == _GET_DATA and lacks_elements(args[0]):
            self._data[value] = args[0]
        return value

    def _keep_whole(self, parameter: nn.Parameter) -> None:
        if len(self._open) == _MOST_OPEN:
            self._open.pop(next(iter(self._open))).__exit__(None, None, None)
        self._open[parameter] = gathered([parameter], 0)
        self._open[parameter].__enter__()

    def _whole(self, arguments: Any) -> Any:
        return tree_map_only(
            torch.Tensor, lambda each: self._data[each].data if each in self._data else each, arguments
        )


_GET_DATA, _SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined] # a C descriptor
_VIEWS = {"__getitem__", "select", "narrow", "chunk", "split", "unbind", "view", "reshape", "flatten", "t", "transpose"}
_MOST_OPEN = 4


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name == "__setitem__"


def _refuse_unsupported(mpu: object, others: dict[str, Any]) -> None:
    if mpu is not None:
        raise ConfigError("zero.Init: mpu is for model parallelism, which is not supported; leave it out")
    for name, value in others.items():
        if name in _UNSUPPORTED and value:
            raise ConfigError(f"zero.Init: {name} {value!r} is not supported: {_UNSUPPORTED[name]}; leave it out")
        if name not in _UNSUPPORTED and name not in _ACCEPTED:
            raise TypeError(f"Init() got an unexpected keyword argument {name!r}")


def _refuse_part_of_the_ranks(group: Any) -> None:
    if group is not None and dist.get_world_size(group) != dist.get_world_size():
        raise ConfigError(
            f"zero.Init: data_parallel_group has {dist.get_world_size(group)} of {dist.get_world_size()} ranks; parameters are "
            "sharded over all of them, leave it out"
        )


def _place(remote_device: str | None, config: dict[str, Any]) -> torch.device | None:
    """Where parts are kept; None: where this rank computes."""
    zero = config.get("zero_optimization")
    offload = zero.get("offload_param") if isinstance(zero, dict) else None
    asked = remote_device or (offload.get("device") if isinstance(offload, dict) else None)
    if asked == "nvme":
        raise ConfigError("zero.Init: parameters cannot be kept on NVMe; use remote_device='cpu'")
    return torch.device("cpu") if asked == "cpu" else None
