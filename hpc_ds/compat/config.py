"""``DeepSpeedConfig``: a training config as the object that DeepSpeed's scripts read, from ours."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.compat.logs import logger
from hpc_ds.config.batch import resolve_batch_sizes
from hpc_ds.config.load import read_training_config
from hpc_ds.config.training import read_training
from hpc_ds.errors import ConfigError
from hpc_ds.runtime.rank import rank_from_environment

if TYPE_CHECKING:
    from hpc_ds.config.training import TrainingConfig

_TYPES = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class DeepSpeedConfig:
    """A training config, checked, with what is missing filled in.

    Needs no process group: without one the world size is what the environment says, 1 where it says nothing.

    Args:
        config: a dict, a file, or URL-safe base64 of JSON.
        mpu: must be None: there is no model parallelism.
        mesh_device: must be None.

    Attributes:
        zero_config: the section ``zero_optimization``; others as ``float16_config``, ``bfloat16_config``.
        train_batch_size: as are ``train_micro_batch_size_per_gpu`` and ``gradient_accumulation_steps``, all three known.

    Raises:
        ConfigError: it is not usable.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        if mpu is not None or mesh_device is not None:
            raise ConfigError("DeepSpeedConfig: mpu and mesh_device are for model parallelism, which is not supported")
        self._param_dict, file = read_training_config(config)
        self._config = read_training(self._param_dict, file).config
        me = None if dist.is_initialized() else rank_from_environment(os.environ)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1 if me is None else me.world_size
        self.global_rank = dist.get_rank() if dist.is_initialized() else 0 if me is None else me.rank
        sizes = resolve_batch_sizes(self._config, self.world_size)
        self.train_batch_size, self.train_micro_batch_size_per_gpu = sizes.train, sizes.micro
        self.gradient_accumulation_steps = sizes.accumulation
        vars(self).update(_sections(self._config), **_derived(self._config))

    def __getattr__(self, name: str) -> Any:
        # what has the same name as its key: gradient_clipping, steps_per_print, prescale_gradients, ...
        config = vars(self).get("_config")
        if config is not None and name in type(config).model_fields:
            return getattr(config, name)
        raise AttributeError(
            f"DeepSpeedConfig.{name}: hpc_ds has no such name; see docs/config.md for the keys it has, and "
            "docs/migrating-from-deepspeed.md"
        )

    def print_user_config(self) -> None:
        """Log what the user wrote."""
        logger.info("  json = %s", json.dumps(self._param_dict, sort_keys=True, indent=4, default=str))

    def print(self, name: str) -> None:
        """Log all of it."""
        logger.info("%s:", name)
        for key, value in sorted(vars(self).items()):
            if not key.startswith("_"):
                logger.info("  %s %s", key.ljust(29, "."), value)
        self.print_user_config()


def _sections(config: TrainingConfig) -> dict[str, Any]:
    """Sections under DeepSpeed's names of attributes."""
    return {
        "zero_config": config.zero_optimization,
        "float16_config": config.fp16,
        "bfloat16_config": config.bf16,
        "flops_profiler_config": config.flops_profiler,
        "activation_checkpointing_config": config.activation_checkpointing,
        "compile_config": config.compile,
        "checkpoint_config": config.checkpoint,
        "monitor_config": config,
    }


def _derived(config: TrainingConfig) -> dict[str, Any]:
    """What DeepSpeed keeps under a name that is no key."""
    optimizer, scheduler, stage = config.optimizer, config.scheduler, config.zero_optimization.stage
    validation = config.checkpoint.tag_validation.lower()
    return {
        "zero_optimization_stage": stage,
        "zero_enabled": stage > 0,
        "fp16_enabled": config.fp16.enabled,
        "bfloat16_enabled": config.bf16.enabled,
        "torch_autocast_enabled": config.torch_autocast.enabled,
        "torch_autocast_dtype": getattr(torch, config.torch_autocast.dtype) if config.torch_autocast.enabled else None,
        "optimizer_name": None if optimizer is None else _short(optimizer.type),
        "optimizer_params": None if optimizer is None else optimizer.params,
        "optimizer_legacy_fusion": False,
        "scheduler_name": None if scheduler is None else scheduler.type,
        "scheduler_params": None if scheduler is None else scheduler.params,
        "communication_data_type": _TYPES.get(config.communication_data_type),
        "grad_accum_dtype": config.data_types.grad_accum_dtype,
        "wall_clock_breakdown": config.wall_clock_breakdown or config.flops_profiler.enabled,
        "checkpoint_tag_validation_enabled": validation != "ignore",
        "checkpoint_tag_validation_fail": validation == "fail",
        "load_universal_checkpoint": False,
        "use_node_local_storage": False,
        "zero_force_ds_cpu_optimizer": False,
        "memory_breakdown": False,
    }


def _short(name: str) -> str:
    """DeepSpeed writes the names of its own optimizers small."""
    return name.lower() if name.lower() in OPTIMIZERS else name


OPTIMIZERS = ["adagrad", "adam", "adamw", "lamb", "muadam", "muadamw", "musgd", "lion", "muon"]
"""The names of DeepSpeed's own optimizers."""
ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER, MUADAM_OPTIMIZER = OPTIMIZERS[:5]
MUADAMW_OPTIMIZER, MUSGD_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER = OPTIMIZERS[5:]
TORCH_ADAM_PARAM, ADAM_W_MODE, ADAM_W_MODE_DEFAULT = "torch_adam", "adam_w_mode", True
