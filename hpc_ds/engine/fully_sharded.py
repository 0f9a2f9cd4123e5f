"""ZeRO stage 3 on FSDP2. The only file that names FSDP2.

A block's parameters are gathered for its forward, dropped, gathered again for its backward, and its gradients are
reduced and scattered at once. The masters are the fp32 shards themselves, rows of dim 0: this file hands them to the
optimizer as ordinary tensors. FSDP2 takes parameters of one type at a time, with elements and at least one dim: what else
there is stays whole (``scalars.py``), or is gathered by itself (``compute_types.py``).

A model on the meta device, or sharded by zero.Init, is made real block by block, so that no rank ever holds more than one block,
its shards, and what is in no block.

Source: https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hpc_ds.engine.compute_types import compute_dtypes, modules_apart, usual_type
from hpc_ds.engine.deferred import Deferred
from hpc_ds.engine.early import restore
from hpc_ds.engine.exchange import DirectAllGather, DirectReduceScatter, Exchange
from hpc_ds.engine.external import blocks_without_external
from hpc_ds.engine.inner_calls import gather_at_inner_calls
from hpc_ds.engine.leaf_modules import LeafModules
from hpc_ds.engine.piece import Piece, own_range
from hpc_ds.engine.scalars import Scalars
from hpc_ds.engine.sharded_parameter import be_shown, left_whole, shown_whole
from hpc_ds.engine.sharding import (
    Kept,
    Precision,
    Sharding,
    broadcast,
    find_blocks,
    gather_flat,
    master_dtype,
    persistent_buffers,
    stands_alone,
    take_up_written,
    uses_of,
    weakly,
)
from hpc_ds.engine.taken_for_whole import MESH_DIM, be_told, refuse, watch_state_dict
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class Offload:
    """Shards, their gradients and optimizer state in host memory.

    Attributes:
        pin_memory: page-locked, which copies to a device faster; only where there is one.
    """

    pin_memory: bool


class FullySharded(Sharding):
    """A module whose parameters are sharded between uses."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        precision: Precision,
        offload: Offload | None = None,
        block_names: Sequence[str] | None = None,
    ) -> None:
        """Collective. Shard ``module`` in place, from rank 0's values."""
        be_told()
        self.module = module
        self.device = device
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(MESH_DIM,))
        self._exchange = Exchange(device)
        self._precision = precision
        self._offload = CPUOffloadPolicy(pin_memory=offload.pin_memory) if offload else OffloadPolicy()
        self._whole: dict[nn.Parameter, torch.dtype] = {}  # what is not sharded, with its compute type
        self._deferred = Deferred(module, device)
        self._leaves = LeafModules(module)
        for block in (*self._blocks(block_names), module):
            self._deferred.make_real(until=block)
            self._shard(block)
        watch_state_dict(module)
        self._gathered: set[FSDPModule] = set()  # for a script
        gather_at_inner_calls(module, self._sharded_modules(), self._gather_root)
        trainable = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
        self._named = trainable
        self._parameters = [value for _, value in trainable]
        self._hooks: list[RemovableHandle] = []
        self._watched: dict[nn.Parameter, str] = {}  # gathered parameters, whose gradients are counted
        self._arrivals: set[nn.Parameter] = set()  # of this backward pass
        self._scalars = Scalars(self._whole, offload=offload is not None)
        self.pieces = [self._piece(name, value) for name, value in trainable]
        self._index_of = {piece.name: index for index, piece in enumerate(self.pieces)}
        self._complete = False

    def _blocks(self, names: Sequence[str] | None) -> list[nn.Module]:
        """What is gathered by itself: of a leaf module nothing, but all of it."""
        blocks = self._leaves.outside(find_blocks(self.module, names))
        inside = {inner for block in blocks for inner in block.modules()}
        uses = uses_of(self.module)
        alone = [leaf for leaf in self._leaves.modules if leaf not in inside and stands_alone(leaf, uses)]
        blocks += [leaf for leaf in alone if leaf is not self.module]
        return blocks_without_external(blocks)

    def _shard(self, block: nn.Module) -> None:
        """Collective. Bring a block's own tensors to the device with rank 0's values, and keep this rank's shards."""
        restored = restore(block)
        self._deferred.make_real(block)
        _refuse_sparse_gradients(block)
        dtypes = compute_dtypes(block, self._precision)
        tensors = [value for value in dtypes if not isinstance(value, DTensor) and value not in self._whole]
        types = {value: (dtypes[value], master_dtype(value.dtype)) for value in tensors if _can_be_sharded(value)}
        usual = usual_type(types)
        apart = blocks_without_external(self._leaves.outside(modules_apart(self.module, block, types)))
        alone = {value: types[value] for module in apart for value in module.parameters() if value in types}
        self._whole |= {
            value: dtypes[value] for value in tensors if value not in alone and types.get(value, usual) != usual
        }
        self._whole |= {value: dtypes[value] for value in tensors if value not in types}
        self._fill(block, tensors, agreed=restored)
        for module in apart:
            self._fully_shard(module, *next(alone[value] for value in module.parameters() if value in alone))
        compute, master = usual or (torch.float32, torch.float32)
        self._fully_shard(block, self._precision.compute or compute, master)
        for parameter in restored - self._whole.keys():  # a client's optimizer may still hold it
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def _fill(self, block: nn.Module, tensors: Sequence[nn.Parameter], agreed: set[nn.Parameter]) -> None:
        """Collective. Rank 0's values, on the device, parameters in the type of their masters; some are the same everywhere."""
        for parameter in tensors:
            data = parameter.data.to(self.device).contiguous()
            parameter.data = data.to(master_dtype(data.dtype)) if _has_gradients(data) else data
        buffers = [
            (owner, name, value)
            for owner in block.modules()
            for name, value in owner._buffers.items()  # noqa: SLF001 - to replace them in place
            if value is not None
        ]
        for owner, name, value in buffers:
            wanted = self._precision.buffers if value.is_floating_point() else None
            owner._buffers[name] = value.to(self.device, wanted or value.dtype)  # noqa: SLF001 - as above
        differing = [value.data for value in tensors if value not in agreed]
        broadcast(differing + [owner._buffers[name] for owner, name, _ in buffers])  # type: ignore[misc]  # noqa: SLF001

    def _fully_shard(self, module: nn.Module, compute: torch.dtype, master: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=compute,
            reduce_dtype=self._precision.wire or master,
            cast_forward_inputs=self._precision.compute is not None,
        )
        fully_shard(
            module,
            mesh=self._mesh,
            mp_policy=policy,
            reshard_after_forward=True,
            offload_policy=self._offload,
            ignored_params=set(self._whole),
        )
        sharded = cast("FSDPModule", module)
        for held in _held_by(sharded):
            be_shown(held.sharded_param)
        if self._exchange.direct and hasattr(sharded, "set_custom_all_gather"):  # older ones use the backend's
            sharded.set_custom_all_gather(DirectAllGather(self._exchange))  # type: ignore[arg-type] # it has the form
            wire = compute if compute == torch.bfloat16 else None  # exact: they were computed in it
            sharded.set_custom_reduce_scatter(DirectReduceScatter(self._exchange, wire))  # type: ignore[arg-type] # as above

    def _gather_root(self) -> None:
        self._root._get_fsdp_state()._lazy_init()  # noqa: SLF001 - else the first block that is called takes itself for the root
        self._root.unshard()

    # gradients

    def inspect(self) -> None:
        """See ``Sharding``."""
        if not self._hooks:
            for name, parameter in self._gathered_parameters():
                self._hooks.append(parameter.register_hook(partial(self._look_at, name)))

    def _look_at(self, name: str, gradient: torch.Tensor) -> None:
        if self.culprit is None and not bool(gradient.isfinite().all()):
            self.culprit = name

    def _gathered_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What autograd computes gradients of: whole parameters, once a forward has made them, and 0-dim ones."""
        names = {id(value): name for name, value in self._named}
        for module in self._sharded_modules():
            for held in _held_by(module):
                if hasattr(held, "_unsharded_param") and id(held.sharded_param) in names:
                    yield names[id(held.sharded_param)], held.unsharded_param
        for parameter in self._scalars:
            yield names[id(parameter)], parameter

    def watch_output(self, tensor: torch.Tensor) -> None:
        """See ``Sharding``: FSDP2 finds outputs in containers and dataclasses only, not in other objects."""
        tensor.register_hook(self._root._get_fsdp_state()._pre_backward)  # noqa: SLF001 - there is no public way

    def begin_backward(self, *, boundary: bool) -> None:  # noqa: ARG002 - each pass sums
        """See ``Sharding``.

        FSDP2 is not told which pass is the last of a step: after others it would keep the buffers of two blocks, and gather a
        block for nothing in the next.
        """
        self._complete = False
        self._arrivals.clear()
        for name, parameter in self._gathered_parameters():
            if parameter not in self._watched and parameter not in self._scalars:
                self._watched[parameter] = name
                parameter.register_post_accumulate_grad_hook(weakly(self._arrived))

    def _arrived(self, parameter: nn.Parameter) -> None:
        if parameter in self._arrivals:
            raise ConfigError(
                f"gradient of {self._watched[parameter]!r}: it came in parts, in nested backward passes, of which ZeRO stage 3 "
                "would lose some; use torch.utils.checkpoint with use_reentrant=False, or stage 2"
            )
        self._arrivals.add(parameter)

    def end_backward(self) -> None:
        """FSDP2 sums gradients while it goes through the backward pass."""

    def complete_gradients(self) -> None:
        """See ``Sharding``: the gradients of 0-dim parameters are averaged here."""
        self.reshard()
        if not self._complete:
            self._complete = True
            self._scalars.average()

    def used(self) -> list[bool]:
        """See ``Sharding``."""
        found = {piece.name: gradient for piece in self.pieces if (gradient := self.gradient(piece)) is not None}
        of_leaves = {name: gradient for name, gradient in found.items() if name in self._leaves.names}
        used = (found.keys() - of_leaves.keys()) | self._leaves.were_used(of_leaves)
        return [piece.name in used for piece in self.pieces]

    def refuse_different_use(self, users: Sequence[int]) -> None:
        """See ``Sharding``: FSDP2 lays the gradients of a block one behind the other, without those that are not there.

        Raises:
            ConfigError: naming the first parameter that some ranks used and others did not.
        """
        for piece, count in zip(self.pieces, users, strict=True):
            of_leaf = piece.name in self._leaves.names and self.gradient(piece) is not None
            if 0 < count < dist.get_world_size() and not of_leaf:
                raise ConfigError(
                    f"gradient of {piece.name!r}: {count} of {dist.get_world_size()} ranks used this parameter in the step, and "
                    "at ZeRO stage 3 gradients were mixed up; use the same parameters on every rank, say with "
                    "hpc_ds.zero.set_leaf_modules what module chooses between them, or use stage 2"
                )

    def squared_norm(self) -> torch.Tensor:
        """See ``Sharding``."""
        found = [(piece, grad) for piece in self.pieces if (grad := self.gradient(piece)) is not None]
        if not found:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        squares = torch.stack(torch._foreach_norm([grad for _, grad in found])).double().square()  # noqa: SLF001 - torch's documented fast path
        shares = [1 / dist.get_world_size() if piece.shared else 1.0 for piece, _ in found]
        squares *= torch.tensor(shares, dtype=torch.float64, device=squares.device)
        return squares.sum().to(self.device)

    def hand_over(self, used: Sequence[bool], factor: float) -> None:
        """See ``Sharding``."""
        gradients = []
        for piece, use in zip(self.pieces, used, strict=True):
            gradient = self.gradient(piece)
            piece.master.grad = gradient if use else None
            if use and gradient is not None:
                gradients.append(gradient)
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def gradient(self, piece: Piece) -> torch.Tensor | None:
        """See ``Sharding``."""
        parameter = self._parameters[self._index_of[piece.name]]
        if parameter in self._scalars:
            return self._scalars.gradient(parameter)
        return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad

    def drop_gradients(self) -> None:
        """See ``Sharding``."""
        self._recover()
        for module in self._sharded_modules():
            # FSDP2 holds what it has not reduced yet out of sight: on gathered parameters, or in the reduce type.
            for held in _held_by(module):
                held.unsharded_accumulated_grad = None
                if hasattr(held, "_unsharded_param"):
                    held.unsharded_param.grad = None
        self.reshard()
        self.module.zero_grad(set_to_none=True)
        self._scalars.drop()
        self._leaves.forget()
        for piece in self.pieces:
            piece.master.grad = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.culprit = None

    def _recover(self) -> None:
        """Forget a backward pass that an error ended: FSDP2 would take the next one for its end, and reduce nothing."""
        if not self._root._get_fsdp_state()._state_ctx.post_backward_final_callback_queued:  # noqa: SLF001 - as above
            return
        if not hasattr(self._root, "reset_iter_state"):
            raise ConfigError(
                f"backward: an earlier pass ended in an error, which torch {torch.__version__} cannot recover from at ZeRO stage "
                "3; load a checkpoint in a new process, or use torch 2.13 or newer"
            )
        self._root.reset_iter_state()

    # parameters

    def publish(self) -> None:
        """See ``Sharding``: other masters are what is gathered."""
        self._scalars.publish()

    def adopt(self) -> None:
        """See ``Sharding``: what a script writes to a shard is written to its master."""
        self._scalars.adopt()

    def explain(self, error: RuntimeError) -> None:
        """See ``Sharding``."""
        refuse(error)

    def reshard(self) -> None:
        """See ``Sharding``."""
        for module in self._sharded_modules():
            module.reshard()

    def kept(self) -> Iterator[Kept]:
        """See ``Sharding``."""
        self.reshard()
        for name, parameter in self.module.named_parameters():
            if name not in self._index_of:
                piece = self._piece(name, parameter)
                yield Kept(name, piece.shape, piece.start, piece.master.detach(), shared=piece.shared, frozen=True)
        for name, buffer in persistent_buffers(self.module).items():
            yield Kept(name, buffer.shape, 0, buffer, shared=True, frozen=False)

    def whole_value(self, index: int) -> torch.Tensor:
        """See ``Sharding``."""
        piece = self.pieces[index]
        return cast("torch.Tensor", gather_flat(piece, piece.master))

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], writer: int | None) -> Iterator[None]:
        """See ``Sharding``: inside, the module's attributes are the whole parameters."""
        wanted = {id(parameter) for parameter in parameters}
        self.adopt()
        modules = [
            one for one in self._sharded_modules() if any(id(held.sharded_param) in wanted for held in _held_by(one))
        ]
        fresh = [module for module in modules if module not in self._gathered]  # not by a context around this one
        for module in fresh:
            module.reshard()
            module.unshard()
        self._gathered.update(fresh)
        asked = [held for module in modules for held in _held_by(module) if id(held.sharded_param) in wanted]
        try:
            with shown_whole({held.sharded_param: held.unsharded_param for held in asked}), left_whole(modules):
                yield
            if writer is not None:
                self._take_over(asked, writer)
                for parameter in self._scalars:
                    if id(parameter) in wanted:
                        dist.broadcast(parameter.data, src=writer)
                        self._scalars.take_up(parameter)
        finally:
            self._gathered.difference_update(fresh)
            for module in fresh:
                module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Sharding``."""
        with self.gathered(list(self.module.parameters()), None):
            self.leave_whole(whole=True)
            try:
                yield
            finally:
                self.leave_whole(whole=False)

    def leave_whole(self, *, whole: bool) -> None:
        """See ``Sharding``."""
        for module in self._sharded_modules():
            module.set_reshard_after_forward(reshard_after_forward=not whole, recurse=False)

    def _take_over(self, found: Sequence[FSDPParam], writer: int) -> None:
        """Collective. Put what one rank wrote to whole parameters into every rank's shards."""
        for held in found:
            whole = held.unsharded_param.detach().contiguous()
            dist.broadcast(whole, src=writer)
            piece = self._piece("", held.sharded_param)
            own = piece.master.detach()
            take_up_written(own, own_range(whole, piece.start, own))

    def _piece(self, name: str, parameter: nn.Parameter) -> Piece:
        """This rank's rows of a parameter, as torch.chunk cuts them."""
        if not isinstance(parameter, DTensor):
            master = self._scalars.master(parameter) if parameter in self._scalars else parameter
            return Piece(name, parameter.shape, 0, master, shared=True)
        local = parameter.to_local().detach()
        rows = -(-parameter.shape[0] // dist.get_world_size())
        row = parameter.numel() // max(parameter.shape[0], 1)
        start = min(dist.get_rank() * rows * row, parameter.numel())
        return Piece(
            name, parameter.shape, start, nn.Parameter(local, requires_grad=parameter.requires_grad), shared=False
        )

    @property
    def _root(self) -> FSDPModule:
        return cast("FSDPModule", self.module)

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self.module.modules() if isinstance(module, FSDPModule)]


def _has_gradients(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _can_be_sharded(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 0 and parameter.numel() > 0 and _has_gradients(parameter)


def _refuse_sparse_gradients(module: nn.Module) -> None:
    """Let embeddings make dense gradients: FSDP2 cannot sum sparse ones, and the sum would be dense."""
    for layer in module.modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            layer.sparse = False


def _held_by(module: FSDPModule) -> list[FSDPParam]:
    """FSDP2's own records of the parameters that a module gathers."""
    group = module._get_fsdp_state()._fsdp_param_group  # noqa: SLF001 - there is no public way
    return group.fsdp_params if group is not None else []
