"""``deepspeed.utils.groups``: every rank is data-parallel, so a group of the data is all of them, and others have one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

mpu = None
mesh_device = None
expert_tensor_parallel_world_size = 1


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Accepted where it asks for nothing.

    Raises:
        ConfigError: it asks for expert or model parallelism.
    """
    if ep_size != 1 or mpu is not None:
        raise ConfigError(
            f"groups.initialize: ep_size {ep_size}, mpu {mpu!r}: every rank is data-parallel; leave them out"
        )


def get_data_parallel_group() -> Any:
    """All ranks."""
    return dist.group.WORLD


def get_data_parallel_world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size()


def get_data_parallel_rank() -> int:
    """This rank."""
    return dist.get_rank()


def get_data_parallel_ranks() -> Sequence[int]:
    """All of them."""
    return range(dist.get_world_size())


def one() -> int:
    """The size of a group that no rank shares with another."""
    return 1


def first() -> int:
    """This rank's place in such a group."""
    return 0


def alone() -> None:
    """Such a group: none."""
