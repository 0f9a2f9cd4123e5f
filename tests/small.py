"""A model of a few parameters and a config for it, for tests of what a script can do with an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpc_ds.errors import HpcdsError

if TYPE_CHECKING:
    from collections.abc import Callable

STAGES = (0, 1, 2, 3)
RATE = 0.1


class Small(nn.Module):
    """Two layers, odd widths, a 0-dim parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (samples, 3) -> (samples, 2)
        return self.down(torch.tanh(self.up(x))) * self.gain + self.shift


def config(stage: int = 0, **overrides: Any) -> dict[str, Any]:
    """Plain SGD, whose update is the gradient, on two samples a rank."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        **overrides,
    }


def samples(number: int = 0, count: int = 2) -> torch.Tensor:
    """(count, 3), another one for each number."""
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(number))


def said(do: Callable[[], Any]) -> str:
    """The message of the error of ours that something raises, with the error's name."""
    try:
        value = do()
    except HpcdsError as error:
        return f"{type(error).__name__}: {error}"
    return f"no error, but {value!r}"
