"""``hpc_ds.zero``: whole parameters, gradients and optimizer state at every stage, read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from small import RATE, STAGES, Small, config, said, samples
from torch import nn

import hpc_ds
from hpc_ds.zero import (
    GatheredParameters,
    ZeroParamStatus,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0.0}}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
}
# Relative error of gradients: fp32's own rounding; 8 bits of mantissa; 11 bits.
NEAR = {"fp32": 1e-6, "bf16": 3e-2, "fp16": 4e-3}


def start(stage: int, precision: str = "fp32", model: nn.Module | None = None, **overrides: Any) -> Any:
    return hpc_ds.initialize(model=model or Small(), config=config(stage, **PRECISIONS[precision], **overrides))[0]


def trained(engine: Any) -> dict[str, nn.Parameter]:
    return dict(engine.module.named_parameters())


def backward(engine: Any, rank: int) -> None:
    engine.backward(engine(samples(rank)).float().square().mean())


def reference() -> Small:
    """A plain model with the mean gradients of both ranks."""
    model = Small()
    for rank in range(WORLD_SIZE):
        (model(samples(rank)).square().mean() / WORLD_SIZE).backward()
    return model


def assert_near(found: torch.Tensor, wanted: torch.Tensor, rtol: float) -> None:
    """Within a bound of the largest element."""
    gap = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert gap <= rtol, gap.item()


def read(rank: int, stage: int, precision: str) -> dict[str, Any]:
    engine = start(stage, precision, **ADAM)
    parameters = trained(engine)
    before = {
        name: (safe_get_full_grad(p), safe_get_full_optimizer_state(p, "exp_avg")) for name, p in parameters.items()
    }
    backward(engine, rank)
    seen = {
        name: {
            "value": safe_get_full_fp32_param(p),
            "gradient": safe_get_full_grad(p),
            "own value": safe_get_local_fp32_param(p),
            "own gradient": safe_get_local_grad(p),
        }
        for name, p in parameters.items()
    }
    engine.step()
    for name, p in parameters.items():
        seen[name]["moment"] = safe_get_full_optimizer_state(p, "exp_avg")
        seen[name]["own moment"] = safe_get_local_optimizer_state(p, "exp_avg")
        seen[name]["later"] = (
            safe_get_full_grad(p),
            safe_get_full_optimizer_state(p, "no such"),
            safe_get_full_optimizer_state(p, "step"),
        )
    return {"seen": seen, "before": before}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_sharded_is_read_whole(pair: Outcomes, precision: str, stage: int) -> None:
    model, near = reference(), NEAR[precision]
    ranks = pair[f"read {precision} {stage}"]
    for name, parameter in model.named_parameters():
        for rank in ranks:
            assert rank["before"][name] == (None, None)
            seen = rank["seen"][name]
            assert seen["value"].shape == parameter.shape
            assert torch.equal(seen["value"], parameter)
            assert_near(seen["gradient"], parameter.grad, near)
            assert_near(seen["moment"], 0.1 * parameter.grad, near)  # after one step of Adam with beta 0.9
            assert {seen[kind].dtype for kind in ("value", "gradient", "moment")} == {torch.float32}
            assert seen["later"] == (None, None, None)  # a count of steps is no state of elements
        for kind in ("value", "gradient", "moment"):
            own = [rank["seen"][name][f"own {kind}"] for rank in ranks]
            whole = ranks[0]["seen"][name][kind].flatten()
            own = [torch.zeros(0) if part is None else part for part in own]
            if stage == 0 or (stage == 3 and parameter.dim() == 0):
                assert all(torch.equal(part, whole) for part in own)
            else:
                assert torch.equal(torch.cat(own), whole)


def written(rank: int, stage: int, precision: str) -> dict[str, Any]:
    """Values of 2, gradients of 3 and moments of 4 for all, by the setters; then a step."""
    engine = start(stage, precision, **ADAM)
    parameters = trained(engine)
    for p in parameters.values():
        safe_set_full_fp32_param(p, torch.full(p.shape, 2.0))
    output = engine(samples())
    backward(engine, rank)
    engine.step()
    for p in parameters.values():
        safe_set_full_fp32_param(p, torch.full(p.shape, 2.0))
        safe_set_full_optimizer_state(p, torch.full(p.shape, 4.0), "exp_avg")
        safe_set_full_optimizer_state(p, torch.full(p.shape, 1.0), "exp_avg_sq")
    backward(engine, rank)
    for p in parameters.values():
        safe_set_full_grad(p, torch.full(p.shape, 3.0))
    gradients = [safe_get_full_grad(p) for p in parameters.values()]
    engine.step()
    wrong = said(lambda: safe_set_full_fp32_param(parameters["gain"], torch.zeros(2)))
    return {
        "output": output.float(),
        "gradients": gradients,
        "moments": [safe_get_full_optimizer_state(p, "exp_avg") for p in parameters.values()],
        "values": [safe_get_full_fp32_param(p) for p in parameters.values()],
        "norm": engine.get_global_grad_norm(),
        "said": wrong,
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_sharded_is_written_whole(pair: Outcomes, precision: str, stage: int) -> None:
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    moment, square = 0.9 * 4 + 0.1 * 3, 0.999 * 1 + 0.001 * 9  # Adam's second step
    value = 2 - 0.1 * (moment / (1 - 0.9**2)) / ((square / (1 - 0.999**2)) ** 0.5 + 1e-8)
    elements = sum(parameter.numel() for parameter in model.parameters())
    for rank in pair[f"written {precision} {stage}"]:
        assert_near(rank["output"], model(samples()), NEAR[precision])
        for gradient in rank["gradients"]:
            assert_near(gradient, torch.full_like(gradient, 3.0), 1e-6)
        for found in rank["moments"]:
            assert_near(found, torch.full_like(found, moment), 1e-6)
        for found in rank["values"]:
            assert_near(found, torch.full_like(found, value), 1e-6)
        assert rank["norm"] == pytest.approx(3 * elements**0.5, rel=1e-6)
        assert rank["said"].startswith("ConfigError: value of shape (2,): 'gain' has shape (); give the whole value")


def written_locally(rank: int, stage: int, precision: str) -> dict[str, Any]:
    """Every rank doubles what it has; where all have all, they write the same."""
    engine = start(stage, precision, **ADAM)
    parameters = trained(engine)
    backward(engine, rank)
    engine.step()
    backward(engine, rank)
    before, after = [], []
    for p in parameters.values():
        before.append((safe_get_full_fp32_param(p), safe_get_full_grad(p), safe_get_full_optimizer_state(p, "exp_avg")))
        safe_set_local_fp32_param(p, 2 * safe_get_local_fp32_param(p))
        own = safe_get_local_grad(p)
        safe_set_local_grad(p, torch.zeros(0) if own is None else 2 * own)
        safe_set_local_optimizer_state(p, 2 * safe_get_local_optimizer_state(p, "exp_avg"), "exp_avg")
        after.append((safe_get_full_fp32_param(p), safe_get_full_grad(p), safe_get_full_optimizer_state(p, "exp_avg")))
    wrong = said(lambda: safe_set_local_fp32_param(parameters["gain"], torch.zeros(7)))
    return {"before": before, "after": after, "said": wrong}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rank_writes_its_own_range(pair: Outcomes, precision: str, stage: int) -> None:
    for rank in pair[f"written_locally {precision} {stage}"]:
        for before, after in zip(rank["before"], rank["after"], strict=True):
            for one, other in zip(before, after, strict=True):
                assert torch.equal(2 * one, other)
        assert rank["said"].startswith("ConfigError: value of 7 elements: this rank has ")


def accumulating(rank: int, stage: int) -> list[torch.Tensor | None]:
    """Gradients are there at the boundary alone, by engine.backward and plainly."""
    seen: list[torch.Tensor | None] = []
    for plainly in (False, True):
        engine = start(stage, gradient_accumulation_steps=2)
        for _ in range(2):
            loss = engine(samples(rank)).square().mean()
            loss.backward() if plainly else engine.backward(loss)
            seen.append(safe_get_full_grad(engine.module.up.weight))
            engine.step()
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_is_whole_at_the_boundary(pair: Outcomes, stage: int) -> None:
    wanted = reference().up.weight.grad
    for first, second, third, fourth in pair[f"accumulating {stage}"]:
        assert first is third is None
        assert_near(second, wanted, 1e-6)
        assert_near(fourth, wanted, 1e-6)


def held(rank: int) -> dict[str, Any]:
    """What a script holds before it gathers, as the ones that save adapters and those that move averages do."""
    engine = start(3)
    backward(engine, rank)
    engine.step()
    masters = {name: safe_get_full_fp32_param(value) for name, value in trained(engine).items()}
    of_ranks = [value for value in trained(engine).values() if hasattr(value, "ds_id")]
    seen = {}
    for name, value in trained(engine).items():
        with GatheredParameters([value]), GatheredParameters(value):
            pass
        with GatheredParameters([value]):
            with GatheredParameters(value):
                seen[name] = value.data.detach().cpu().clone(), value.norm()
            assert torch.equal(value.data, masters[name])
    before = {value.ds_status for value in of_ranks}
    weight = engine.module.up.weight
    with GatheredParameters(of_ranks, modifier_rank=1):
        during = {value.ds_status for value in of_ranks}
        if rank == 1:
            nn.init.constant_(weight, 3.0)
            weight.data[0, 0] = 1.0
    return {
        "masters": masters, "seen": seen, "status": (before, during), "written": safe_get_full_fp32_param(weight),
        "shown": (weight.ds_shape, weight.ds_numel, weight.ds_tensor.numel(), len({value.ds_id for value in of_ranks})),
    }  # fmt: skip


def test_a_parameter_that_a_script_holds_is_whole_where_it_is_gathered(pair: Outcomes) -> None:
    written = torch.full((5, 3), 3.0)
    written[0, 0] = 1.0
    for number, rank in enumerate(pair["held"]):
        for name, (value, norm) in rank["seen"].items():
            assert type(value) is torch.Tensor
            assert torch.equal(value, rank["masters"][name])
            assert norm == rank["masters"][name].norm()
        assert rank["status"] == ({ZeroParamStatus.NOT_AVAILABLE}, {ZeroParamStatus.AVAILABLE})
        assert torch.equal(rank["written"], written)
        assert rank["shown"] == ((5, 3), 15, (9, 6)[number], 4)


class Experts(nn.Module):
    """Each rank uses a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(WORLD_SIZE + 1))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.experts[expert](x).sum()


