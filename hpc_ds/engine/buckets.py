"""A bucket: parameters that lie one behind the other in flat buffers, cut into one chunk a rank.

What a bucket holds, for Ψ elements and N ranks:

| state     | type         | stage 0 | stage 1 | stage 2 | lives                                                      |
|-----------|--------------|---------|---------|---------|------------------------------------------------------------|
| values    | compute      | Ψ       | Ψ       | Ψ       | always; the module's parameters are views of it            |
| masters   | fp32         | Ψ       | Ψ/N     | Ψ/N     | always; a view of the values where those are fp32          |
| gradients | accumulation | Ψ       | Ψ       | Ψ       | until the step ends; at stage 2 until the bucket is summed |
| total     | fp32         | Ψ       | Ψ/N     | Ψ/N     | from the sum to the end of the step; between micro-batches |
|           |              |         |         |         | in the accumulation type                                   |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from hpc_ds.engine.exchange import Reduction


@dataclass(frozen=True, slots=True)
class Policy:
    """How gradients are summed and kept.

    Attributes:
        stage: 0, 1 or 2.
        bucket_elements: of a bucket, unless one parameter has more.
        average: the sum over ranks becomes the mean.
        before: factor on gradients before they are summed; the rest of the mean is taken afterwards.
        offload: masters live in host memory.
        pin_memory: which is then page-locked.
    """

    stage: int
    bucket_elements: int
    average: bool = True
    before: float = 1.0
    offload: bool = False
    pin_memory: bool = False


@dataclass(eq=False, slots=True)
class Slot:
    """A parameter's place in a bucket.

    Attributes:
        index: among the pieces.
        start, length: in elements of the bucket.
        arrived: its gradient of this step is in the bucket's gradients.
        used: it had a gradient in this step.
        version: of the parameter when the masters were last published.
    """

    parameter: nn.Parameter
    index: int
    start: int
    length: int
    arrived: bool = False
    used: bool = False
    version: int = 0


@dataclass(eq=False, slots=True)
class Bucket:
    """See the table of this file.

    Attributes:
        reduction: the sum that is under way.
        summed: the total of this step is there (below stage 2).
        summed_in: number of the backward pass that brought it.
        missing: gradients that this backward pass has not brought yet.
    """

    slots: list[Slot]
    values: torch.Tensor
    masters: torch.Tensor
    accumulate: torch.dtype
    gradients: torch.Tensor | None = None
    total: torch.Tensor | None = None
    reduction: Reduction | None = None
    summed: bool = False
    summed_in: int = 0
    missing: int = 0

    @property
    def exact(self) -> torch.dtype:
        """The type of masters and of their gradients."""
        return self.masters.dtype

    def gradient_of(self, slot: Slot) -> torch.Tensor:
        """Where a gradient belongs, flat; the buffer is made when first asked for."""
        if self.gradients is None:
            self.gradients = torch.empty(self.values.numel(), dtype=self.accumulate, device=self.values.device)
            ends = [other.start for other in self.slots[1:]] + [self.values.numel()]
            for other, end in zip(self.slots, ends, strict=True):
                self.gradients[other.start + other.length : end] = 0  # the padding takes part in sums and norms
        return self.gradients.narrow(0, slot.start, slot.length)
