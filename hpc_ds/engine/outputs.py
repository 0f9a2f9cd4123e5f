"""Plain ``loss.backward()`` on what an engine returned: the pass is noticed where it enters the module's outputs.

A pass may go through several outputs, and through one on its way to another, so nothing is scaled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DEEPEST = 5  # of objects and containers in each other


class Outputs:
    """Watches the outputs of one engine.

    Attributes:
        expected: a backward pass that the engine itself began is under way; it needs no help.
    """

    def __init__(
        self,
        prepare: Callable[[torch.Tensor], None],
        begin: Callable[[], float],
        end: Callable[[], None],
        count: Callable[[torch.Tensor], None],
    ) -> None:
        """Make one.

        Args:
            prepare: takes each output that gradients can enter at.
            begin: begins a pass; returns the factor on its loss.
            end: ends it.
            count: takes its loss; NaN where it is not known.
        """
        self._prepare, self._begin, self._end, self._count = prepare, begin, end, count
        self._under_way = False
        self._factor = 1.0
        self._losses: list[torch.Tensor] = []
        self.expected = False

    def watch(self, output: Any) -> None:
        """Look out for backward passes that enter here."""
        self._under_way = False  # also after a pass that an error has ended
        for tensor in _tensors(output):
            if tensor.requires_grad and tensor.grad_fn is not None:
                self._prepare(tensor)
                loss = tensor.detach() if tensor.numel() == 1 else None
                tensor.register_hook(lambda gradient, loss=loss: self._entered(gradient, loss))

    def _entered(self, gradient: torch.Tensor, loss: torch.Tensor | None) -> None:
        if self.expected:
            return
        if not self._under_way:
            self._factor = self._begin()
            self._under_way = True
            self._losses.clear()
            # torch's own engines of sharding end their passes in the same way.
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)  # noqa: SLF001
        if loss is not None:
            # By its gradient, without waiting for the device: only the loss itself has that of a loss.
            is_loss = gradient.double().reshape(()) == self._factor
            self._losses.append(torch.where(is_loss, loss.double().reshape(()), torch.nan))

    def _ended(self) -> None:
        self._under_way = False
        self._count(self._losses[0] if len(self._losses) == 1 else torch.tensor(torch.nan))
        self._end()


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in containers, dataclasses and other objects."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inner = list(value)
    elif isinstance(value, (nn.Module, type)) or depth == _DEEPEST:
        return
    else:
        slots = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ()) if name != "__dict__"]
        inner = [*getattr(value, "__dict__", {}).values(), *slots]
    for item in inner:
        yield from _tensors(item, depth + 1)
