"""What a ZeRO stage means to the engine, whatever does the work.

| stage | parameters in compute type | gradients                                    | masters and optimizer state | by             |
|-------|----------------------------|----------------------------------------------|-----------------------------|----------------|
| 0     | whole                      | whole; summed at the boundary                | whole                       | replicated.py  |
| 1     | whole                      | whole; own part summed at the boundary       | this rank's part            | replicated.py  |
| 2     | whole                      | this rank's part, summed every micro-batch   | this rank's part            | replicated.py  |
| 3     | gathered block by block    | this rank's part, summed every micro-batch   | this rank's part            | fully_sharded  |

The engine and the optimizer see only pieces (``piece.py``), so nothing above this file asks for the stage.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019, section 5.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from hpc_ds.engine.piece import Piece


@dataclass(frozen=True, slots=True)
class Precision:
    """The types that numbers have on their way.

    Attributes:
        compute: of parameters and inputs in forward and backward; None leaves each as it is.
        accumulate: of gradients between micro-batches; None: that of the parameters.
        wire: what travels between ranks when gradients are summed; None: whatever loses nothing.
        buffers: of floating-point buffers; None leaves them as they are.
    """

    compute: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    wire: torch.dtype | None = None
    buffers: torch.dtype | None = None


@dataclass(eq=False, slots=True)
class Kept:
    """A tensor of the module that is saved, but not trained: a frozen parameter or a persistent buffer.

    Attributes:
        name: as in ``module.state_dict()``.
        shape: of the whole.
        start: the first element of this rank's range within the flattened whole.
        tensor: the range, or the whole.
        shared: every rank holds the whole.
        frozen: it is a parameter.
    """

    name: str
    shape: torch.Size
    start: int
    tensor: torch.Tensor
    shared: bool
    frozen: bool


class Sharding(ABC):
    """A module under a ZeRO stage.

    Attributes:
        module: the user's module, changed in place.
        pieces: this rank's part of every trainable parameter, in the order of ``module.named_parameters()``.
        device: where the module computes.
        culprit: the first parameter in the order of the backward pass whose gradient was not finite on this rank, looked
            for after ``inspect``.
    """

    module: nn.Module
    pieces: list[Piece]
    device: torch.device
    culprit: str | None = None

    @abstractmethod
    def inspect(self) -> None:
        """Look at every gradient of this step as it arrives: an overflow would end the run."""

    @abstractmethod
    def refuse_different_use(self, users: Sequence[int]) -> None:
        """Where gradients would be mixed up, do not let ranks use different parameters in a step."""

    @abstractmethod
    def begin_backward(self, *, boundary: bool) -> None:
        """Say whether the coming backward pass completes the gradients of a step."""

    @abstractmethod
    def end_backward(self) -> None:
        """Collective at stages 2 and 3. Every gradient of this pass has arrived."""

    @abstractmethod
    def complete_gradients(self) -> None:
        """Collective. Make this rank's part of the mean gradient, summed over ranks and micro-batches."""

    @abstractmethod
    def used(self) -> list[bool]:
        """For every piece, whether this rank used the parameter since the last step."""

    @abstractmethod
    def squared_norm(self) -> torch.Tensor:
        """This rank's part of the squared gradient norm, 0-dim fp64: the parts of all ranks add up to it."""

    @abstractmethod
    def hand_over(self, used: Sequence[bool], factor: float) -> None:
        """Give every master its gradient times ``factor``; None to those that no rank used."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget all gradients, also those of a step that is not complete."""

    @abstractmethod
    def publish(self) -> None:
        """Collective below stage 3. Let the module compute with what the masters are now."""

    @abstractmethod
    def adopt(self) -> None:
        """Take up what a script has written to the module's parameters since ``publish``."""

    @abstractmethod
    def explain(self, error: RuntimeError) -> None:
        """Say why a forward failed, if it is because of what a script did to sharded parameters.

        Raises:
            ConfigError: it is.
        """

    @abstractmethod
    def reshard(self) -> None:
        """Drop what was gathered: a forward without a backward leaves whole parameters behind at stage 3."""

    @abstractmethod
    def kept(self) -> Iterator[Kept]:
        """What is saved beside the pieces."""

    @abstractmethod
    def whole_value(self, index: int) -> torch.Tensor:
        """Collective. A whole parameter in the master type."""

    @abstractmethod
    def gathered(self, parameters: Sequence[nn.Parameter], writer: int | None) -> AbstractContextManager[None]:
        """Collective. Parameters are whole inside; on leaving, what rank ``writer`` wrote is everybody's."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[None]:
        """Collective. All parameters are whole inside, and forwards leave them so."""

    def leave_whole(self, *, whole: bool) -> None:  # noqa: B027 - below stage 3 they always are
        """Whether forwards leave parameters whole; inside of ``gathered``."""

    def release(self) -> bool:
        """Let go of the module, which has storage of its own then, in the compute type; whether it is free.

        Not at stage 3.
        """
        return False

    @abstractmethod
    def watch_output(self, tensor: torch.Tensor) -> None:
        """Gradients will enter the module at this output."""

    def gradient(self, piece: Piece) -> torch.Tensor | None:
        """This rank's part of a gradient, between ``complete_gradients`` and the end of the step.

        Whether it is anything but zero: ask what ranks ``used`` the parameter.
        """
        return piece.master.grad


def gather_flat(piece: Piece | Kept, values: torch.Tensor | None) -> torch.Tensor | None:
    """Collective. The whole of something that every rank has a range of, in the shape of the parameter.

    Args:
        piece: says which range.
        values: as many elements as the piece; None where there is nothing, which all ranks must agree on.
    """
    if values is None or piece.shared:
        return None if values is None else values.detach().reshape(piece.shape).clone()
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, values.numel())
    # Equal sizes, because not every backend gathers unequal ones.
    longest = max(lengths)
    padded = torch.zeros(longest, dtype=values.dtype, device=values.device)
    padded[: values.numel()] = values.detach().flatten()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).reshape(piece.shape)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which parameters of a type are updated: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def find_blocks(module: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The blocks of a model: what is gathered, compiled and cast to together.

    Args:
        module: the model.
        names: classes of blocks; by default the entries of its outermost ModuleLists, where a list has several of one
            class. A module that shares a parameter with the rest of the model is none: it would be gathered twice.
    """
    uses = uses_of(module)
    if names is not None:
        found = [layer for layer in module.modules() if type(layer).__name__ in names and layer is not module]
        nested = {id(inner) for layer in found for inner in layer.modules() if inner is not layer}
        found = [layer for layer in found if id(layer) not in nested]
        return [layer for layer in found if stands_alone(layer, uses)]
    blocks = []
    for layers in _outermost_lists(module):
        classes = Counter(type(layer) for layer in layers)
        blocks += [layer for layer in layers if classes[type(layer)] > 1 and stands_alone(layer, uses)]
    return list(dict.fromkeys(blocks))  # a layer may stand in a list more than once


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and not all(isinstance(layer, nn.ModuleList) for layer in child):
            yield child
        else:
            yield from _outermost_lists(child)