def apart(rank: int, stage: int) -> dict[str, Any]:
    """What only some ranks used is asked for by all; the bias is set before the step."""
    engine = start(stage, model=Experts())
    engine.backward(engine(torch.ones(2, 3), rank))
    weights = [expert.weight for expert in engine.module.experts]
    if stage == 3:
        return {"said": said(lambda: safe_get_full_grad(weights[0]))}
    found = [safe_get_full_grad(weight) for weight in weights]
    safe_set_full_grad(weights[0], torch.full((1, 3), 7.0))
    return {"found": found, "set": safe_get_full_grad(weights[0])}


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_of_some_ranks_is_everybodys(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"apart {stage}"]:
        if stage == 3:
            assert rank["said"].startswith(
                "ConfigError: gradient of 'experts.0.weight': 1 of 2 ranks used this parameter"
            )
            continue
        for found in rank["found"][:WORLD_SIZE]:
            assert torch.equal(found, torch.full((1, 3), 2.0 / WORLD_SIZE))
        assert rank["found"][WORLD_SIZE] is None
        assert torch.equal(rank["set"], torch.full((1, 3), 7.0))


def between(rank: int, stage: int) -> list[torch.Tensor]:
    """The gradient after each of two passes of one micro-batch."""
    engine = start(stage)
    output, seen = engine(samples(rank)), []
    for loss in (output.square().mean(), output.mean()):
        engine.backward(loss, retain_graph=True)
        seen += [safe_get_full_grad(engine.module.up.weight), safe_get_full_grad(engine.module.gain)]
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_may_be_read_between_two_passes(pair: Outcomes, stage: int) -> None:
    first, both = reference(), reference()
    for rank in range(WORLD_SIZE):
        (both(samples(rank)).mean() / WORLD_SIZE).backward()
    wanted = [parameter.grad for model in (first, both) for parameter in (model.up.weight, model.gain)]
    for seen in pair[f"between {stage}"]:
        for found, gradient in zip(seen, wanted, strict=True):
            assert_near(found, gradient, 2e-6)


