"""The standing model of the engine's laws, and plain training of it in one process, which the engine must equal."""

from __future__ import annotations

import functools
import gc
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import hpc_ds
from hpc_ds.config.sections import OptimizerConfig
from hpc_ds.engine.optimizers import make_optimizer
from hpc_ds.engine.piece import Piece
from hpc_ds.engine.sharding import find_blocks, gather_flat, master_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGES = (0, 1, 2, 3)
SAMPLES = 12  # of a global batch: divides by every world size and accumulation here
STEPS = 4
RATE, DECAY = 1e-2, 0.1
CLIP = 0.05  # below every gradient norm of these runs

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 256.0
# Gradients accumulate in fp32, so that the order of sums is all that stages may differ in.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": LOSS_SCALE}, "data_types": {"grad_accum_dtype": "fp32"}},
}


class Block(nn.Module):
    """A residual layer of odd width with a 0-dim gain."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Standing(nn.Module):
    """All the standing cases at once: next-token prediction over 11 tokens.

    Shapes that no world size divides, tied, frozen, unused, empty and 0-dim parameters, buffers of several types, a
    ModuleList of blocks, activation checkpointing of one of them, and a layer called twice.
    """

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.twice = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(3, 3)
        self.unused_scalar = nn.Parameter(torch.tensor(2.0))
        self.sharpness = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("turned", torch.randn(3, 2).t())  # not contiguous
        self.register_buffer("count", torch.randint(100, (3,)), persistent=False)
        self.register_buffer("mask", torch.rand(5) > 0.5)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (samples, places + 1) tokens -> mean loss
        x = self.tokens(text[:, :-1]) + self.shift * self.mask
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if number == 1 else block(x)
        x = self.frozen(self.twice(torch.tanh(self.twice(x))))
        logits = self.head(x) * self.sharpness
        return functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())


@functools.cache
def batches() -> torch.Tensor:
    """(steps, samples, places) tokens."""
    return torch.randint(11, (STEPS, SAMPLES, 4), generator=torch.Generator().manual_seed(7))


# the engine


def config(stage: int, **overrides: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": DECAY}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        **overrides,
    }


def engine_for(
    stage: int, *, model: nn.Module | None = None, arguments: dict[str, Any] | None = None, **overrides: Any
) -> Any:
    """An engine; unless a model is given, every rank draws other weights and rank 0's must win."""
    model = model if model is not None else Standing(seed=1 + dist.get_rank())
    return hpc_ds.initialize(model=model, config=config(stage, **overrides), **(arguments or {}))[0]


def micro_batches(engine: Any, batch: torch.Tensor) -> list[torch.Tensor]:
    """This rank's micro-batches of a global batch."""
    size, world_size = engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
    return list(batch.split(size))[dist.get_rank() :: world_size]


def advance(engine: Any, batch: torch.Tensor) -> float:
    """One optimizer step; returns this rank's mean loss."""
    losses = []
    for micro_batch in micro_batches(engine, batch):
        loss = engine(micro_batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def values_of(engine: Any) -> dict[str, torch.Tensor]:
    """Collective. All values by name: whole masters, frozen parameters and buffers, on every rank.

    What the module computes with must be the masters in its own type, to the last bit.
    """
    sharding = engine.sharding
    found = {piece.name: sharding.whole_value(index) for index, piece in enumerate(sharding.pieces)}
    for name, parameter in engine.module.named_parameters():
        if name in found and not hasattr(parameter, "full_tensor"):
            assert torch.equal(parameter, found[name].to(parameter.dtype)), f"{name} is not what its master is"
    for kept in sharding.kept():
        whole = gather_flat(kept, kept.tensor)
        assert whole is not None
        found[kept.name] = whole
    if hasattr(engine.module, "count"):
        found["count"] = engine.module.count.clone()
    return found


def live_tensors() -> Iterator[torch.Tensor]:
    """All tensors of this process that have storage, found by the garbage collector."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would ask objects for their class, and some warn
            local = thing._local_tensor if hasattr(thing, "_local_tensor") else thing
            if local.device.type != "meta" and local.layout == torch.strided:
                yield local


def live_bytes() -> int:
    """What they hold, each storage counted once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in live_tensors()}.values())


