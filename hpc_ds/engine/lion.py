"""Lion: Adam's rival that keeps one moment and uses only its sign.

It moves each element by the learning rate, in the direction of the sign of a mean of gradients: with momentum m and
gradient g, ``p -= lr (sign(b1 m + (1 - b1) g) + decay p)``, then ``m = b2 m + (1 - b2) g``.
Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, algorithm 2; the defaults are DeepSpeed's. Where
the mean is exactly 0 the sign is 0, as in the paper; DeepSpeed's kernel moves such an element by +lr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.engine.own_optimizer import OwnOptimizer, gradients, trained

if TYPE_CHECKING:
    from collections.abc import Iterable


class Lion(OwnOptimizer):
    """Sign of momentum, with decoupled weight decay."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self) -> None:
        for group in self.param_groups:
            parameters = trained(group)
            if not parameters:
                continue
            grads = gradients(parameters)
            momenta = [self._state(parameter, "exp_avg")[0] for parameter in parameters]
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            directions = torch._foreach_lerp(momenta, grads, 1 - beta1)  # noqa: SLF001 - torch's documented fast path
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, grads, 1 - beta2)
