"""What a rank holds of a parameter: one contiguous range of its flattened elements, as fp32 master copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(eq=False, slots=True)
class Piece:
    """One rank's range of a parameter. Every rank has one of each trainable parameter, in the same order, maybe empty.

    Attributes:
        name: of ``module.named_parameters()``.
        shape: of the whole parameter.
        start: the range's first element within the flattened whole.
        master: fp32, any shape with the range's number of elements; ``shape`` if the range is the whole parameter. Its
            gradient is None for a parameter that no rank used in the step.
        shared: every rank holds the same whole one, as at stage 0 and for 0-dim parameters.
    """

    name: str
    shape: torch.Size
    start: int
    master: nn.Parameter
    shared: bool
