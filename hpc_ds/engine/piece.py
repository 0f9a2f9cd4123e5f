"""What an optimizer updates: one rank's part of one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(eq=False, slots=True)
class Piece:
    """A contiguous range of a flattened parameter, in the master type, as an ordinary tensor.

    Every rank has one piece of every trainable parameter, in the same order; it may be empty.

    Attributes:
        name: the parameter's, as in ``module.named_parameters()``.
        shape: of the whole parameter.
        start: the first element within the flattened whole.
        master: the range, fp32 (fp64 for fp64 parameters); it has the whole ``shape`` where it is the whole.
        shared: every rank holds the same whole parameter.
    """

    name: str
    shape: torch.Size
    start: int
    master: nn.Parameter
    shared: bool


def own_range(whole: torch.Tensor, start: int, own: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that begins at a flat index and has the shape of what this rank keeps."""
    return whole.flatten().narrow(0, start, own.numel()).view(own.shape)