# the reference


def ours(kind: str, **params: Any) -> Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]:
    """An optimizer that torch does not have, over whole parameters in one process; its law is in test_optimizers.py."""

    def make(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        pieces = {one: Piece(name, one.shape, 0, one, shared=True) for name, one in named.items()}
        return make_optimizer(OptimizerConfig(type=kind, params=params), [{"params": list(pieces)}], pieces)

    return make


def torchs(kind: type[torch.optim.Optimizer], **params: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda named: kind(named.values(), **params)


ADAMW = torchs(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)


class Reference:
    """Plain torch in this process: fp32, or 16-bit compute with fp32 masters, on the micro-batches of all ranks.

    Attributes:
        masters: what the optimizer moves, by name.
    """

    def __init__(
        self,
        optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer] = ADAMW,
        *,
        model: nn.Module | None = None,
        precision: str = "fp32",
        parts: tuple[int, int] = (1, 1),
        loss: Callable[[Any, torch.Tensor], torch.Tensor] = lambda model, batch: model(batch),
    ) -> None:
        """Args: parts: world size and accumulation, which only matter where compute rounds."""
        self.loss = loss
        self.model = model if model is not None else Standing()
        self.dtype = DTYPES[precision]
        self.scale = LOSS_SCALE if precision == "fp16" else 1.0
        self.world_size, self.accumulation = parts
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.masters = {
            name: nn.Parameter(value.detach().to(master_dtype(value.dtype), copy=True))
            for name, value in trained.items()
        }
        self.optimizer = optimizer(self.masters)
        self.losses: list[float] = []
        self.norms: list[float] = []
        if self.dtype is not None:
            for layer in self.model.modules():
                for parameter in layer.parameters(recurse=False):
                    if parameter.is_floating_point() and not isinstance(layer, nn.BatchNorm1d):
                        parameter.data = parameter.data.to(self.dtype)
            for block in (self.model, *find_blocks(self.model)):
                block.register_forward_pre_hook(self._rounded, with_kwargs=True)

    def _rounded(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

        return tree_map_only(torch.Tensor, rounded, (args, kwargs))

    def step(self, batch: torch.Tensor, clip: float = 0.0) -> None:
        losses, totals = [], {}
        for micro_batch in batch.chunk(self.world_size * self.accumulation):
            loss = self.loss(self.model, micro_batch)
            self.model.zero_grad()
            ((loss / self.accumulation).float() * self.scale).backward()
            losses.append(loss.item())
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad.to_dense().to(self.masters[name].dtype)
                    totals[name] = totals[name] + gradient if name in totals else gradient
        self.losses.append(sum(losses) / len(losses))
        for name, master in self.masters.items():
            master.grad = totals[name].to(master.dtype) / self.world_size / self.scale if name in totals else None
        self.norms.append(nn.utils.clip_grad_norm_(self.masters.values(), clip or math.inf).item())
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.masters:
                    parameter.copy_(self.masters[name])

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """As ``values_of`` an engine."""
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers()), **self.masters}
        return {name: value.detach().clone() for name, value in own.items()}


@functools.cache
def reference(clip: float = 0.0) -> Reference:
    """AdamW in fp32 on all batches."""
    made = Reference()
    for batch in batches():
        made.step(batch, clip)
    return made


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor; frozen ones may have been rounded to a smaller type."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, value in one.items():
        wanted = other[name]
        if value.is_floating_point():
            smaller = min(value.dtype, wanted.dtype, key=lambda dtype: dtype.itemsize)
            value, wanted = value.to(smaller).double(), wanted.to(smaller).double()  # noqa: PLW2901
            worst = max(worst, ((value - wanted).norm() / wanted.norm().clamp(min=1e-12)).item())
        else:
            assert torch.equal(value, wanted), name
    return worst