class Partly(nn.Module):
    """A frozen, an unused and a used layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.used = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(self.frozen(x)).square().mean()


def partly(rank: int, stage: int) -> dict[str, Any]:
    engine = start(stage, model=Partly(), **ADAM)
    engine.backward(engine(samples(rank)))
    frozen, unused = engine.module.frozen.weight, engine.module.unused.weight
    seen = {
        "frozen": (safe_get_full_fp32_param(frozen), safe_get_full_grad(frozen)),
        "unused": safe_get_full_grad(unused),
    }
    safe_set_full_fp32_param(frozen, torch.zeros(3, 3))  # nothing, as in DeepSpeed
    engine.step()
    return {
        **seen,
        "state": (safe_get_full_optimizer_state(frozen, "exp_avg"), safe_get_full_optimizer_state(unused, "exp_avg")),
        "foreign": said(lambda: safe_get_full_fp32_param(nn.Parameter(torch.ones(2)))),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_there_is_none(pair: Outcomes, stage: int) -> None:
    for rank in pair[f"partly {stage}"]:
        assert rank["frozen"] == (None, None)
        assert rank["unused"] is None
        assert rank["state"] == (None, None)
        assert rank["foreign"].startswith("ConfigError: parameter: it belongs to no engine; ")


# GatheredParameters


def gathered(rank: int, stage: int, precision: str) -> dict[str, Any]:
    engine = start(stage, precision)
    module, seen = engine.module, {}
    with GatheredParameters(list(module.parameters())), torch.no_grad():
        seen["inside"] = {name: value.float().clone() for name, value in module.named_parameters()}
        seen["plain"] = (module.up.weight + torch.ones(5, 3, dtype=module.up.weight.dtype)).shape
        seen["by hand"] = module(samples().to(module.up.weight.dtype)).float()
    with GatheredParameters(module.up.weight), torch.no_grad():  # one, not a list
        seen["one"] = float(module.up.weight[0, 0])
    with GatheredParameters([nn.Parameter(torch.ones(1))]):  # of no engine
        pass
    with GatheredParameters(module.up.weight, enabled=False):
        pass
    seen["after"] = engine(samples()).float()
    return seen


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_inside_the_module_has_whole_parameters(pair: Outcomes, precision: str, stage: int) -> None:
    model, near = Small(), NEAR[precision]
    for rank in pair[f"gathered {precision} {stage}"]:
        for name, parameter in model.named_parameters():
            assert rank["inside"][name].shape == parameter.shape
            assert_near(rank["inside"][name], parameter, near)
        assert rank["plain"] == (5, 3)
        assert rank["one"] == pytest.approx(model.up.weight[0, 0].item(), rel=near)
        assert_near(rank["by hand"], model(samples()), near)
        assert_near(rank["after"], model(samples()), near)


def modified(rank: int, stage: int, precision: str) -> dict[str, Any]:
    """Rank 1 alone writes one row, one 0-dim parameter and a frozen one."""
    model = Small()
    model.down.bias.requires_grad_(requires_grad=False)
    engine = start(stage, precision, model=model)
    module = engine.module
    # Digits that the compute type has not: what was not written keeps them.
    exact = torch.full((5, 3), 1.0) + 2.0**-20
    safe_set_full_fp32_param(module.up.weight, exact)
    wanted = [module.up.weight, module.gain, module.down.bias]
    with GatheredParameters(wanted, modifier_rank=1), torch.no_grad():
        if rank == 1:
            module.up.weight[2] = 7.0
            module.gain.fill_(3.0)
            module.down.bias.fill_(5.0)
    state = engine.module_state_dict()
    output = engine(samples()).float()
    backward(engine, rank)
    engine.step()
    return {"state": state, "output": output, "finite": engine.get_global_grad_norm()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_one_rank_writes_is_everybodys(pair: Outcomes, precision: str, stage: int) -> None:
    first, second = pair[f"modified {precision} {stage}"]
    state = first["state"]
    rows = torch.full((5, 3), 1.0) + 2.0**-20
    rows[2] = 7.0
    assert torch.equal(state["up.weight"], rows)
    assert state["gain"] == 3.0
    assert torch.equal(state["down.bias"].float(), torch.full((2,), 5.0))
    model = Small()
    model.load_state_dict({name: value.float() for name, value in state.items()})
    for rank in (first, second):
        assert_near(rank["output"], model(samples()), NEAR[precision])
        assert rank["finite"] > 0


def two_owners(rank: int, stage: int) -> list[torch.Tensor]:
    """A model that follows another one, as trl's reference models do: rank 0 writes to its parameters."""
    first, second = start(stage), start(stage)
    both = [first.module.up.weight, second.module.up.weight]
    safe_set_full_fp32_param(both[0], torch.full((5, 3), 3.0))
    with GatheredParameters(both, modifier_rank=0):
        if rank == 0:
            both[1].data.copy_(both[0].data)
    return [safe_get_full_fp32_param(parameter) for parameter in both]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_of_several_engines_are_whole_together(pair: Outcomes, stage: int) -> None:
    for values in pair[f"two_owners {stage}"]:
        for value in values:
            assert torch.equal(value, torch.full((5, 3), 3.0))