def uses_of(module: nn.Module) -> Counter[int]:
    """How often each parameter, by its id, is an attribute of some module."""
    return Counter(id(parameter) for owner in module.modules() for parameter in owner._parameters.values())  # noqa: SLF001


def stands_alone(layer: nn.Module, uses: Counter[int]) -> bool:
    """Whether a layer may be gathered by itself: it has a forward, and shares no parameter with what is around it."""
    if isinstance(layer, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        return False  # a container has no forward to hook into
    inside = uses_of(layer)
    own = {id(parameter) for parameter in layer.parameters()}
    return any(parameter.dim() > 0 for parameter in layer.parameters()) and all(inside[key] == uses[key] for key in own)


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Inputs with their floating-point tensors in a type, however nested."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def cast_inputs(dtype: torch.dtype, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """For a hook before a forward: its floating-point inputs in a type."""
    return cast_floating(args, dtype), cast_floating(kwargs, dtype)


def take_up_written(master: torch.Tensor, values: torch.Tensor) -> None:
    """Let a master follow what was written to its values; where they are its own, only rounded, it keeps its digits."""
    values = values.to(master.device)
    changed = values != master.to(values.dtype)  # also where either is NaN
    master.copy_(torch.where(changed, values.to(master.dtype), master))


def broadcast(tensors: Sequence[torch.Tensor]) -> None:
    """Collective. Give every rank the values of rank 0."""
    if dist.get_world_size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            if whole is not tensor:
                tensor.copy_(whole)


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint keeps, by name; contiguous from now on, as flat ranges of them are filled in place."""
    kept = module.state_dict(keep_vars=True)
    found = {name: value for name, value in module.named_buffers() if name in kept}
    for value in found.values():
        value.data = value.data.contiguous()
    return found


def weakly(method: Callable[[nn.Parameter], None]) -> Callable[[nn.Parameter], None]:
    """A hook that does not keep its object alive: the garbage collector does not see the hooks of tensors."""
    weak = weakref.WeakMethod(method)

    def call(parameter: nn.Parameter) -> None:
        strong = weak()
        if strong is not None:
            strong(parameter)

    return call
