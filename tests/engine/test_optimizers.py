"""From the config's section to a torch optimizer: names, DeepSpeed's meanings and defaults, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_ds.config.training import OptimizerConfig
from hpc_ds.engine.optimizers import make_optimizer
from hpc_ds.errors import ConfigError


def make(kind: str, parameters: Any = None, **params: Any) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(2))] if parameters is None else parameters
    return make_optimizer(OptimizerConfig(type=kind, params=params), parameters)


@pytest.mark.parametrize(
    ("kind", "params", "wanted"),
    [
        ("AdamW", {}, torch.optim.AdamW),
        ("adamw", {"adam_w_mode": False}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),
        ("adam", {"adam_w_mode": True, "torch_adam": True}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD),
        ("sgd", {}, torch.optim.SGD),
        ("Adagrad", {}, torch.optim.Adagrad),
        ("RMSprop", {}, torch.optim.RMSprop),
    ],
)
def test_names(kind: str, params: dict[str, Any], wanted: type) -> None:
    assert type(make(kind, lr=0.1, **params)) is wanted


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_adam_has_deepspeeds_defaults(kind: str) -> None:
    group = make(kind).param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")} == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "fused": True,
    }


def test_params_reach_the_optimizer() -> None:
    group = make("AdamW", lr=0.25, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1, fused=False).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.25, (0.8, 0.95), 1e-6, 0.1)
    assert group["fused"] is False


def test_groups_keep_what_they_say_and_take_the_rest_from_the_config() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    made = make("SGD", iter([{"params": [first]}, {"params": [second], "lr": 0.5}]), lr=0.1)
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.5]
    assert made.param_groups[1]["params"][0] is second


def test_adam_is_adamw_and_equals_its_law() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make("Adam", [parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    # decoupled decay by lr * weight_decay, then a first step of size lr in the direction of the sign
    assert parameter.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)


@pytest.mark.parametrize(
    ("kind", "params", "key", "message"),
    [
        ("AdmaW", {}, "optimizer.type", r"optimizer.type 'AdmaW': unknown; did you mean 'AdamW'\?"),
        ("Optimizer", {}, "optimizer.type", "optimizer.type 'Optimizer': unknown; "),
        ("lamb", {}, "optimizer.type", "optimizer.type 'lamb': unknown; "),
        ("AdamW", {"lrr": 1}, "optimizer.params.lrr", r"optimizer.params.lrr: unknown to AdamW; did you mean 'lr'\?"),
        ("SGD", {"betas": [0.9, 0.99]}, "optimizer.params.betas", "optimizer.params.betas: unknown to SGD; "),
        ("AdamW", {"lr": -1.0}, "optimizer.params", "optimizer.params: refused by AdamW: .*-1.0; check them"),
        ("AdamW", {"lr": "0.1"}, "optimizer.params", "optimizer.params: refused by AdamW: "),
        ("Adam", {"max_grad_norm": 1.0}, None, "optimizer.params.max_grad_norm: .*; use gradient_clipping"),
    ],
)
def test_refusals(kind: str, params: dict[str, Any], key: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(kind, **params)
    assert caught.value.key == key