def generated(rank: int) -> dict[str, Any]:
    """What trl does so that ranks may call the model as often as each likes, and a step after it."""
    engine = start(3)
    hooks = engine.optimizer.parameter_offload
    outputs = []
    with GatheredParameters(engine.parameters()):
        assert not list(hooks.module.named_parameters(recurse=True))
        assert not hooks.module.ds_external_parameters()
        for hook in hooks.forward_hooks + hooks.backward_hooks:
            hook.remove()
        hooks.forward_hooks, hooks.backward_hooks = [], []
        with torch.no_grad():
            outputs += [engine.module(samples()) for _ in range(1 + 3 * rank)]
        hooks._register_deepspeed_module(hooks.module)
    engine.backward(engine(samples(rank)).square().mean())
    engine.step()
    return {
        "outputs": outputs,
        "hooks": len(hooks.forward_hooks),
        "sharded": engine.module.up.weight.to_local().shape[0],
        "trained": safe_get_full_fp32_param(engine.module.up.weight),
        "others": [hasattr(start(stage).optimizer, "parameter_offload") for stage in (0, 1, 2)],
    }


def test_ranks_may_call_the_model_as_often_as_trl_lets_them(pair: Outcomes) -> None:
    model = Small()
    wanted = model(samples()).detach()
    sum(model(samples(rank)).square().mean() / 2 for rank in range(2)).backward()
    trained = model.up.weight.detach() - RATE * model.up.weight.grad
    for number, rank in enumerate(pair["generated"]):
        assert len(rank["outputs"]) == 1 + 3 * number
        for output in rank["outputs"]:
            torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(rank["trained"], trained)
        assert (rank["hooks"], rank["sharded"], rank["others"]) == (1, (3, 2)[number], [False] * 3)


