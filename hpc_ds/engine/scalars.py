"""Parameters that stage 3 does not shard: whole on every rank, in the compute type, with fp32 masters.

Those are 0-dim and empty ones, what is not floating-point, and small ones whose type is not that of their block.

Their gradients are kept apart, in the type of the masters, and averaged together at the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from hpc_ds.engine.sharding import master_dtype, weakly

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(eq=False, slots=True)
class _Scalar:
    """A trainable parameter that is whole.

    Attributes:
        total: its gradient of this step.
        version: of the parameter when the master was last published.
    """

    parameter: nn.Parameter
    master: nn.Parameter
    total: torch.Tensor | None = None
    version: int = 0


class Scalars:
    """The whole parameters of one module."""

    def __init__(self, parameters: Mapping[nn.Parameter, torch.dtype], *, offload: bool) -> None:
        """Take them over.

        Args:
            parameters: on the device that computes, in the type of their masters, each with its compute type.
            offload: masters and gradients live in host memory, as those of all other parameters then do.
        """
        self._scalars: dict[nn.Parameter, _Scalar] = {}
        for parameter, compute in parameters.items():
            whole = parameter.detach()
            parameter.data = whole.to(compute)
            if parameter.requires_grad:
                place = torch.device("cpu") if offload else whole.device
                master = nn.Parameter(whole.to(place, master_dtype(whole.dtype), copy=True))
                self._scalars[parameter] = _Scalar(parameter, master, version=_version(parameter))
                parameter.register_post_accumulate_grad_hook(weakly(self._arrived))

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._scalars

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._scalars)

    def master(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer moves."""
        return self._scalars[parameter].master

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The sum over micro-batches; after ``average``, over ranks too."""
        return self._scalars[parameter].total

    def _arrived(self, parameter: nn.Parameter) -> None:
        scalar = self._scalars[parameter]
        if parameter.grad is None:
            return
        gradient = parameter.grad.to(scalar.master.device, scalar.master.dtype)
        scalar.total = gradient if scalar.total is None else scalar.total + gradient
        parameter.grad = None

    def average(self) -> None:
        """Collective. Make every gradient the mean over ranks, where any rank has one."""
        if not self._scalars:
            return
        scalars = list(self._scalars.values())
        used = [float(scalar.total is not None) for scalar in scalars]
        totals = [torch.zeros_like(each.master) if each.total is None else each.total for each in scalars]
        # Where the process group communicates: with offload, there may be no backend for host memory.
        sums = torch.cat([total.double().flatten() for total in totals]).to(scalars[0].parameter.device)
        flat = torch.cat([sums, torch.tensor(used, dtype=torch.float64, device=sums.device)])
        dist.all_reduce(flat)
        sums, by_ranks = flat.split([sums.numel(), len(scalars)])
        means = (sums / dist.get_world_size()).split([total.numel() for total in totals])
        for scalar, mean, users in zip(scalars, means, by_ranks.tolist(), strict=True):
            master = scalar.master
            scalar.total = mean.to(master.device, master.dtype).view(master.shape) if users else None

    def drop(self) -> None:
        """Forget all gradients."""
        for scalar in self._scalars.values():
            scalar.total = scalar.parameter.grad = None

    def publish(self) -> None:
        """Let the module compute with what the masters are now."""
        with torch.no_grad():
            for scalar in self._scalars.values():
                scalar.parameter.copy_(scalar.master)
                scalar.version = _version(scalar.parameter)

    def adopt(self) -> None:
        """Take up what was written to the parameters since ``publish``."""
        for parameter, scalar in self._scalars.items():
            if _version(parameter) != scalar.version:
                self.take_up(parameter)

    def take_up(self, parameter: nn.Parameter) -> None:
        """Let the master be what the parameter is."""
        scalar = self._scalars[parameter]
        with torch.no_grad():
            scalar.master.copy_(parameter)
        scalar.version = _version(parameter)


def _version(parameter: nn.Parameter) -> int:
    return parameter._version  # noqa: SLF001 - the only sign of a write
