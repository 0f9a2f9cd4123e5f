"""Lamb: Adam whose step is scaled, for each whole parameter, by the ratio of its norm to that of its update.

With u = m / (sqrt(v) + eps) + decay p, of moments that are not corrected for bias: ``p -= a r u``, where
``a = lr sqrt(1 - b2^t) / (1 - b1^t)``, or lr without bias_correction, and ``r = |p| / |u|``, kept between min_coeff and
max_coeff, or 1 where one of the norms is 0.

Norms are of whole parameters, moments and updates of ranges: one all-reduce a step adds up the squares.

Source: You et al., Large Batch Optimization for Deep Learning, 2020, algorithm 2, in the form of DeepSpeed's FusedLamb
(https://deepspeed.readthedocs.io/en/latest/optimizers.html#fusedlamb-gpu): the bias goes into the step size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.engine.own_optimizer import OwnOptimizer, gradients, trained
from hpc_ds.engine.uncorrected_adam import adam_directions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hpc_ds.engine.piece import Piece


class Lamb(OwnOptimizer):
    """Layer-wise adaptive moments, over pieces of parameters.

    Attributes:
        piece_of: what each parameter is; one that is not there is a whole one, which every rank has.
    """

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        groups: Iterable[dict[str, Any]],
        piece_of: Mapping[Any, Piece],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        self.piece_of = piece_of
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"eps_inside_sqrt": eps_inside_sqrt, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "max_coeff": max_coeff, "min_coeff": min_coeff})

    def _update(self) -> None:
        by_group = [(group, trained(group)) for group in self.param_groups]
        by_group = [(group, parameters) for group, parameters in by_group if parameters]
        if not by_group:
            return
        updates = [self._updates(group, parameters) for group, parameters in by_group]
        all_updates = [update for of_group in updates for update in of_group]
        norms = self._norms([one for _, parameters in by_group for one in parameters], all_updates)
        for (group, parameters), of_group in zip(by_group, updates, strict=True):
            weight_norms, update_norms = norms[:, : len(parameters)]
            norms = norms[:, len(parameters) :]
            ratios = (weight_norms / update_norms).clamp(group["min_coeff"], group["max_coeff"])
            ratios = torch.where((weight_norms == 0) | (update_norms == 0), 1.0, ratios)
            torch._foreach_mul_(of_group, list(ratios.unbind()))
            for parameter, update in zip(parameters, of_group, strict=True):
                parameter.add_(update, alpha=-self._step_size(group, parameter))

    def _updates(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
        directions = adam_directions(self, group, parameters, gradients(parameters))
        torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        return directions

    def _norms(self, parameters: list[torch.Tensor], updates: list[torch.Tensor]) -> torch.Tensor:
        """The norms of whole parameters and of their whole updates, (2, parameters) fp32. Collective."""
        norms = [*torch._foreach_norm(parameters), *torch._foreach_norm(updates)]  # noqa: SLF001
        of = [self.piece_of.get(one) for one in (*parameters, *parameters)]
        ranges = [index for index, piece in enumerate(of) if piece is not None and not piece.shared]
        if ranges:
            squares = torch.stack([norms[index].double() for index in ranges]).square()
            dist.all_reduce(squares)
            for index, norm in zip(ranges, squares.sqrt().unbind(), strict=True):
                norms[index] = norm
        return torch.stack([norm.float() for norm in norms]).view(2, -1)

    def _step_size(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        if not group["bias_correction"]:
            return float(group["lr"])
        (beta1, beta2), step = group["betas"], float(self.state[parameter]["step"])
        return float(group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step))
