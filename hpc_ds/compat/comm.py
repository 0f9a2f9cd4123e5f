"""``deepspeed.comm``: torch.distributed, under DeepSpeed's names of functions and parameters.

Every function takes DeepSpeed's ``prof``, ``log_name`` and ``debug`` too and does nothing with them: what is sent is timed by
torch's profiler. Ranks of one process group are all that there is, so what DeepSpeed calls a backend is torch's.

Source: https://deepspeed.readthedocs.io/en/latest/, release 0.19.8
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import init_device_mesh

from hpc_ds.runtime import process_group
from hpc_ds.runtime import rank as who

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ProcessGroup", "ReduceOp"]

log = logging.getLogger("hpc_ds")

_FOR_ITS_LOG = ("prof", "log_name", "debug")


@functools.wraps(process_group.init_distributed)
def init_distributed(*args: Any, **kwargs: Any) -> None:
    """Join the process group, as ``hpc_ds.init_distributed``, and return nothing, as DeepSpeed."""
    process_group.init_distributed(*args, **kwargs)


def _over(function: Callable[..., Any], **renamed: str) -> Callable[..., Any]:
    """A function of torch.distributed's with DeepSpeed's parameters.

    Args:
        function: takes the same in the same order, up to those that are for DeepSpeed's log.
        renamed: DeepSpeed's name of a parameter -> torch's.
    """

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        named = {renamed.get(key, key): value for key, value in kwargs.items() if key not in _FOR_ITS_LOG}
        return function(*args, **named)

    return forward


# torch 2.13 has these under newer names, and complains of the older ones.
_all_gather_flat: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

broadcast = _over(dist.broadcast)
broadcast_object_list = _over(dist.broadcast_object_list)
all_gather = _over(dist.all_gather)
all_gather_object = _over(dist.all_gather_object)
all_gather_into_tensor = _over(_all_gather_flat, tensor="input_tensor")
reduce_scatter = _over(dist.reduce_scatter)
reduce_scatter_tensor = _over(_reduce_scatter_flat, output_tensor="output", tensor="input")
all_to_all = _over(dist.all_to_all)
all_to_all_single = _over(dist.all_to_all_single, tensor="input")
all_reduce = _over(dist.all_reduce)
reduce = _over(dist.reduce)
gather = _over(dist.gather)
scatter = _over(dist.scatter)
send = _over(dist.send)
recv = _over(dist.recv)
isend = _over(dist.isend)
irecv = _over(dist.irecv)
barrier = _over(dist.barrier)
monitored_barrier = _over(dist.monitored_barrier)
inference_all_reduce = all_reduce
allgather_fn = _over(_all_gather_flat)
reduce_scatter_fn = reduce_scatter_tensor

is_initialized = dist.is_initialized
is_available = dist.is_available
destroy_process_group = dist.destroy_process_group
new_group = dist.new_group
get_rank = dist.get_rank
get_world_size = dist.get_world_size


class _Works(NamedTuple):
    """Several collectives under way, waited for as one."""

    each: list[Any]

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self.each:
            work.wait()


def all_gather_coalesced(
    output_tensors: Sequence[torch.Tensor],
    input_tensors: Sequence[torch.Tensor],
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Collective. Gather each input into the output of its place, whole along the first dimension."""
    pairs = zip(output_tensors, input_tensors, strict=True)
    works = [_all_gather_flat(whole, own, group=group, async_op=async_op) for whole, own in pairs]
    return _Works(works) if async_op else None


def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor], op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False, **_log: Any
) -> Any:
    """Collective. Reduce each tensor."""
    works = [dist.all_reduce(tensor, op=op, group=group, async_op=async_op) for tensor in tensors]
    return _Works(works) if async_op else None


class P2POp:
    """One of the operations of ``batch_isend_irecv``.

    Args:
        op: ``isend`` or ``irecv``, of this module or torch's.
        tensor: what is sent, or where it arrives.
        peer: the rank of the other side.
        group: None for all ranks.
        tag: that both sides give.
    """

    def __init__(
        self, op: Callable[..., Any], tensor: torch.Tensor, peer: int, group: Any = None, tag: int = 0
    ) -> None:
        torchs = {isend: dist.isend, irecv: dist.irecv}.get(op, op)
        self.operation = dist.P2POp(torchs, tensor, peer, group, tag)


def batch_isend_irecv(p2p_op_list: Sequence[P2POp], **_log: Any) -> list[Any]:
    """Start several operations at once; returns what to wait for."""
    return dist.batch_isend_irecv([each.operation for each in p2p_op_list])


def get_world_group() -> Any:
    """The group of all ranks."""
    return dist.group.WORLD


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """The rank, among all, of one in a group."""
    world: Any = dist.group.WORLD
    return dist.get_global_rank(group or world, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """The ranks, among all, of those in a group."""
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def get_local_rank() -> int:
    """This process's number on its node; 0 where nothing says it."""
    return who.local_rank_from_environment(os.environ) or 0


def get_world_rank_from_launcher() -> int:
    """This process's rank by its environment; 0 where nothing says it."""
    me = who.rank_from_environment(os.environ)
    return 0 if me is None else me.rank


def get_world_size_from_launcher() -> int:
    """How many ranks there are by the environment; 1 where nothing says it."""
    me = who.rank_from_environment(os.environ)
    return 1 if me is None else me.world_size


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> Any:
    """A mesh of torch's over all ranks. ``initialize`` takes none: all its ranks are data-parallel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def has_it() -> bool:
    """Whether torch has a collective that DeepSpeed asks about: since 2.0 it has all of them."""
    return True


def configure(*_args: Any, **_kwargs: Any) -> None:
    """Accepted: what is sent is not counted."""


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:  # noqa: ARG001 - DeepSpeed's
    """Say that nothing is counted, and what to use."""
    log.warning("deepspeed.comm.log_summary: hpc_ds counts no collectives; use torch.profiler, or wall_clock_breakdown")
    return {} if return_dict else None


def reset_log() -> None:
    """Accepted: nothing is counted."""


def has_comm_data() -> bool:
    """Whether collectives were counted: never."""
    return False


def get_comm_operation_count() -> int:
    """How many collectives were counted: none."""
    return 0


def get_logged_comm_ops() -> list[str]:
    """Which collectives were counted: none."""
    return []
