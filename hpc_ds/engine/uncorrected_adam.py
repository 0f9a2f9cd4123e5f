"""Adam without bias correction, which DeepSpeed's ``bias_correction: false`` asks for and torch does not have.

``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``p -= lr m / (sqrt(v) + eps)``.

Source: Kingma and Ba, Adam, 2015, algorithm 1, without its two corrections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.engine.own_optimizer import OwnOptimizer, gradients, trained

if TYPE_CHECKING:
    from collections.abc import Iterable


class UncorrectedAdam(OwnOptimizer):
    """Adam, or AdamW, without bias correction."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "decoupled_weight_decay": decoupled_weight_decay})

    def _update(self) -> None:
        for group in self.param_groups:
            parameters = trained(group)
            if not parameters:
                continue
            grads, decay, lr = gradients(parameters), group["weight_decay"], float(group["lr"])
            if group["decoupled_weight_decay"]:
                torch._foreach_mul_(parameters, 1 - lr * decay)
            else:
                grads = list(torch._foreach_add(grads, parameters, alpha=decay))  # noqa: SLF001
            directions = adam_directions(self, group, parameters, grads)
            torch._foreach_add_(parameters, directions, alpha=-lr)


def adam_directions(
    optimizer: OwnOptimizer, group: dict[str, Any], parameters: list[torch.Tensor], grads: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Advance both moments by one step; returns the first over the root of the second, not corrected for bias.

    A group may have ``eps_inside_sqrt``, which adds eps before taking the root.
    """
    moments = [optimizer._state(parameter, "exp_avg", "exp_avg_sq") for parameter in parameters]  # noqa: SLF001 - our own base
    first, second = [pair[0] for pair in moments], [pair[1] for pair in moments]
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    if group.get("eps_inside_sqrt"):
        roots = torch._foreach_add(second, group["eps"])  # noqa: SLF001
        torch._foreach_sqrt_(roots)
    else:
        roots = torch._foreach_sqrt(second)  # noqa: SLF001
        torch._foreach_add_(roots, group["eps"])
    return list(torch._foreach_div(first, roots))  # noqa: SLF001
