"""The one collective of a step: every rank says what it knows, and all know the same afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks know after the one collective of a step.

    Attributes:
        grad_norm: global L2 norm, unscaled, before clipping; not finite after an overflow.
        loss: mean over ranks and micro-batches; NaN where a script kept it to itself.
        stop: some rank was told to stop.
        save: rank 0's clock says that a save is due.
        settled: rank 0 knows how the save behind the training has ended.
        users: for every piece, how many ranks used the parameter.
    """

    grad_norm: float
    loss: float
    stop: bool
    save: bool
    settled: bool
    users: tuple[int, ...]

    @property
    def overflowed(self) -> bool:
        """Whether the gradients are not finite."""
        return not math.isfinite(self.grad_norm)


def agree(
    squared_norm: torch.Tensor, loss: torch.Tensor, told: Sequence[bool], used: Sequence[bool], scale: float
) -> Agreed:
    """Collective. Add up what the ranks say, in one message and with one wait of the host for the device.

    Args:
        squared_norm: 0-dim fp64, this rank's part.
        loss: 0-dim fp64, this rank's mean over micro-batches.
        told: whether this rank was told to stop, whether a save is due, and whether one has ended.
        used: for every piece, whether this rank used the parameter.
        scale: the loss scale, by which gradients are too large.
    """
    plain = torch.tensor([*told, *used], dtype=torch.float64).to(squared_norm.device, non_blocking=True)
    numbers = torch.cat([squared_norm.view(1), (loss / dist.get_world_size()).view(1), plain])
    dist.all_reduce(numbers)
    squared, mean_loss, stop, save, settled, *users = numbers.tolist()
    norm = math.sqrt(squared) / scale if squared >= 0 else math.nan
    return Agreed(norm, mean_loss, stop > 0, save > 0, settled > 0, tuple(map(int, users)))
