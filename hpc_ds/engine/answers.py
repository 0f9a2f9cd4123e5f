"""What DeepSpeed's engine answers about its config and its ranks: a method or an attribute each, here one table each.

A key that has no effect here (``known_keys.ACCEPTED``) is answered as it was written, else by DeepSpeed's default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.config.known_keys import ACCEPTED, REFUSED
from hpc_ds.config.known_names import OPTIMIZERS
from hpc_ds.config.spelling import look_up
from hpc_ds.engine.autocast import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from hpc_ds.config.training import TrainingConfig

_OPTIMIZER, _PROFILER, _ZERO = "zero_optimization.offload_optimizer", "flops_profiler", "zero_optimization"

# Method -> key of the config.
KEYS = {
    "steps_per_print": "steps_per_print",
    "wall_clock_breakdown": "wall_clock_breakdown",
    "memory_breakdown": "memory_breakdown",
    "dump_state": "dump_state",
    "dataloader_drop_last": "dataloader_drop_last",
    "gradient_clipping": "gradient_clipping",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "managed_gradient_accumulation": "managed_gradient_accumulation",
    "optimizer_legacy_fusion": "optimizer.legacy_fusion",
    "log_level": "log_level",
    "use_node_local_storage": "checkpoint.use_node_local_storage",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "checkpoint_serialization_enabled": "checkpoint.checkpoint_serialization",
    "fp16_enabled": "fp16.enabled",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "bfloat16_enabled": "bf16.enabled",
    "bf16_master_weights_and_gradients": "bf16.bf16_master_weights_and_grads",
    "bf16_optimizer_states": "bf16.bf16_optimizer_states",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "flops_profiler_enabled": f"{_PROFILER}.enabled",
    "flops_profiler_recompute_fwd_factor": f"{_PROFILER}.recompute_fwd_factor",
    "flops_profiler_profile_step": f"{_PROFILER}.profile_step",
    "flops_profiler_module_depth": f"{_PROFILER}.module_depth",
    "flops_profiler_top_modules": f"{_PROFILER}.top_modules",
    "flops_profiler_detailed": f"{_PROFILER}.detailed",
    "flops_profiler_output_file": f"{_PROFILER}.output_file",
    "zero_optimization_stage": f"{_ZERO}.stage",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer": "zero_force_ds_cpu_optimizer",
    "zero_reduce_scatter": f"{_ZERO}.reduce_scatter",
    "zero_partial_offload": f"{_OPTIMIZER}.ratio",
    "super_offload": f"{_OPTIMIZER}.super_offload",
    "zero_sub_group_size": f"{_ZERO}.sub_group_size",
    "zero_reduce_bucket_size": f"{_ZERO}.reduce_bucket_size",
    "zero_multi_rank_bucket_allreduce": f"{_ZERO}.use_multi_rank_bucket_allreduce",
    "zero_allgather_bucket_size": f"{_ZERO}.allgather_bucket_size",
    "zero_allgather_partitions": f"{_ZERO}.allgather_partitions",
    "zero_allgather_sequential": f"{_ZERO}.stage3_allgather_sequential",
    "zero_compute_grad_norm": f"{_ZERO}.compute_grad_norm",
    "zero_contiguous_gradients": f"{_ZERO}.contiguous_gradients",
    "zero_load_from_fp32_weights": f"{_ZERO}.load_from_fp32_weights",
    "zero_elastic_checkpoint": f"{_ZERO}.elastic_checkpoint",
    "zero_max_live_parameters": f"{_ZERO}.stage3_max_live_parameters",
    "zero_max_reuse_distance": f"{_ZERO}.stage3_max_reuse_distance",
    "zero_prefetch_bucket_size": f"{_ZERO}.stage3_prefetch_bucket_size",
    "zero_module_granularity_threshold": f"{_ZERO}.stage3_module_granularity_threshold",
    "zero_param_persistence_threshold": f"{_ZERO}.stage3_param_persistence_threshold",
    "zero_model_persistence_threshold": f"{_ZERO}.stage3_model_persistence_threshold",
    "zero_legacy_stage1": f"{_ZERO}.legacy_stage1",
    "zero_ignore_unused_parameters": f"{_ZERO}.ignore_unused_parameters",
    "zero_round_robin_gradients": f"{_ZERO}.round_robin_gradients",
    "zero_parameter_alignment": f"{_ZERO}.parameter_alignment",
    "zero_hpz_partition_size": f"{_ZERO}.zero_hpz_partition_size",
    "zero_quantized_weights": f"{_ZERO}.zero_quantized_weights",
    "zero_quantized_nontrainable_weights": f"{_ZERO}.zero_quantized_nontrainable_weights",
    "zero_quantized_gradients": f"{_ZERO}.zero_quantized_gradients",
    "zero_log_trace_cache_warnings": f"{_ZERO}.log_trace_cache_warnings",
    "zero_save_muon_momentum_buffer_in_memory": f"{_ZERO}.save_muon_momentum_buffer_in_memory",
    "zenflow_config": f"{_ZERO}.zenflow",
    "is_sanity_checks_enabled": f"{_ZERO}.enable_sanity_checks",
    "is_deepcompile_enabled": "compile.deepcompile",
}

# Method -> what it answers whatever the config says, for what there is not.
ALWAYS: dict[str, Any] = {
    "zero_gather_16bit_weights_on_model_save": True,  # whole weights can always be gathered
    "zero_nvme_offload_optimizer": False,
    "checkpoint_writer_enabled": False,
    "autotp_size": 0,
    "autotuning_enabled": False,
    "curriculum_learning_enabled": False,
    "data_efficiency_enabled": False,
    "data_sampling_enabled": False,
    "random_ltd_enabled": False,
    "compile_autosp": False,
    "compile_autotp": False,
    "is_deepcompile_active": False,
    "get_model_parallel_rank": 0,
    "get_tensor_parallel_rank": 0,
}


class Answers:
    """The questions. ``Engine`` is made of this, among others.

    Attributes:
        mp_world_size, sequence_parallel_size, checkpoint_mp_rank, mpu, pipeline_parallelism, has_moe_layers: of a model that
            is not divided but by ZeRO.
        written: the config in today's spelling, with what has no effect.
        client_optimizer, client_lr_scheduler, training_data, collate_fn: what ``initialize`` was given.
    """

    mp_world_size = sequence_parallel_size = 1
    checkpoint_mp_rank = 0
    mpu = None
    pipeline_parallelism = has_moe_layers = False
    written: Mapping[str, Any] = {}
    client_optimizer: Any = None
    client_lr_scheduler: Any = None
    training_data: Any = None
    collate_fn: Any = None

    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    global_rank: int
    world_size: int
    _config: TrainingConfig

    def config_value(self, key: str) -> Any:
        """The value of a dotted key, one without effect included."""
        known = ACCEPTED.get(key) or REFUSED.get(key)
        if known is not None:
            found, value = look_up(self.written, key)
            return value if found and value is not None else known.default
        value = self._config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self._config.zero_optimization.stage > 0

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self._config.zero_optimization.stage > 1

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self._config.zero_optimization.stage > 2

    is_first_weights_partition_group = zero_optimization_partition_weights

    def zero_overlap_comm(self) -> bool:
        """What the config says, which has no effect: communication always overlaps where the device can."""
        written = self.config_value("zero_optimization.overlap_comm")
        return self.zero_optimization_partition_weights() if written is None else bool(written)

    def zero_cpu_offload(self) -> bool:
        """Whether the optimizer's state is in host memory."""
        return self.zero_offload_optimizer() is not None

    zero_use_cpu_optimizer = zero_cpu_offload

    def zero_offload_optimizer(self) -> Any:
        """The section of that name; None where nothing is offloaded."""
        section = self._config.zero_optimization.offload_optimizer
        return None if section.device == "none" else section

    def zero_offload_param(self) -> Any:
        """The section of that name; None where nothing is offloaded."""
        section = self._config.zero_optimization.offload_param
        return None if section.device == "none" else section

    def loss_scale(self) -> float:
        """The loss scale of the config: 0 for one that moves. The one in use is ``cur_scale``."""
        return self._config.fp16.loss_scale

    def dynamic_loss_scale(self) -> bool:
        """Whether fp16's loss scale moves."""
        return self._config.fp16.enabled and self._config.fp16.loss_scale == 0

    def initial_dynamic_scale(self) -> int:
        """Where a loss scale that moves begins."""
        return int(2**self._config.fp16.initial_scale_power)

    def postscale_gradients(self) -> bool:
        """Whether gradients are divided after they are summed."""
        return not self._config.prescale_gradients

    def optimizer_name(self) -> str | None:
        """The class of the script's optimizer, else the type in the config; in small letters, if DeepSpeed knows it."""
        if self.client_optimizer is not None:
            return type(self.client_optimizer).__name__
        if self._config.optimizer is None:
            return None
        name = self._config.optimizer.type
        its_own = {known.lower() for known in OPTIMIZERS if known != "SGD"}
        return name.lower() if name.lower() in its_own else name

    def optimizer_params(self) -> dict[str, Any] | None:
        """The optimizer's arguments in the config."""
        return None if self._config.optimizer is None else self._config.optimizer.params

    def scheduler_name(self) -> str | None:
        """The schedule's type in the config."""
        return None if self._config.scheduler is None else self._config.scheduler.type

    def scheduler_params(self) -> dict[str, Any] | None:
        """The schedule's arguments in the config."""
        return None if self._config.scheduler is None else self._config.scheduler.params

    def checkpoint_tag_validation_enabled(self) -> bool:
        """Whether tags of the ranks are compared."""
        return self._config.checkpoint.tag_validation.lower() != "ignore"

    def checkpoint_tag_validation_fail(self) -> bool:
        """Whether different tags are an error."""
        return self._config.checkpoint.tag_validation.lower() == "fail"

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The types of parameters in forward and backward, and of accumulated gradients."""
        compute, accumulate = self._config.compute, self._config.data_types.grad_accum_dtype
        return TYPES[compute], TYPES[accumulate or compute]

    @property
    def communication_data_type(self) -> torch.dtype:
        """The type in which gradients travel."""
        return TYPES[self._config.communication_data_type or self._config.compute]

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """What autocast casts to; None without it."""
        return autocast_dtype(self._config.torch_autocast) if self._config.torch_autocast.enabled else None

    def get_data_parallel_rank(self) -> int:
        """This rank: all are data-parallel."""
        return self.global_rank

    @property
    def dp_world_size(self) -> int:
        """All ranks."""
        return self.world_size

    seq_dp_world_size = dp_world_size

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The group of all ranks."""
        return dist.group.WORLD

    seq_data_parallel_group = data_parallel_group

    @property
    def dist_backend(self) -> str:
        """What ranks talk through."""
        return str(dist.get_backend())

    @property
    def basic_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer: ours is not wrapped."""
        return self.optimizer

    @property
    def param_names(self) -> dict[nn.Parameter, str]:
        """Every parameter's name in the module."""
        return {parameter: name for name, parameter in self.module.named_parameters()}


TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _answer(name: str, key: str) -> Callable[[Answers], Any]:
    def method(self: Answers) -> Any:
        return self.config_value(key)

    method.__name__, method.__doc__ = name, f"``{key}`` of the config."
    return method


def _always(name: str, value: Any) -> Callable[[Answers], Any]:
    def method(_self: Answers) -> Any:
        return value

    method.__name__, method.__doc__ = name, f"{value!r}, always."
    return method


for _name, _key in KEYS.items():
    setattr(Answers, _name, _answer(_name, _key))
for _name, _value in ALWAYS.items():
    setattr(Answers, _name, _always(_name, _value))
