"""What a user is told who uses an engine in a way that cannot work."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import COLLECTIVE_TIMEOUT, Outcomes, run_cases
from small import STAGES, Small, config, said, samples
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import hpc_ds
from hpc_ds.engine import taken_for_whole
from hpc_ds.runtime import roll_call
from hpc_ds.zero import GatheredParameters, safe_get_full_fp32_param, safe_get_full_grad

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ranks


def start(stage: int, model: nn.Module | None = None, **overrides: Any) -> Any:
    return hpc_ds.initialize(model=model or Small(), config=config(stage, **overrides))[0]


# collective methods on one rank


def gather_one(engine: Any) -> None:
    with GatheredParameters(engine.module.gain):
        raise AssertionError("unreachable")


COLLECTIVE: dict[str, Callable[[Any], Any]] = {
    "save_checkpoint": lambda engine: engine.save_checkpoint("nowhere"),
    "load_checkpoint": lambda engine: engine.load_checkpoint("nowhere"),
    "module_state_dict": lambda engine: engine.module_state_dict(),
    "save_16bit_model": lambda engine: engine.save_16bit_model("nowhere"),
    "load_module_state_dict": lambda engine: engine.load_module_state_dict(Small().state_dict()),
    "GatheredParameters": gather_one,
    "safe_get_full_fp32_param": lambda engine: safe_get_full_fp32_param(engine.module.gain),
    "safe_get_full_grad": lambda engine: safe_get_full_grad(engine.module.gain),
}


def alone(rank: int, stage: int) -> dict[str, str]:
    """Rank 0 alone calls each of them, with a short timeout of the process group."""
    engine = start(stage)
    engine.backward(engine(samples()).mean())
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    try:
        if rank == 0:
            return {name: said(lambda call=call: call(engine)) for name, call in COLLECTIVE.items()}
        for _ in COLLECTIVE:
            next(roll_call._calls)  # so that the calls after these are everybody's again
        return {}
    finally:
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_collective_method_on_one_rank_names_the_absent(pair: Outcomes, stage: int) -> None:
    first, _ = pair[f"alone {stage}"]
    for name, words in first.items():
        called = "module_state_dict" if name == "save_16bit_model" else name
        assert words == (
            f"RankError: {called}: rank 1 did not call it within 1 s; it is collective: call it on every rank, never under "
            "`if rank == 0`"
        )
    assert not Path("nowhere").exists()


def different_calls(rank: int) -> str:
    engine = start(0)
    return said(lambda: engine.module_state_dict() if rank == 0 else safe_get_full_fp32_param(engine.module.gain))


def test_ranks_that_call_different_methods_are_told_so(pair: Outcomes) -> None:
    first, second = pair["different_calls"]
    assert (
        first
        == "RankError: module_state_dict: rank 1 called safe_get_full_fp32_param instead; call the same on every rank"
    )
    assert (
        second
        == "RankError: safe_get_full_fp32_param: rank 0 called module_state_dict instead; call the same on every rank"
    )


# losses


def losses(rank: int, stage: int) -> dict[str, str]:
    engine = start(stage)
    with torch.no_grad():
        without = engine(samples()).mean()
    wrong = {
        "vector": engine(samples()),
        "number": 1.5,
        "none": None,
        "tuple": (engine(samples()).mean(), 1),
        "no grad": without,
        "detached": engine(samples()).mean().detach(),
    }
    words = {name: said(lambda loss=loss: engine.backward(loss)) for name, loss in wrong.items()}
    engine.backward(engine(samples()).mean(dim=(0, 1), keepdim=True))  # one element is a scalar
    engine.step()
    return words | {"after": str(engine.global_steps)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_none_is_refused(pair: Outcomes, stage: int) -> None:
    for words in pair[f"losses {stage}"]:
        assert words["vector"] == (
            "ConfigError: loss of shape (2, 2): not a scalar; reduce it, for example with .mean()"
        )
        for name, kind in (("number", "float"), ("none", "NoneType"), ("tuple", "tuple")):
            assert words[name] == (
                f"ConfigError: loss of type {kind}: not a tensor; pass what the model computed, as outputs.loss"
            )
        assert words["no grad"] == words["detached"]
        assert words["no grad"].startswith("ConfigError: loss: it has no gradient; compute it from the engine's output")
        assert words["after"] == "1"


# sharded parameters taken for whole ones


TAKEN: dict[str, Callable[[nn.Parameter], Any]] = {
    "sum": lambda p: p.sum().item(),
    "norm": lambda p: float(p.norm()),
    "any": lambda p: bool(p.isnan().any()),
    "element": lambda p: p[0, 0],
    "rows": lambda p: p[:2],
    "mask": lambda p: p[p.detach() > 0],
    "written element": lambda p: p.data.__setitem__((0, 0), 1.0),
    "written rows": lambda p: p.data.__setitem__(slice(0, 2), 1.0),
}
FAILING: dict[str, Callable[[nn.Parameter], Any]] = {
    "add": lambda p: p + torch.ones(5, 3),
    "copy": lambda p: p.data.copy_(torch.ones(5, 3)),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
}


def taken(rank: int) -> dict[str, Any]:
    engine = start(3)
    parameter = engine.module.up.weight
    before = safe_get_full_fp32_param(parameter)
    with torch.no_grad():
        words = {name: said(lambda do=do: do(parameter)) for name, do in TAKEN.items()}
        meant = {}
        for name, do in FAILING.items():
            try:
                do(parameter)
            except RuntimeError as error:
                meant[name] = said(lambda error=error: taken_for_whole.refuse(error))
        # What is right on shards goes on.
        parameter.mul_(2)
        total = parameter.sum().full_tensor().item()
    after = safe_get_full_fp32_param(parameter)
    return {
        "said": words,
        "meant": meant,
        "doubled": torch.equal(after, 2 * before),
        "total": total - after.sum().item(),
        "shape": (tuple(parameter.shape), parameter.numel(), parameter.dtype),
    }


CURE = (
    "at ZeRO stage 3 each rank has a part of it; call hpc_ds.zero.safe_get_full_fp32_param(parameter) on every rank, or"
)


def test_a_sharded_parameter_taken_for_a_whole_one_says_what_to_call(pair: Outcomes) -> None:
    for rank in pair["taken"]:
        for name, words in rank["said"].items():
            if name in {"sum", "norm", "any"}:
                assert words.startswith(
                    f"ConfigError: number from a parameter: it is this rank's part of a sum over the whole: {CURE}"
                ), name
            else:
                assert words.startswith(f"ConfigError: elements of a parameter: {CURE}"), name
        assert list(rank["meant"]) == list(FAILING)
        for words in rank["meant"].values():
            assert words.startswith(f"ConfigError: parameter: its data was used as if it were whole: {CURE}")
        assert rank["doubled"]
        assert abs(rank["total"]) < 1e-5
        assert rank["shape"] == ((5, 3), 15, torch.float32)


class Foreign(nn.Module):
    """Its forward uses the weight of a block outside of that block, where it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](x) @ self.blocks[0].weight


