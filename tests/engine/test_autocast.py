"""torch_autocast: what the forward computes in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from hpc_ds.config.sections import AutocastConfig
from hpc_ds.engine import autocast
from hpc_ds.engine.autocast import autocast_context, autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _not_told_yet() -> Iterator[None]:
    autocast._tell_of_foreign_autocast.cache_clear()
    yield
    autocast._tell_of_foreign_autocast.cache_clear()


class Model(nn.Module):
    """A tied head, a convolution, and modules that stay fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))


def config(**others: Any) -> AutocastConfig:
    return AutocastConfig(enabled=True, **others)


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16", "float16", "fp16", "half", "torch.float16"])
@pytest.mark.parametrize("cache", [True, False])
def test_products_are_lower_and_norms_and_parameters_are_not(name: str, cache: bool) -> None:
    wanted = torch.bfloat16 if "b" in name else torch.float16
    linear, norm, x = nn.Linear(8, 8), nn.LayerNorm(8), torch.randn(2, 8)
    with autocast_context(config(dtype=name), "cpu", cache):
        assert torch.is_autocast_cache_enabled() == cache
        product = linear(x)
        assert norm(x).dtype == torch.float32
    assert product.dtype == wanted == autocast_dtype(config(dtype=name))
    product.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert linear(x).dtype == torch.float32


def test_without_it_nothing_is_lower() -> None:
    with autocast_context(AutocastConfig(), "cpu"):
        assert nn.Linear(8, 8)(torch.randn(2, 8)).dtype == torch.float32


def test_the_config_wins_over_a_scripts_own_autocast(caplog: pytest.LogCaptureFixture) -> None:
    linear, x = nn.Linear(8, 8), torch.randn(2, 8)
    with caplog.at_level(logging.WARNING, "hpc_ds"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with autocast_context(AutocastConfig(), "cpu"):
                assert linear(x).dtype == torch.float32
        with autocast_context(config(dtype="float16"), "cpu"):
            assert linear(x).dtype == torch.float16
        assert linear(x).dtype == torch.bfloat16
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("torch.autocast around the engine is switched off inside of it; set ")