def broken_inside(rank: int, stage: int) -> float:
    """An error inside leaves the engine as it was."""
    engine = start(stage)
    try:
        with GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            {}["the script's own"]
    except KeyError:
        return (engine(samples()) - Small()(samples())).abs().max().item()
    return 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_inside_changes_nothing(pair: Outcomes, stage: int) -> None:
    assert max(pair[f"broken_inside {stage}"]) < 1e-6


# what a script writes by itself


def in_place(rank: int, stage: int, precision: str) -> dict[str, Any]:
    """Every rank writes the same to the module's parameters, between steps; below stage 3 they are ordinary tensors."""
    engine = start(stage, precision)
    exact = torch.full((5, 3), 1.0) + 2.0**-20
    safe_set_full_fp32_param(engine.module.up.weight, exact)
    with torch.no_grad():
        engine.module.up.weight[1] = 2.0
        engine.module.gain.mul_(0)
        nn.init.constant_(engine.module.down.bias, 4.0)
    backward(engine, rank)
    engine.step()
    return {name: safe_get_full_fp32_param(p) for name, p in trained(engine).items()}


@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_script_writes_in_place_is_taken_up(pair: Outcomes, precision: str, stage: int) -> None:
    rows = torch.full((5, 3), 1.0) + 2.0**-20
    rows[1] = 2.0
    for rank in pair[f"in_place {precision} {stage}"]:
        # gain was 0 in the step, so nothing below it had a gradient
        assert torch.equal(rank["up.weight"], rows)
        assert rank["gain"] != 0
        assert_near(rank["down.bias"], torch.full((2,), 4.0), 1e-6)


