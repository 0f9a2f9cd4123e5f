"""What libraries take DeepSpeed's hooks of stage 3 away by, for calls that ranks make as often as each of them likes.

Inside of ``GatheredParameters`` trl removes the hooks, has each rank generate its own number of tokens, and asks for the hooks
again. Here a forward leaves parameters whole meanwhile, which is what they do it for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class ParameterOffload:
    """``optimizer.parameter_offload``: as much of DeepSpeed's as is asked for by that name.

    Attributes:
        module: for ``_register_deepspeed_module``; it has no parameters of which anything is to be cleared.
        forward_hooks: the one that stands for all; None of them are there while it is removed.
        backward_hooks: none.
    """

    def __init__(self, leave_whole: Callable[..., None]) -> None:
        self._leave_whole = leave_whole
        self.module = _NoParameters()
        self.forward_hooks: list[Any] = [_Hook(leave_whole)]
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, _module: object) -> None:
        """Let forwards drop what they gather again."""
        self._leave_whole(whole=False)
        self.forward_hooks = [_Hook(self._leave_whole)]


class _NoParameters:
    def named_parameters(self, *, recurse: bool = True) -> tuple[()]:  # noqa: ARG002 - torch's signature
        return ()

    def ds_external_parameters(self) -> tuple[()]:
        return ()


class _Hook:
    def __init__(self, leave_whole: Callable[..., None]) -> None:
        self._leave_whole = leave_whole

    def remove(self) -> None:
        """Let forwards leave whole what is whole."""
        self._leave_whole(whole=True)
