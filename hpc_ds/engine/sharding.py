"""A ZeRO stage as a mesh shape and two switches on FSDP2. The only file that names FSDP2.

| stage | mesh        | what a rank holds between steps    | reshard after forward | gradients                          |
|-------|-------------|------------------------------------|-----------------------|------------------------------------|
| 0     | (world, 1)  | everything                         | no                    | all-reduce at the boundary         |
| 1     | (world,)    | its shard of all                   | no                    | reduce-scatter at the boundary     |
| 2     | (world,)    | its shard of all                   | no                    | reduce-scatter every micro-batch   |
| 3     | (world,)    | its shard of all                   | yes                   | reduce-scatter every micro-batch   |

Master parameters are the fp32 shards; the optimizer sees only them. A block is a module whose parameters are
gathered and reduced together. FSDP2 refuses 0-dim parameters, so those stay whole on every rank and their gradients
are averaged at the boundary (``Sharded.whole``).

Source: Rajbhandari et al., ZeRO, 2019 (stages); https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Stage:
    """What a ZeRO stage means.

    Attributes:
        shards: each rank keeps 1/world_size of parameters, gradients and optimizer state.
        reshards_after_forward: whole parameters are dropped between forward and backward.
        reduces_every_micro_batch: gradients are sharded at once, not only at the boundary.
    """

    shards: bool
    reshards_after_forward: bool
    reduces_every_micro_batch: bool


STAGES = {
    0: Stage(shards=False, reshards_after_forward=False, reduces_every_micro_batch=False),
    1: Stage(shards=True, reshards_after_forward=False, reduces_every_micro_batch=False),
    2: Stage(shards=True, reshards_after_forward=False, reduces_every_micro_batch=True),
    3: Stage(shards=True, reshards_after_forward=True, reduces_every_micro_batch=True),
}


class Sharded:
    """A module under a ZeRO stage.

    Attributes:
        module: the user's module, sharded in place.
        whole: its 0-dim parameters, which every rank keeps.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        device: torch.device,
        compute_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype,
    ) -> None:
        """Shard ``module`` in place, from rank 0's values. Collective."""
        self.module = module
        self._stage = STAGES[stage]
        module.to(device)
        if compute_dtype is not None:
            _to_master(module)
        _broadcast_from_rank_0(module)
        self.whole = [parameter for parameter in module.parameters() if parameter.dim() == 0]
        world_size = dist.get_world_size()
        if self._stage.shards:
            mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(device.type, (world_size, 1), mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
        for block in (*find_blocks(module), module):
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=self._stage.reshards_after_forward,
                ignored_params=set(self.whole),
            )

    def begin_backward(self, boundary: bool) -> None:
        """Say whether the coming backward pass completes the gradients of a step."""
        root = self.module
        if not isinstance(root, FSDPModule):
            raise TypeError("the module was changed after sharding")
        root.set_requires_gradient_sync(boundary or self._stage.reduces_every_micro_batch)
        root.set_is_last_backward(boundary)
        if not self._stage.reshards_after_forward:
            root.set_reshard_after_backward(boundary)

    def reduce_whole(self) -> None:
        """Average the gradients of 0-dim parameters over all ranks. Collective, where there are any.

        One that no rank used keeps no gradient, as in torch: an optimizer passes it over instead of decaying it.
        """
        if not self.whole:
            return
        used = [float(parameter.grad is not None) for parameter in self.whole]
        gradients = torch.stack([_gradient_or_zero(parameter) for parameter in self.whole])
        flat = torch.cat([gradients, torch.tensor(used, dtype=gradients.dtype, device=gradients.device)])
        dist.all_reduce(flat)
        gradients, by_ranks = flat.split(len(self.whole))
        for parameter, gradient, users in zip(self.whole, gradients, by_ranks.tolist(), strict=True):
            if users:
                parameter.grad = gradient / dist.get_world_size()

    def local_gradients(self) -> list[torch.Tensor]:
        """This rank's gradients, (shard_rows, ...) each, fp32; parameters without one are left out."""
        return [
            gradient.to_local() if isinstance(gradient, DTensor) else gradient
            for parameter in self.module.parameters()
            if (gradient := parameter.grad) is not None
        ]

    def used(self) -> int:
        """Which parameters have gradients, as a number below 2**20 that is the same only where they are the same."""
        return zlib.crc32(bytes(parameter.grad is not None for parameter in self.module.parameters())) % (1 << 20)

    def squared_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of the squared global gradient norm, 0-dim fp64: the parts of all ranks add up to it."""
        device = next(self.module.parameters()).device
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=device)
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()  # noqa: SLF001 - torch's documented fast path
        weights = [
            1.0 if self._stage.shards and gradient.dim() > 0 else 1.0 / dist.get_world_size() for gradient in gradients
        ]
        return (squares * torch.tensor(weights, dtype=torch.float64, device=device)).sum()

    def reshard(self) -> None:
        """Drop whole parameters, so that the module's parameters are the master shards."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def drop_gradients(self) -> None:
        """Forget all gradients, also those of a step that is not complete."""
        for module in self.module.modules():
            # FSDP2 holds what it has not reduced yet out of sight: on gathered parameters, or in the reduce type.
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None  # noqa: SLF001
            for held in group.fsdp_params if group is not None else ():
                held.unsharded_accumulated_grad = None
                if hasattr(held, "_unsharded_param"):
                    held.unsharded_param.grad = None
        self.reshard()
        self.module.zero_grad(set_to_none=True)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: entries of its outermost ModuleLists, where a list has several of one class.

    An entry that shares a parameter with the rest of the model is none: it would be gathered twice.
    """
    uses = Counter(id(parameter) for owner in module.modules() for parameter in owner._parameters.values())  # noqa: SLF001
    blocks = []
    for layers in _outermost_lists(module):
        classes = Counter(type(layer) for layer in layers)
        blocks += [layer for layer in layers if classes[type(layer)] > 1 and _stands_alone(layer, uses)]
    return list(dict.fromkeys(blocks))  # a layer may stand in a list more than once


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _stands_alone(layer: nn.Module, uses: Counter[int]) -> bool:
    if isinstance(layer, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        return False  # a container has no forward for FSDP2 to hook into
    inside = Counter(id(parameter) for owner in layer.modules() for parameter in owner._parameters.values())  # noqa: SLF001
    own = {id(parameter) for parameter in layer.parameters()}
    return any(parameter.dim() > 0 for parameter in layer.parameters()) and all(inside[key] == uses[key] for key in own)


def _to_master(module: nn.Module) -> None:
    """Make the floating-point parameters fp32: the optimizer updates those, compute uses copies."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _broadcast_from_rank_0(module: nn.Module) -> None:
    if dist.get_world_size() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = (
                    tensor.data.contiguous()
                )  # a broadcast into a contiguous copy would leave the tensor as it is
                dist.broadcast(tensor.data, src=0)


def _gradient_or_zero(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
