"""Compiling block by block: one compilation for all of them, the same numbers, and what is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import Outcomes, run_cases
from torch import nn
from torch.distributed.fsdp import fully_shard

from hpc_ds.engine.compiling import compile_blocks
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


# torch's own, from looking at the gradient of what it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Graphs:
    """A backend that counts what it is given and runs it as it is."""

    _tags = ()  # as torch's registry puts on a backend

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    torch._dynamo.reset()
    backend = Graphs()
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "counting", backend)
    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "counting", None)
    return backend


def test_blocks_of_a_class_share_one_graph(graphs: Graphs) -> None:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(3, 8, requires_grad=True) * 1.0  # as what comes out of a block, which has a graph behind it
    wanted = model(x)
    names = list(model.state_dict())
    compile_blocks([*model.layers, model.layers[0]], "counting")
    assert graphs.count == 0  # nothing before the first forward
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
    assert graphs.count == 1
    assert list(model.state_dict()) == names
    assert {type(layer) for layer in model.layers} == {Block}


def test_arguments_reach_torch_compile(graphs: Graphs) -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    block = Breaks()
    compile_blocks([block], "counting", {"fullgraph": True})
    with pytest.raises(torch._dynamo.exc.Unsupported):
        block(torch.ones(2))


@pytest.mark.parametrize(
    ("backend", "kwargs", "message"),
    [
        (
            "inducter",
            {},
            r"compile\.backend 'inducter': not a backend of torch\.compile; known: .*\beager\b.*\binductor\b",
        ),
        ("eager", {"fulgraph": True}, r"compile\.kwargs\.fulgraph: not an argument .*; did you mean 'fullgraph'\?"),
        ("eager", {"backend": "eager"}, r"compile\.kwargs\.backend: not an argument of torch\.compile"),
    ],
)
def test_what_torch_would_not_take_is_refused_at_once(backend: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_blocks([Block()], backend, kwargs)


def sharded(rank: int, compile_first: bool) -> list[float]:
    """Largest differences of gradients from those of a plain module, over two backwards."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 8)
    plain = copy.deepcopy(model)
    if compile_first:
        compile_blocks(model.layers, "aot_eager")
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    if not compile_first:
        compile_blocks(model.layers, "aot_eager")
    plain(x).sum().backward()
    differences = []
    for _ in range(2):
        model.zero_grad()
        model(x).sum().backward()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        differences.append(max(float((mine.grad.full_tensor() - other.grad).abs().max()) for mine, other in pairs))
    return differences


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return run_cases(2, {f"{first}": (sharded, (first,)) for first in (True, False)})


@pytest.mark.ranks
@pytest.mark.parametrize("compile_first", [True, False])
def test_it_composes_with_sharding_in_either_order(compile_first: bool, outcomes: Outcomes) -> None:
    for differences in outcomes[f"{compile_first}"]:
        assert max(differences) < 1e-5  # fp32, gradients of order 1
