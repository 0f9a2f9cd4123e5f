"""Every optimizer over pieces equals the same one over whole parameters in one process: N ranks, cuts through matrices.

The pieces are those of ZeRO-1: the parameters lie one after another in a flat buffer, which is cut into as many equal parts as
there are ranks. So cuts go through matrices and between them, and most ranks have no element of most parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from torch import nn

from hpc_ds.config.training import OptimizerConfig
from hpc_ds.engine.optimizers import make_optimizer
from hpc_ds.engine.piece import Piece

pytestmark = pytest.mark.ranks

WORLD_SIZES = (1, 2, 4)
STEPS = 5
SHAPES = {
    "embed.weight": (11, 5),
    "blocks.0.up.weight": (7, 5),
    "blocks.0.up.bias": (7,),
    "blocks.0.gain": (),
    "blocks.1.up.weight": (7, 5),
    "blocks.1.unused": (3, 4),
    "conv.weight": (4, 3, 2, 2),
    "experts": (2, 5, 3),
    "square": (6, 6),
    "lm_head.weight": (11, 5),
    "bias": (2,),
}
UNUSED = "blocks.1.unused"  # but in the last step
DOUBLE = {"square", "bias"}  # these are fp64
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1, "fused": False, "foreach": True},
    "Adam, L2": {"weight_decay": 0.1, "adam_w_mode": False},
    "Adam, uncorrected": {"weight_decay": 0.1, "bias_correction": False},
    "Adagrad": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD, foreach": {"momentum": 0.9, "foreach": True},
    "Lion": {"weight_decay": 0.1},
    "Lamb": {"weight_decay": 0.1},
    "Lamb, uncorrected": {"bias_correction": False, "max_coeff": 0.5},
    "Muon": {"weight_decay": 0.1},
    "Muon, standard": {"ns_method": "standard", "adam_lr": 0.01},
    **{kind: {} for kind in ("ASGD", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")},
}


@functools.cache
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: value.double() if name in DOUBLE else value for name, value in drawn.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def ranges(rank: int, world_size: int, shared: bool) -> dict[str, tuple[int, int]]:
    """(start, length) of this rank's piece of each parameter."""
    sizes = {name: value.numel() for name, value in values().items()}
    whole = -(-sum(sizes.values()) // world_size)
    low, high, first = rank * whole, (rank + 1) * whole, 0
    found = {}
    for name, size in sizes.items():
        begin, end = max(low, first), min(high, first + size)
        found[name] = (0, size) if shared or not SHAPES[name] else (max(begin - first, 0), max(end - begin, 0))
        first += size
    return found


def trained(kind: str, rank: int, world_size: int, shared: bool) -> dict[str, Any]:
    """This rank's pieces after the steps: name -> (start, values), and what the state is made of."""
    pieces = {}
    for name, (start, length) in ranges(rank, world_size, shared).items():
        shape = torch.Size(SHAPES[name])
        master = nn.Parameter(values()[name].flatten()[start : start + length].clone())
        if length == shape.numel():
            master = nn.Parameter(master.detach().view(shape))
        pieces[master] = Piece(name, shape, start, master, shared or not shape)
    masters = list(pieces)
    # two groups, which cut the model across, one of them with a rate of its own
    groups = [{"params": masters[::2]}, {"params": masters[1::2], "lr": 0.03}]
    params = {"lr": 0.02, **OPTIMIZERS[kind]}
    optimizer = make_optimizer(OptimizerConfig(type=kind.partition(",")[0], params=params), groups, pieces)
    for step in range(STEPS):
        for master, piece in pieces.items():
            flat = gradients(step)[piece.name].flatten()[piece.start : piece.start + master.numel()]
            unused = piece.name == UNUSED and step < STEPS - 1
            master.grad = None if unused else flat.clone().view_as(master).to(master.dtype)
        optimizer.step()
    assert all(
        value.shape in {master.shape, torch.Size()}
        for master in masters
        for value in optimizer.state[master].values()
        if isinstance(value, torch.Tensor)
    )
    return {piece.name: (piece.start, master.detach().flatten()) for master, piece in pieces.items()}


def on_ranks(rank: int, kind: str, shared: bool) -> dict[str, Any]:
    return trained(kind, rank, dist.get_world_size(), shared)


def together(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    whole = {name: torch.full((value.numel(),), torch.nan, dtype=value.dtype) for name, value in values().items()}
    for of_rank in ranks:
        for name, (start, part) in of_rank.items():
            whole[name][start : start + part.numel()] = part
    return whole


@pytest.fixture(scope="module", params=WORLD_SIZES)
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    cases = {
        f"{kind}, {shared}": (on_ranks, (kind, shared))
        for kind in OPTIMIZERS
        for shared in ((False, True) if kind[:4] in {"Lamb", "Muon"} else (False,))
    }
    return run_cases(request.param, cases)


@functools.cache
def alone(kind: str) -> dict[str, torch.Tensor]:
    """The single process: whole parameters, no communication."""
    return together([trained(kind, 0, 1, shared=True)])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pieces_are_updated_as_the_whole_is(outcomes: Outcomes, kind: str) -> None:
    found = together(outcomes[f"{kind}, False"])
    for name, wanted in alone(kind).items():
        assert distance(found[name], wanted) < 1e-6, name
        moved = distance(wanted, values()[name].flatten())
        assert moved > 1e-5, f"{name} did not move"


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind[:4] in {"Lamb", "Muon"}])
def test_ranks_that_hold_everything_agree_to_the_last_bit(outcomes: Outcomes, kind: str) -> None:
    ranks = outcomes[f"{kind}, True"]
    for name, wanted in alone(kind).items():
        assert distance(ranks[0][name][1], wanted) < 1e-6, name
        assert all(torch.equal(rank[name][1], ranks[0][name][1]) for rank in ranks), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_cuts_are_those_that_this_is_about(world_size: int) -> None:
    by_rank = [ranges(rank, world_size, shared=False) for rank in range(world_size)]
    for name, value in values().items():
        if value.dim():
            assert sum(of_rank[name][1] for of_rank in by_rank) == value.numel()
    cut = [name for name in SHAPES if len(SHAPES[name]) > 1 and sum(of_rank[name][1] > 0 for of_rank in by_rank) > 1]
    assert len(cut) >= world_size - 1
    assert world_size == 1 or any(of_rank["square"][1] == 0 for of_rank in by_rank)
