"""From the config's section to a torch optimizer: names, DeepSpeed's meanings and defaults, refusals, and laws by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from hpc_ds.config.training import OptimizerConfig
from hpc_ds.engine import newton_schulz
from hpc_ds.engine.lamb import Lamb
from hpc_ds.engine.lion import Lion
from hpc_ds.engine.matrix_exchange import shared_out
from hpc_ds.engine.muon import Muon
from hpc_ds.engine.newton_schulz import METHODS, orthogonalised
from hpc_ds.engine.optimizers import elementwise, make_optimizer
from hpc_ds.engine.piece import Piece
from hpc_ds.engine.uncorrected_adam import UncorrectedAdam
from hpc_ds.errors import ConfigError


def make(kind: str, groups: Any = None, shared: bool = True, names: Any = None, **params: Any) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}] if groups is None else groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    names = names or [f"layer.{number}" for number in range(len(parameters))]
    pieces = {one: Piece(name, one.shape, 0, one, shared) for name, one in zip(names, parameters, strict=True)}
    return make_optimizer(OptimizerConfig(type=kind, params=params), groups, pieces)


def stepped(kind: str, value: Any, *grads: Any, **params: Any) -> torch.Tensor:
    """A parameter after one step for each gradient."""
    parameter = nn.Parameter(torch.tensor(value))
    optimizer = make(kind, [{"params": [parameter]}], **params)
    for grad in grads:
        parameter.grad = None if grad is None else torch.tensor(grad)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("kind", "params", "wanted"),
    [
        ("AdamW", {}, torch.optim.AdamW),
        ("adamw", {"adam_w_mode": False}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),
        ("adam", {"adam_w_mode": True, "torch_adam": True, "bias_correction": True}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False, "set_grad_none": True}, torch.optim.Adam),
        ("Adam", {"bias_correction": False}, UncorrectedAdam),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD),
        ("sgd", {}, torch.optim.SGD),
        ("Adagrad", {}, torch.optim.Adagrad),
        ("RMSprop", {}, torch.optim.RMSprop),
        ("rmsprop", {}, torch.optim.RMSprop),
        ("Adafactor", {}, torch.optim.Adafactor),
        ("Lamb", {}, Lamb),
        ("LAMB", {}, Lamb),
        ("lion", {}, Lion),
        ("Muon", {"per_head_muon": False}, Muon),
    ],
)
def test_names(kind: str, params: dict[str, Any], wanted: type) -> None:
    assert type(make(kind, lr=0.1, **params)) is wanted


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("Adam", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": True}),
        ("AdamW", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": True}),
        ("Lion", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}),
        (
            "Lamb",
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_coeff": 10.0, "min_coeff": 0.01},
        ),
        ("Muon", {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}),
        ("Adagrad", {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0}),
    ],
)
def test_deepspeeds_defaults(kind: str, wanted: dict[str, Any]) -> None:
    group = make(kind).param_groups[0]
    assert {key: group[key] for key in wanted} == wanted


def test_params_reach_the_optimizer() -> None:
    group = make("AdamW", lr=0.25, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1, fused=False).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.25, (0.8, 0.95), 1e-6, 0.1)
    assert group["fused"] is False
    assert make("AdamW", foreach=True).param_groups[0]["foreach"] is True


def test_groups_keep_what_they_say_and_take_the_rest_from_the_config() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    made = make("SGD", [{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.5]
    assert made.param_groups[1]["params"][0] is second


def test_adam_is_adamw_and_equals_its_law() -> None:
    # decoupled decay by lr * weight_decay, then a first step of size lr in the direction of the sign
    found = stepped("Adam", [2.0], [3.0], lr=0.1, weight_decay=0.5)
    assert found.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)


@pytest.mark.parametrize(
    ("adam_w_mode", "wanted"),
    # the first moments are 0.1 and 0.001 of the gradient and its square, and stay so
    [
        (True, 2 * (1 - 0.01 * 0.5) - 0.01 * 0.3 / (math.sqrt(0.009) + 1e-8)),
        (False, 2 - 0.01 * 0.4 / (math.sqrt(0.016) + 1e-8)),
    ],
)
def test_adam_without_bias_correction(adam_w_mode: bool, wanted: float) -> None:
    params = {"lr": 0.01, "weight_decay": 0.5, "bias_correction": False, "adam_w_mode": adam_w_mode}
    assert stepped("Adam", [2.0], [3.0], **params).item() == pytest.approx(wanted)


def test_lion_by_hand() -> None:
    found = stepped("Lion", [1.0, 1.0, 1.0], [3.0, -1.0, 0.0], [-1.0, -1.0, 0.0], lr=0.1, betas=[0.5, 0.75])
    # first the sign of half the gradient; then of half of (momentum: a quarter of it) and half of the second one
    assert found.tolist() == pytest.approx([1 - 0.1 + 0.1, 1 + 0.1 + 0.1, 1.0])
    assert stepped("Lion", [2.0], [3.0], lr=0.1, weight_decay=0.5).item() == pytest.approx(2 * (1 - 0.05) - 0.1)


def test_lamb_by_hand() -> None:
    # one step: m = 0.1 g, v = 0.001 g^2, u = m / (sqrt v + eps) = sqrt 10 sign(g); |p| = 5, |u| = sqrt 20
    unit = math.sqrt(10)
    step_size = 0.01 * math.sqrt(1 - 0.999) / (1 - 0.9)
    ratio = 5 / math.sqrt(20)
    wanted = [3 - step_size * ratio * unit, 4 + step_size * ratio * unit]
    assert stepped("Lamb", [3.0, 4.0], [2.0, -1.0], lr=0.01).tolist() == pytest.approx(wanted)
    uncorrected = [3 - 0.01 * ratio * unit, 4 + 0.01 * ratio * unit]
    assert stepped("Lamb", [3.0, 4.0], [2.0, -1.0], lr=0.01, bias_correction=False).tolist() == pytest.approx(
        uncorrected
    )
    inside = 0.2 / math.sqrt(0.004 + 1.0)  # of a parameter of one element the ratio undoes the update's size
    found = stepped("Lamb", [3.0], [2.0], lr=0.01, bias_correction=False, eps=1.0, eps_inside_sqrt=True, max_coeff=2.0)
    assert found.item() == pytest.approx(3 - 0.01 * 2.0 * inside)


def test_lambs_ratio_has_limits_and_is_1_for_zeros() -> None:
    unit, params = math.sqrt(10), {"lr": 0.01, "bias_correction": False}
    assert stepped("Lamb", [1000.0], [1.0], **params).item() == pytest.approx(1000 - 0.01 * 10.0 * unit)
    assert stepped("Lamb", [1e-3], [1.0], **params).item() == pytest.approx(1e-3 - 0.01 * 0.01 * unit)
    assert stepped("Lamb", [0.0], [1.0], **params).item() == pytest.approx(-0.01 * unit)
    assert stepped("Lamb", [5.0], [0.0], **params).item() == 5.0


def drawn_gradients(steps: int, size: int) -> list[list[float]]:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(4)).tolist()


def test_lion_over_steps_is_the_papers() -> None:
    lr, decay, beta1, beta2 = 0.1, 0.2, 0.8, 0.6
    wanted, momentum = [1.0, -2.0, 0.5], [0.0] * 3
    steps = drawn_gradients(6, 3)
    for grads in steps:
        for i, grad in enumerate(grads):
            direction = math.copysign(1, beta1 * momentum[i] + (1 - beta1) * grad)
            wanted[i] -= lr * (direction + decay * wanted[i])
            momentum[i] = beta2 * momentum[i] + (1 - beta2) * grad
    found = stepped("Lion", [1.0, -2.0, 0.5], *steps, lr=lr, weight_decay=decay, betas=[beta1, beta2])
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_lamb_over_steps_is_deepspeeds(bias_correction: bool) -> None:
    lr, decay, beta1, beta2, eps = 0.05, 0.2, 0.8, 0.9, 1e-3
    wanted, first, second = [1.0, -2.0, 0.5], [0.0] * 3, [0.0] * 3
    steps = drawn_gradients(6, 3)
    for step, grads in enumerate(steps, start=1):
        first = [beta1 * m + (1 - beta1) * g for m, g in zip(first, grads, strict=True)]
        second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(second, grads, strict=True)]
        updates = [m / (math.sqrt(v) + eps) + decay * p for m, v, p in zip(first, second, wanted, strict=True)]
        ratio = min(max(math.hypot(*wanted) / math.hypot(*updates), 0.01), 10.0)
        size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) if bias_correction else lr
        wanted = [p - size * ratio * update for p, update in zip(wanted, updates, strict=True)]
    params = {"lr": lr, "weight_decay": decay, "betas": [beta1, beta2], "eps": eps, "bias_correction": bias_correction}
    assert stepped("Lamb", [1.0, -2.0, 0.5], *steps, **params).tolist() == pytest.approx(wanted, rel=1e-5)


def test_adagrad_over_steps_is_the_papers() -> None:
    wanted, squares = [1.0, -2.0, 0.5], [0.0] * 3
    steps = drawn_gradients(6, 3)
    for grads in steps:
        squares = [s + g * g for s, g in zip(squares, grads, strict=True)]
        wanted = [p - 0.1 * g / (math.sqrt(s) + 1e-10) for p, g, s in zip(wanted, grads, squares, strict=True)]
    assert stepped("Adagrad", [1.0, -2.0, 0.5], *steps, lr=0.1).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (3, 4, 6), (4, 3, 2, 2), (9, 1, 2, 2), (1, 7), (7, 1)])
def test_orthogonalised_matrices_have_singular_values_near_one(method: str, shape: tuple[int, ...]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(update, method)
    of_found, of_update = (one.flatten(1) if len(shape) == 4 else one for one in (found, update))
    of_found = of_found / math.sqrt(max(1.0, of_found.size(-2) / of_found.size(-1)))
    values = torch.linalg.svdvals(of_found)
    # these coefficients bring them between 0.68 and 1.14, except for values that were almost 0
    assert values.max() < 1.2
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(of_update, full_matrices=False)
    turned = left.mT @ of_found @ right.mT
    outside = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert outside.abs().max() < 1e-4  # same singular vectors


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 8)])
def test_both_methods_are_the_same_in_fp32(shape: tuple[int, ...]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalised(update, "gram"), orthogonalised(update, "standard"), rtol=0, atol=1e-4)


def test_the_gram_form_survives_half_precision() -> None:
    left, _, right = torch.linalg.svd(
        torch.randn(16, 64, generator=torch.Generator().manual_seed(3)), full_matrices=False
    )
    update = left * torch.logspace(0, -4, 16) @ right  # singular values over four decades
    update /= update.norm()
    # without its restart it is off by 0.3 and more
    assert (newton_schulz._by_gram(update.half()).float() - newton_schulz._by_steps(update)).abs().max() < 0.05


def test_matrices_are_shared_out_by_cost_to_who_has_them() -> None:
    big, small = torch.Size((8, 8)), torch.Size((4, 4))
    first, second = [(0, 64), (64, 0)], [(0, 0), (0, 64)]
    assert shared_out([big, big], [first, second]) == [[0], [1]]
    assert shared_out([big, big], [second, first]) == [[1], [0]]
    # the rank without the big one takes the small ones, whoever has them
    assert shared_out([small, big, small], [[(0, 16), (16, 0)], first, [(0, 16), (16, 0)]]) == [[1], [0, 2]]


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    names = ["embed.weight", "blocks.0.weight", "blocks.0.bias", "LM_Head.weight", "conv.weight"]
    shapes = [(4, 3), (3, 3), (3,), (4, 3), (2, 3, 1, 1)]
    first, second = ([nn.Parameter(torch.ones(shape)) for shape in part] for part in (shapes[:3], shapes[3:]))
    made = make("Muon", [{"params": first}, {"params": second, "lr": 0.5}], names=names, lr=0.1, adam_lr=0.2)
    name_of = dict(zip([*first, *second], names, strict=True))
    halves = [
        (group["use_muon"], group["lr"], [name_of[one] for one in group["params"]]) for group in made.param_groups
    ]
    assert halves == [
        (True, 0.1, ["blocks.0.weight"]),
        (False, 0.2, ["embed.weight", "blocks.0.bias"]),
        (True, 0.5, ["conv.weight"]),
        (False, 0.5, ["LM_Head.weight"]),
    ]


def test_a_group_may_say_that_it_is_muons_or_not() -> None:
    embedding, matrix = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 3))
    groups = [{"params": [embedding], "use_muon": True}, {"params": [matrix], "use_muon": False}]
    made = make("Muon", groups, names=["embed.weight", "blocks.0.weight"])
    assert [group["use_muon"] for group in made.param_groups] == [True, False]


def test_muon_by_hand() -> None:
    # of one element: its singular value goes from 1 through x -> 3.4445 x - 4.775 x^3 + 2.0315 x^5, five times
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.775 * value**3 + 2.0315 * value**5
    found = stepped("Muon", [[2.0]], [[3.0]], lr=0.1, weight_decay=0.5)
    assert found.item() == pytest.approx(2 * (1 - 0.05) - 0.1 * value, rel=1e-5)


def test_muon_goes_on_after_its_state_was_loaded() -> None:
    def run(again: bool) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.arange(6.0).view(2, 3)), nn.Parameter(torch.ones(3))]
        made = make("Muon", [{"params": parameters}], lr=0.1)
        for number in range(4):
            if again and number == 2:
                saved, made = made.state_dict(), make("Muon", [{"params": parameters}], lr=0.7)
                made.load_state_dict(saved)
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, number + 1.0) + parameter.detach().square()
            made.step()
        return parameters

    for one, other in zip(run(again=True), run(again=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adagrad", "SGD", "Lamb", "Lion", "Muon", "RMSprop"])
def test_a_parameter_without_gradient_stays_as_it_is(kind: str) -> None:
    used, unused, also_unused = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    made = make(kind, [{"params": [unused, used]}, {"params": [also_unused]}], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2, 2)
    made.step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert torch.equal(also_unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))
    used.grad = None
    made.step()  # and a step in which none has one


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adagrad", "SGD", "Lamb", "Lion", "Muon", "NAdam", "Rprop", "ASGD"])
def test_state_is_like_its_parameter_or_one_number(kind: str) -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,), ())]
    made = make(kind, [{"params": parameters}], lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    for parameter in parameters:
        for key, value in made.state[parameter].items():
            assert isinstance(value, torch.Tensor), key
            assert value.shape in {parameter.shape, torch.Size()}, key


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    made = make("Lion", [{"params": [parameter]}], lr=0.1)

    def closure() -> float:
        loss = (parameter * 3).sum()
        loss.backward()
        return loss.item()

    assert made.step(closure) == 6.0
    assert parameter.item() == pytest.approx(1.9)


def test_which_optimizers_work_element_by_element() -> None:
    torchs = {
        name for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and elementwise(value)
    }  # fmt: skip
    assert torchs == {
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
    }  # fmt: skip
    assert elementwise(Lion)
    assert elementwise(UncorrectedAdam)
    assert not elementwise(Lamb)
    assert not elementwise(Muon)
    assert not elementwise(type("Mine", (torch.optim.SGD,), {}))


@pytest.mark.parametrize(
    ("kind", "params", "key", "message"),
    [
        ("AdmaW", {}, "optimizer.type", r"optimizer.type 'AdmaW': unknown; did you mean 'AdamW'\?"),
        ("Lamp", {}, "optimizer.type", r"optimizer.type 'Lamp': unknown; did you mean 'Lamb'\?"),
        ("Optimizer", {}, "optimizer.type", "optimizer.type 'Optimizer': unknown; "),
        ("onebitadam", {}, "optimizer.type", "optimizer.type 'onebitadam': unknown; "),
        ("LBFGS", {}, "optimizer.type", "optimizer.type 'LBFGS': refused, because it computes the loss again"),
        ("SparseAdam", {}, "optimizer.type", "optimizer.type 'SparseAdam': refused, because .*; use Adam"),
        ("AdamW", {"lrr": 1}, "optimizer.params.lrr", r"optimizer.params.lrr: unknown to AdamW; did you mean 'lr'\?"),
        ("Lamb", {"max_coef": 1}, "optimizer.params.max_coef", r"unknown to Lamb; did you mean 'max_coeff'\?"),
        ("Lion", {"eps": 1e-8}, "optimizer.params.eps", "unknown to Lion; known: betas, lr, weight_decay"),
        ("Muon", {"piece_of": {}}, "optimizer.params.piece_of", "unknown to Muon; known: .*adam_lr"),
        ("SGD", {"betas": [0.9, 0.99]}, "optimizer.params.betas", "optimizer.params.betas: unknown to SGD; "),
        ("SGD", {"adam_w_mode": True}, "optimizer.params.adam_w_mode", "unknown to SGD; "),
        ("AdamW", {"lr": -1.0}, "optimizer.params.lr", r"optimizer.params.lr -1.0: out of range; .* 0 or more"),
        ("Lamb", {"lr": "0.1"}, "optimizer.params.lr", "optimizer.params.lr '0.1': out of range; it must be a number"),
        ("Lion", {"betas": [0.9]}, "optimizer.params.betas", "it must be two numbers from 0 to below 1"),
        (
            "AdamW",
            {"betas": [0.9, 1.0]},
            "optimizer.params.betas",
            r"optimizer.params.betas \(0.9, 1.0\): out of range",
        ),
        ("Muon", {"betas": 0.9}, "optimizer.params.betas", "optimizer.params.betas 0.9: out of range"),
        ("Muon", {"momentum": 1.5}, "optimizer.params.momentum", "from 0 to below 1"),
        ("Muon", {"muon_lr": -1}, "optimizer.params.lr", "optimizer.params.lr -1: out of range"),
        ("Muon", {"ns_method": "cubic"}, "optimizer.params.ns_method", "'cubic': unknown; use 'gram' or 'standard'"),
        ("Muon", {"per_head_muon": True}, "optimizer.params.per_head_muon", ".*; leave it out"),
        ("RMSprop", {"alpha": -1.0}, "optimizer.params", "optimizer.params: refused by RMSprop: .*-1.0; check them"),
        ("AdamW", {"fused": True, "foreach": True}, "optimizer.params", "optimizer.params: refused by AdamW: "),
        ("Adam", {"max_grad_norm": 1.0}, "optimizer.params.max_grad_norm", "max_grad_norm: .*; use gradient_clipping"),
    ],
)
def test_refusals(kind: str, params: dict[str, Any], key: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(kind, **params)
    assert caught.value.key == key


def test_what_needs_whole_parameters_is_refused_on_ranges() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer.type 'adafactor': it needs whole parameters, .*; use stage 0, or"
    ):
        make("adafactor", shared=False)
