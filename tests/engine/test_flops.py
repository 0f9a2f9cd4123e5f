"""The flops profiler against FLOPs counted by hand, and what it must not disturb."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from hpc_ds.config.sections import FlopsProfilerConfig
from hpc_ds.engine.activation_checkpointing import checkpoint
from hpc_ds.engine.compiling import compile_blocks
from hpc_ds.engine.flops import FlopsProfiler
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTH, BATCH, LAYERS = 8, 4, 3
OF_A_LAYER = 2 * (2 * BATCH * WIDTH * 2 * WIDTH)  # two products, each of BATCH x WIDTH x 2 WIDTH multiply-accumulates
OF_THE_HEAD = 2 * BATCH * WIDTH
IN_A_LAYER = 2 * WIDTH * 2 * WIDTH + 3 * WIDTH
IN_THE_HEAD = WIDTH + 1


@pytest.fixture(autouse=True)
def _all_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "hpc_ds"):
        yield


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def config(**others: Any) -> FlopsProfilerConfig:
    return FlopsProfilerConfig(enabled=True, **others)


def counted(profiler: FlopsProfiler) -> dict[str, tuple[int, int]]:
    """Name -> FLOPs and parameters."""
    return {module.name: (module.flops, module.parameters) for module in profiler.modules}


WANTED = {
    "": (LAYERS * OF_A_LAYER + OF_THE_HEAD, LAYERS * IN_A_LAYER + IN_THE_HEAD),
    "layers": (LAYERS * OF_A_LAYER, LAYERS * IN_A_LAYER),
    "layers.1": (OF_A_LAYER, IN_A_LAYER),
    "layers.1.up": (OF_A_LAYER // 2, WIDTH * 2 * WIDTH + 2 * WIDTH),
    "head": (OF_THE_HEAD, IN_THE_HEAD),
}


def profile(model: nn.Module, *inputs: torch.Tensor, **others: Any) -> FlopsProfiler:
    profiler = FlopsProfiler(config(**others), model)
    with profiler.around_forward(1):
        model(*inputs)
    return profiler


def test_flops_and_parameters_are_those_counted_by_hand() -> None:
    found = counted(profile(Model(), torch.randn(BATCH, WIDTH)))
    assert {name: found[name] for name in WANTED} == WANTED


def test_attention_is_counted_on_cpu_too() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(2, 3, 16, 8, requires_grad=True)
    assert counted(profile(Attention(), x))[""] == (2 * (2 * 2 * 3 * 16 * 16 * 8), 0)


def test_a_module_called_twice_counts_twice_and_a_tied_parameter_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.first(x)))

    one = 2 * BATCH * WIDTH * WIDTH
    found = counted(profile(Tied(), torch.randn(BATCH, WIDTH)))
    assert found == {"": (3 * one, 64), "first": (2 * one, 64), "second": (one, 64)}


def test_only_the_first_forward_of_its_step_and_only_on_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Model(), torch.randn(BATCH, WIDTH)
    profilers = [FlopsProfiler(config(profile_step=2), model, rank) for rank in (0, 1)]
    profilers.append(FlopsProfiler(FlopsProfilerConfig(profile_step=2), model))
    tellings = []
    for step in (0, 1, 2, 2, 3):
        for profiler in profilers:
            with profiler.around_forward(step):
                model(x)
        tellings.append(len(caplog.messages))
    assert tellings == [0, 0, 1, 1, 1]
    assert caplog.messages[0].startswith(
        "flops profile of Model: one forward of one micro-batch on rank 0, after step 2"
    )
    assert [bool(profiler.modules) for profiler in profilers] == [True, False, False]


def test_what_is_trained_does_not_change_and_no_hook_stays() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(BATCH, WIDTH)
    model(x).sum().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    profiler = FlopsProfiler(config(), model)
    with profiler.around_forward(1):
        loss = model(x).sum()
    loss.backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), wanted, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_checkpointed_block_counts_once_and_runs_again_in_the_backward() -> None:
    class Checkpointed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(BATCH, WIDTH)
    model(x).sum().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    profiler = FlopsProfiler(config(), model)
    with profiler.around_forward(1):
        loss = model(x).sum()
    loss.backward()
    found = counted(profiler)
    assert {name: found[name] for name in WANTED} == WANTED
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), wanted, strict=True))


def test_a_forward_that_fails_leaves_no_hook_and_no_profile(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    profiler = FlopsProfiler(config(), model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), profiler.around_forward(1):
        model(torch.randn(BATCH, WIDTH + 1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (profiler.modules, caplog.messages) == ([], [])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, as it traces
def test_compiled_blocks_are_counted_all_the_same() -> None:
    model, x = Model(), torch.randn(BATCH, WIDTH)
    compile_blocks(model.layers, "eager")
    model(x)
    found = counted(profile(model, x))
    assert {name: found[name] for name in WANTED} == WANTED


def test_the_text(tmp_path: Path) -> None:
    file = tmp_path / "profile.txt"
    profile(Model(), torch.randn(BATCH, WIDTH), output_file=str(file), module_depth=1, recompute_fwd_factor=1.0)
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "flops profile of Model: one forward of one micro-batch on rank 0, after step 1"
    assert lines[1:5] == [
        "  parameters                  849",
        "  forward MACs                3.10 k",
        "  forward FLOPs               6.21 k",
        "  forward and backward FLOPs  24.83 k",
    ]
    assert [line.partition(":")[0] for line in lines if line.startswith("  depth")] == ["  depth 0", "  depth 1"]
    assert "  depth 1: parameters ModuleList 840 | MACs ModuleList 3.07 k | ms " in text
    modules = lines[lines.index("modules:") + 1 :]
    assert [line.partition(":")[0] for line in modules] == ["  Model", "    (layers) ModuleList", "    (head) Linear"]
    assert "840 parameters (98.9 %), 3.07 k MACs (99.0 %), " in modules[1]


def test_without_detail_there_is_no_line_a_module(caplog: pytest.LogCaptureFixture) -> None:
    profile(Model(), torch.randn(BATCH, WIDTH), detailed=False, top_modules=2)
    (text,) = caplog.messages
    assert "modules:\n" not in text
    assert "depth 1: parameters ModuleList 840, Linear 9 | MACs ModuleList 3.07 k, Linear 32 |" in text


def test_a_folder_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"flops_profiler\.output_file '/nowhere/x': its folder does not exist; make it"
    ):
        FlopsProfiler(config(output_file="/nowhere/x"), Model())


def sharded(rank: int) -> dict[str, tuple[int, int]]:
    model = Model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    profiler = FlopsProfiler(config(), model, rank)
    with profiler.around_forward(1):
        loss = model(torch.randn(BATCH, WIDTH)).sum()
    loss.backward()
    return counted(profiler)


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return run_cases(2, {"sharded": (sharded, ())})


@pytest.mark.ranks
def test_sharded_parameters_count_whole(outcomes: Outcomes) -> None:
    on_rank_0, on_rank_1 = outcomes["sharded"]
    assert {name: on_rank_0[name] for name in WANTED} == WANTED
    assert on_rank_1 == {}
