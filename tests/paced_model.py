"""The model and the numbered samples of tests/paced.py, apart from it so that the program can wait before torch is loaded."""

from __future__ import annotations

import torch

SAMPLES, FEATURES = 136, 8


class Samples(torch.utils.data.Dataset[tuple[int, torch.Tensor]]):
    """Numbered vectors; 17 steps of eight make an epoch."""

    def __init__(self) -> None:
        self._vectors = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor]:
        return number, self._vectors[number]


class Model(torch.nn.Module):
    """Two layers that learn the sum of a vector, with dropout, so that random state counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 37), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(37, 1)
        )

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.layers(vectors) - vectors.sum(dim=1, keepdim=True)).square().mean()
        return loss