def foreign(rank: int, stage: int) -> str:
    engine = start(stage, Foreign())
    return said(lambda: tuple(engine(samples()).shape))


def test_a_block_used_from_outside_says_what_to_call(pair: Outcomes) -> None:
    for stage in STAGES[:3]:
        assert pair[f"foreign {stage}"] == ["no error, but (2, 3)"] * 2
    for words in pair["foreign 3"]:
        assert words.startswith(f"ConfigError: parameter: its data was used as if it were whole: {CURE}")


def own_tensors(rank: int) -> list[float]:
    """A script's own DTensors, beside an engine at stage 3, mean what they meant."""
    start(3)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("mine",))
    sharded = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.tensor(float(rank + 1)), mesh, [Partial()])
    return [sharded[1].item(), sharded[3:].full_tensor().item(), sharded.sum().full_tensor().item(), partial.item()]


def test_a_scripts_own_tensors_are_left_alone(pair: Outcomes) -> None:
    for rank, numbers in enumerate(pair["own_tensors"]):
        assert numbers[:3] == [1.0, 3.0, 6.0]
        assert numbers[3] == rank + 1  # torch's answer, not ours


def other_errors(rank: int, stage: int) -> str:
    """An error of the module's own goes through as it is."""
    engine = start(stage)
    try:
        engine(torch.ones(2, 4))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_of_the_module_goes_through(pair: Outcomes, stage: int) -> None:
    for words in pair[f"other_errors {stage}"]:
        assert words.startswith("RuntimeError: ")
        assert "shapes cannot be multiplied" in words


@pytest.fixture(scope="module")
def pair() -> Outcomes:
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in (different_calls, taken, own_tensors)}
    for stage in STAGES:
        for function in (losses, foreign, other_errors):
            cases[f"{function.__name__} {stage}"] = (function, (stage,))
    for stage in (1, 3):
        cases[f"alone {stage}"] = (alone, (stage,))
    return run_cases(2, cases, worlds=2)


# in processes of their own


def test_an_uncaught_error_of_that_kind_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    hook = taken_for_whole._Explaining(lambda *arguments: seen.append(arguments))
    meant = RuntimeError("aten.add.Tensor got mixed torch.Tensor and DTensor, need to convert")
    with caplog.at_level(logging.ERROR, "hpc_ds"):
        hook(RuntimeError, meant, None)
        hook(RuntimeError, RuntimeError("shapes cannot be multiplied"), None)
        hook(KeyError, KeyError("mixed torch.Tensor and DTensor"), None)
    assert next(error for _, error, _ in seen) is meant
    assert len(seen) == 3
    assert [record.message for record in caplog.records] == [
        f"parameter: its data may have been used as if it were whole: {taken_for_whole._CURE}"
    ]


SCRIPT = """
import torch, hpc_ds
config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
engine = hpc_ds.initialize(model=torch.nn.Linear(2, 2), config=config)[0]
engine.module.weight + torch.ones(2, 2)
"""


def test_a_script_that_ends_so_has_both_errors_on_the_screen(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    _, trace, after = done.stderr.partition("Traceback (most recent call last):")
    assert "mixed torch.Tensor and DTensor" in trace + after
    assert f"parameter: its data may have been used as if it were whole: {CURE}" in after
