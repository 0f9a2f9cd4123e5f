"""From a training config to the sharding it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hpc_ds.engine.allocator import keep_freed_memory
from hpc_ds.engine.buckets import Policy
from hpc_ds.engine.deferred import refuse_what_cannot_be_made
from hpc_ds.engine.fully_sharded import FullySharded, Offload
from hpc_ds.engine.leaf_modules import mark_as_configured
from hpc_ds.engine.replicated import Replicated
from hpc_ds.engine.sharding import Precision, Sharding
from hpc_ds.engine.surface import compute_dtype

if TYPE_CHECKING:
    from torch import nn

    from hpc_ds.config.training import TrainingConfig

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_BUCKET = 1 << 24  # elements: small enough that sums overlap and buffers stay small beside a model


def make_sharding(model: nn.Module, config: TrainingConfig, device: torch.device) -> Sharding:
    """Collective. Shard a module in place, from rank 0's values.

    Raises:
        ConfigError: the module cannot be sharded so.
    """
    keep_freed_memory(device)
    refuse_what_cannot_be_made(model)
    zero, types = config.zero_optimization, config.data_types
    precision = Precision(
        compute=compute_dtype(config),
        accumulate=_DTYPES[types.grad_accum_dtype],
        wire=_DTYPES[config.communication_data_type],
        buffers=_DTYPES[types.buffer_dtype],
    )
    pins = zero.pins and device.type == "cuda"
    if zero.stage == 3:
        mark_as_configured(model, zero.leaf_module)
        return FullySharded(model, device, precision, Offload(pins) if zero.offloads else None, zero.blocks)
    before = (
        1 / torch.distributed.get_world_size() if config.prescale_gradients else 1 / config.gradient_predivide_factor
    )
    policy = Policy(
        zero.stage,
        min(zero.reduce_bucket_size, _LARGEST_BUCKET),
        average=config.gradient_allreduce_op == "mean",
        before=before,
        offload=zero.offloads,
        pin_memory=pins,
    )
    return Replicated(model, device, policy, precision, zero.blocks)
