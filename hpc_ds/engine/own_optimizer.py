"""What the optimizers that torch does not have share: the frame of a step, and the check of their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# The numbers by name, and what they must be: (is it right, in words).
_NOT_NEGATIVE = (lambda value: value >= 0, "a number, 0 or more")
_BELOW_ONE = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "min_coeff": _NOT_NEGATIVE,
    "max_coeff": _NOT_NEGATIVE,
    "momentum": _BELOW_ONE,
}


class OwnOptimizer(torch.optim.Optimizer):
    """An optimizer whose law is ``_update``."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        for group in self.param_groups:
            check_numbers(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # torch has overloads
        """Update the parameters that have gradients. Collective, where the law needs whole parameters.

        Args:
            closure: as in torch: computes the loss again, and its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        raise NotImplementedError

    def _state(self, parameter: torch.Tensor, *keys: str) -> list[torch.Tensor]:
        """Tensors of a parameter's state like itself, zero at first."""
        state = self.state[parameter]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [state[key] for key in keys]


def trained(group: dict[str, Any]) -> list[torch.Tensor]:
    """The parameters of a group that have a gradient; the same ones on every rank."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their gradients."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def check_numbers(params: dict[str, Any]) -> None:
    """Refuse a number out of its range, by its name.

    Raises:
        ConfigError: it is out of range, or no number.
    """
    for key, (right, words) in _RANGES.items():
        if key in params and not (_is_number(params[key]) and right(params[key])):
            raise _refusal(key, params[key], words)
    betas = params.get("betas", (0.0, 0.0))
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_is_share, betas)):
        raise _refusal("betas", betas, "two numbers from 0 to below 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _refusal(key: str, value: object, words: str) -> ConfigError:
    key = f"optimizer.params.{key}"
    return ConfigError(f"{key} {value!r}: out of range; it must be {words}", key=key, value=value)