def unseen(rank: int, stage: int, precision: str) -> float:
    engine = start(stage, precision)
    engine.module.gain.data.fill_(7.0)
    engine.backward(engine(samples()).float().sum() * 0)
    engine.step()
    return float(engine.module.gain)


@pytest.mark.parametrize("stage", STAGES[:3])
def test_what_is_written_through_data_leaves_no_trace_in_lower_precision(pair: Outcomes, stage: int) -> None:
    """A limit that docs/training.md tells."""
    assert pair[f"unseen fp32 {stage}"] == [7.0] * 2
    assert pair[f"unseen bf16 {stage}"] == [Small().gain.item()] * 2


def replaced(rank: int, stage: int, precision: str, how: str) -> list[str]:
    """The module's storage is replaced after initialize; seen in the forward, or else in the step."""
    engine = start(stage, precision)
    if how == "double":

        def convert() -> None:
            engine.module.to(torch.float64)
    else:

        def convert() -> None:
            engine.module.up.weight.data = engine.module.up.weight.data.clone()

    def train() -> None:
        convert()
        backward(engine, rank)
        engine.step()

    return [said(train)]


@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["double", "data"])
def test_a_module_whose_storage_was_replaced_is_told_so(pair: Outcomes, how: str, precision: str, stage: int) -> None:
    for (words,) in pair[f"replaced {precision} {stage} {how}"]:
        first = "gain" if how == "double" else "up.weight"
        assert words == (
            f"ConfigError: parameter {first!r}: its storage was replaced after initialize; move and convert the module before, "
            "and write values with copy_()"
        )


def thawed(rank: int, stage: int) -> str:
    model = Small()
    model.up.requires_grad_(requires_grad=False)
    engine = start(stage, model=model)
    model.up.requires_grad_(requires_grad=True)

    def train() -> None:
        backward(engine, rank)
        engine.step()

    return said(train)


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_parameter_that_is_trained_later_is_told_so(pair: Outcomes, stage: int) -> None:
    for words in pair[f"thawed {stage}"]:
        assert words.startswith(
            "ConfigError: parameter: one that was frozen at initialize needs a gradient now; set requires"
        )


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    cases: dict[str, Any] = {"generated": (generated, ()), "held": (held, ())}
    cases |= {f"two_owners {stage}": (two_owners, (stage,)) for stage in STAGES}
    in_all: list[Callable[..., Any]] = [read, written, written_locally, gathered, modified]
    for stage in STAGES:
        for precision in PRECISIONS:
            for function in in_all:
                cases[f"{function.__name__} {precision} {stage}"] = (function, (stage, precision))
        for function in (accumulating, apart, between, partly, broken_inside):
            cases[f"{function.__name__} {stage}"] = (function, (stage,))
    for stage in STAGES[:3]:
        cases[f"thawed {stage}"] = (thawed, (stage,))
        for precision in PRECISIONS:
            cases[f"in_place {precision} {stage}"] = (in_place, (stage, precision))
            cases[f"unseen {precision} {stage}"] = (unseen, (stage, precision))
            for how in ("double", "data"):
                cases[f"replaced {precision} {stage} {how}"] = (replaced, (stage, precision, how))
    return run_cases(WORLD_SIZE, cases, worlds=2)
