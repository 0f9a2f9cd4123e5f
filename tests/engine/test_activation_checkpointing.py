"""Activation checkpointing: the same numbers, fewer kept tensors, and DeepSpeed's ways to say so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import hpc_ds
from hpc_ds.config.sections import ActivationCheckpointingConfig
from hpc_ds.engine import activation_checkpointing
from hpc_ds.engine.compiling import compile_blocks
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    activation_checkpointing._configured.clear()
    yield
    activation_checkpointing._configured.clear()


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.5)
        self.checkpointed = checkpointed
        self.calls = 0

    def inner(self, x: torch.Tensor, sign: int) -> torch.Tensor:
        self.calls += 1
        return sign * self.drop(self.down(torch.relu(self.up(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (hpc_ds.checkpointing.checkpoint(self.inner, x, -1) if self.checkpointed else self.inner(x, -1))


def gradients(checkpointed: bool, prepare: Callable[[nn.Module], object] = id) -> list[torch.Tensor]:
    """Of three blocks with dropout, from one seed."""
    torch.manual_seed(3)
    model = nn.Sequential(*(Block(checkpointed) for _ in range(3)))
    x = torch.randn(4, 8, requires_grad=True)
    prepare(model)
    torch.manual_seed(4)
    model(x).square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [grad for grad in grads if grad is not None]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("cpu_checkpointing", [None, False, True])
def test_gradients_are_bit_for_bit_those_without_it(cpu_checkpointing: bool | None) -> None:
    if cpu_checkpointing is not None:
        activation_checkpointing.use(ActivationCheckpointingConfig(cpu_checkpointing=cpu_checkpointing))
    wanted = gradients(checkpointed=False)
    assert len(wanted) == 13
    assert equal(gradients(checkpointed=True), wanted)


def test_a_function_runs_again_in_the_backward_and_keeps_only_its_inputs() -> None:
    block, plain = Block(checkpointed=True), Block(checkpointed=False)
    x = torch.randn(4, 8, requires_grad=True)

    def kept(module: nn.Module) -> tuple[list[torch.Size], torch.Tensor]:
        shapes: list[torch.Size] = []
        with saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda tensor: tensor):
            out = module(x)
        return shapes, out

    shapes, out = kept(block)
    assert (4, 32) not in shapes
    assert (4, 32) in kept(plain)[0]
    assert block.calls == 1
    out.sum().backward()
    assert block.calls == 2


def test_inputs_pass_through_save_on_cpu_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = activation_checkpointing.save_on_cpu

    def recorded(pin_memory: bool) -> Any:
        asked.append(pin_memory)
        return real(pin_memory)

    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", recorded)
    gradients(checkpointed=True)
    assert asked == []
    hpc_ds.checkpointing.configure(checkpoint_in_cpu=True)
    gradients(checkpointed=True)
    assert asked == [torch.cuda.is_available()] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_inputs_leave_the_device() -> None:
    held = {}
    for cpu in (False, True):
        activation_checkpointing.use(ActivationCheckpointingConfig(cpu_checkpointing=cpu))
        x = torch.randn(1 << 20, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        y = x * 1.0
        out = activation_checkpointing.checkpoint(torch.sin, y)
        del y
        held[cpu] = torch.cuda.memory_allocated() - before
        out.sum().backward()
        assert torch.allclose(x.grad, x.detach().cos())
    assert held[False] - held[True] == 4 << 20


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, as it traces
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("cpu_checkpointing", [False, True])
def test_it_composes_with_compiled_blocks(backend: str, cpu_checkpointing: bool) -> None:
    torch._dynamo.reset()
    activation_checkpointing.use(ActivationCheckpointingConfig(cpu_checkpointing=cpu_checkpointing))
    wanted = gradients(checkpointed=False)
    found = gradients(checkpointed=True, prepare=lambda model: compile_blocks(model, backend))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, as it traces
def test_it_may_stand_around_a_compiled_block() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = Block(checkpointed=False).eval(), torch.randn(4, 8)
    block(x).sum().backward()
    wanted = block.up.weight.grad
    block.zero_grad()
    compile_blocks([block], "aot_eager")
    hpc_ds.checkpointing.checkpoint(block, x).sum().backward()
    torch.testing.assert_close(block.up.weight.grad, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_configured() -> None:
    assert not hpc_ds.checkpointing.is_configured()
    hpc_ds.checkpointing.reset()
    hpc_ds.checkpointing.configure(None, partition_activations=True, num_checkpoints=4)
    assert hpc_ds.checkpointing.is_configured()
    assert activation_checkpointing._configured == [ActivationCheckpointingConfig()]
    hpc_ds.checkpointing.configure(None, checkpoint_in_cpu=True)
    hpc_ds.checkpointing.reset()
    assert activation_checkpointing._configured == [ActivationCheckpointingConfig(cpu_checkpointing=True)]


@pytest.mark.parametrize(
    ("section", "argument", "wanted"),
    [
        ({"cpu_checkpointing": True, "number_checkpoints": 2}, None, True),
        ({"cpu_checkpointing": True}, False, False),
        ({}, None, False),
    ],
)
def test_it_is_configured_from_a_deepspeed_config(
    section: dict[str, Any], argument: bool | None, wanted: bool, tmp_path: Path
) -> None:
    config = {"train_batch_size": 8, "activation_checkpointing": section}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    for given in (config, file, str(file)):
        hpc_ds.checkpointing.configure(None, given, checkpoint_in_cpu=argument)
        assert activation_checkpointing._configured == [ActivationCheckpointingConfig(cpu_checkpointing=wanted)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mpu_": object()}, "an mpu is for model parallelism, which is not supported; pass None"),
        ({"deepspeed_config": {"activation_checkpointing": True}}, "activation_checkpointing True: not a section"),
        ({"deepspeed_config": {"activation_checkpointing": {"cpu_checkpointing": "yes"}}}, "cpu_checkpointing 'yes'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hpc_ds.checkpointing.configure(**arguments)
