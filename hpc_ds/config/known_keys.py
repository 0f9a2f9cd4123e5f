"""Keys of DeepSpeed that are no fields of our models: accepted without effect, refused, or another spelling.

A key stands in exactly one place: a model (supported), ``ACCEPTED`` (one warning that says why it does nothing) or
``REFUSED`` (an error that says why: it would change results or memory). A refused key that asks for nothing (null,
false, {}, a section that is off, or the default) is passed over. All are dotted paths.

Source: DeepSpeed 0.19.8 and, for keys that it removed, 0.19.6.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class Known(NamedTuple):
    """A key that is no field: DeepSpeed's default, and why we accept or refuse it."""

    default: Any
    reason: str


_OURS = "the engine decides this by itself"
_BUCKETS = "the engine gathers one bucket a block"
_SHARDS = "each rank writes its own shards"
_NVME = "nothing is kept on NVMe"
_DEEPCOMPILE = "it is an option of DeepCompile"
_CHECKPOINTS_ANYWHERE = "every checkpoint loads at any world size"

_ACCEPTED: dict[str, tuple[Any, str]] = {
    "memory_breakdown": (False, "it prints, and changes nothing"),
    "disable_allgather": (False, "it has no effect in DeepSpeed either"),
    "disable_python_gc": (False, "Python's garbage collector is left as it is"),
    "zero_force_ds_cpu_optimizer": (True, "there is no special CPU optimizer to force"),
    "seq_parallel_communication_data_type": ("fp32", "there is no sequence parallelism"),
    "vocabulary_size": (None, "it only warns, about a size that is not a multiple of 8"),
    "allgather_size": (500_000_000, _BUCKETS),
    "torch_autocast.lower_precision_safe_modules": (None, "gradients travel as communication_data_type says"),
    "timers": ({}, "step times are in the run's events"),
    "aio": ({}, _NVME),
    "datastates_ckpt": (False, _SHARDS),
    "optimizer.legacy_fusion": (False, "there is one implementation of each optimizer"),
    "zero_optimization.contiguous_gradients": (True, _OURS),
    "zero_optimization.reduce_scatter": (True, _OURS),
    "zero_optimization.use_multi_rank_bucket_allreduce": (True, _OURS),
    "zero_optimization.allgather_partitions": (True, _OURS),
    "zero_optimization.allgather_bucket_size": (500_000_000, _BUCKETS),
    "zero_optimization.allgather_size": (500_000_000, _BUCKETS),
    "zero_optimization.overlap_comm": (None, "communication always overlaps where the device can"),
    "zero_optimization.compute_grad_norm": (True, "the norm comes with the collective that finds overflows"),
    "zero_optimization.load_from_fp32_weights": (True, "master parameters are always fp32"),
    "zero_optimization.elastic_checkpoint": (False, _CHECKPOINTS_ANYWHERE),
    "zero_optimization.round_robin_gradients": (False, _OURS),
    "zero_optimization.parameter_alignment": (False, _OURS),
    "zero_optimization.ignore_unused_parameters": (True, "unused parameters are always allowed"),
    "zero_optimization.legacy_stage1": (False, "there is one stage 1"),
    "zero_optimization.sub_group_size": (1_000_000_000, _BUCKETS),
    "zero_optimization.memory_efficient_linear": (True, _OURS),
    "zero_optimization.pipeline_loading_checkpoint": (False, "loading always reads shards"),
    "zero_optimization.override_module_apply": (True, _OURS),
    "zero_optimization.log_trace_cache_warnings": (False, "there is no trace to warn about"),
    "zero_optimization.enable_sanity_checks": (False, "checks are always on"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (False, _NVME),
    "zero_optimization.stage3_prefetch_bucket_size": (50_000_000, _BUCKETS),
    "zero_optimization.stage3_param_persistence_threshold": (100_000, _BUCKETS),
    "zero_optimization.stage3_model_persistence_threshold": (sys.maxsize, _BUCKETS),
    "zero_optimization.stage3_max_live_parameters": (1_000_000_000, _OURS),
    "zero_optimization.stage3_max_reuse_distance": (1_000_000_000, _OURS),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (False, "save_16bit_model always gathers"),
    "zero_optimization.stage3_module_granularity_threshold": (0, _BUCKETS),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": (False, _OURS),
    "zero_optimization.stage3_allgather_sequential": (False, _OURS),
    "zero_optimization.offload_optimizer.nvme_path": (None, _NVME),
    "zero_optimization.offload_optimizer.buffer_count": (4, _NVME),
    "zero_optimization.offload_optimizer.pipeline_read": (False, _NVME),
    "zero_optimization.offload_optimizer.pipeline_write": (False, _NVME),
    "zero_optimization.offload_optimizer.fast_init": (False, _NVME),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": (0.8, "it is an option of SuperOffload"),
    "zero_optimization.offload_param.nvme_path": (None, _NVME),
    "zero_optimization.offload_param.buffer_count": (5, _NVME),
    "zero_optimization.offload_param.buffer_size": (100_000_000, _NVME),
    "zero_optimization.offload_param.max_in_cpu": (1_000_000_000, _NVME),
    "activation_checkpointing.partition_activations": (False, "there is no tensor parallelism to divide them among"),
    "activation_checkpointing.contiguous_memory_optimization": (False, "torch's allocator keeps them"),
    "activation_checkpointing.number_checkpoints": (None, "the model decides what it checkpoints"),
    "activation_checkpointing.synchronize_checkpoint_boundary": (False, "it only slows a step down"),
    "activation_checkpointing.profile": (False, "use flops_profiler or wall_clock_breakdown"),
    "compile.autoep_non_moe": (False, _DEEPCOMPILE),
    "compile.free_activation": (False, _DEEPCOMPILE),
    "compile.free_activation_threshold": (10_485_760, _DEEPCOMPILE),
    "compile.offload_activation": (False, _DEEPCOMPILE),
    "compile.offload_activation_pin_memory": (True, _DEEPCOMPILE),
    "compile.offload_opt_states": (False, _DEEPCOMPILE),
    "compile.offload_parameters": (False, _DEEPCOMPILE),
    "compile.double_buffer": (True, _DEEPCOMPILE),
    "compile.symmetric_memory": (False, _DEEPCOMPILE),
    "compile.debug_log": (False, _DEEPCOMPILE),
    "compile.sync_before_reduce": (False, _DEEPCOMPILE),
    "compile.sync_after_reduce": (False, _DEEPCOMPILE),
    "compile.sync_before_allgather": (False, _DEEPCOMPILE),
    "compile.sync_after_allgather": (False, _DEEPCOMPILE),
    "compile.keep_int_input_tensors": (True, _DEEPCOMPILE),
    "compile.keep_all_input_tensors": (False, _DEEPCOMPILE),
    "compile.passes": (None, _DEEPCOMPILE),
    "checkpoint.load_universal": (False, _CHECKPOINTS_ANYWHERE),
    "checkpoint.use_node_local_storage": (False, _SHARDS),
    "checkpoint.parallel_write": ({}, _SHARDS),
    "checkpoint.checkpoint_serialization": (True, "there is one file format"),
    "checkpoint.writer": (None, "there is one writer"),
}

_OFF: dict[str, Any] = {"enabled": False}
_REMOVED = "DeepSpeed itself has removed it (0.19.8)"
_ZEROPP = "ZeRO++ is not supported"
_MASTER = "master parameters are always fp32"

_REFUSED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (
        True,
        "the engine counts micro-batches; call set_gradient_accumulation_boundary where a step should end elsewhere",
    ),
    "optimizer.params.max_grad_norm": (0.0, "it is no parameter of an optimizer; use gradient_clipping"),
    "fp16.fp16_master_weights_and_grads": (False, _MASTER),
    "bf16.immediate_grad_update": (False, "gradients are reduced by the ZeRO stage"),
    "bf16.bf16_master_weights_and_grads": (False, _MASTER),
    "bf16.bf16_optimizer_states": (False, "optimizer states are always fp32"),
    "data_types.keep_in_fp32_modules": ("auto", "every parameter computes in one type; use torch_autocast"),
    "zero_optimization.zenflow": (None, "ZenFlow is not supported"),
    "zero_optimization.zero_hpz_partition_size": (1, _ZEROPP),
    "zero_optimization.zero_quantized_weights": (False, _ZEROPP),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _ZEROPP),
    "zero_optimization.zero_quantized_gradients": (False, _ZEROPP),
    "zero_optimization.offload_optimizer.ratio": (1.0, "optimizer state is offloaded as a whole; use 1.0"),
    "zero_optimization.offload_optimizer.super_offload": (False, "SuperOffload is not supported"),
    "zero_optimization.mics_shard_size": (-1, _REMOVED),
    "zero_optimization.mics_hierarchical_params_gather": (False, _REMOVED),
    "zero_optimization.zeropp_loco_param": (None, _REMOVED),
    "compile.deepcompile": (False, 'DeepCompile is not supported; use "compile": {"enabled": true}'),
    "comet": (_OFF, "there is no Comet monitor; use wandb, tensorboard or csv_monitor"),
    "comms_logger": (_OFF, "there is no log of collectives; use wall_clock_breakdown"),
    "pipeline": ({}, "pipeline parallelism is not supported"),
    "tensor_parallel": ({}, "tensor parallelism is not supported"),
    "expert_parallel": (_OFF, "expert parallelism is not supported"),
    "use_data_before_expert_parallelism": (False, "expert parallelism is not supported"),
    "sequence_parallel_size": (1, "sequence parallelism is not supported"),
    "hybrid_engine": (_OFF, "the hybrid engine is not supported"),
    "weight_quantization": (None, "quantized weights are not supported"),
    "data_efficiency": (_OFF, "data efficiency is not supported"),
    "autotuning": (_OFF, "autotuning is not supported"),
    "elasticity": (_OFF, f"{_REMOVED}, and every checkpoint loads at any world size"),
    "amp": (_OFF, f"{_REMOVED}; use fp16, bf16 or torch_autocast"),
    "sparse_gradients": (False, _REMOVED),
    "sparse_attention": (None, _REMOVED),
    "compression_training": ({}, _REMOVED),
    "quantize_training": ({}, _REMOVED),
    "eigenvalue": (_OFF, _REMOVED),
    "curriculum_learning": (_OFF, _REMOVED),
    "progressive_layer_drop": (_OFF, _REMOVED),
    "graph_harvesting": (False, _REMOVED),
    "nebula": (_OFF, _REMOVED),
}

ACCEPTED = {key: Known(*row) for key, row in _ACCEPTED.items()}
REFUSED = {key: Known(*row) for key, row in _REFUSED.items()}

_NO_NVME = 'NVMe offload is not supported; use "cpu"'

# Values of supported keys that DeepSpeed takes and we refuse -> why.
REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("zero_optimization.offload_optimizer.device", "nvme"): _NO_NVME,
    ("zero_optimization.offload_param.device", "nvme"): _NO_NVME,
}

_ZERO3_NAMES = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip

# Other spellings -> the key. Both at once are an error.
ALIASES: dict[str, str] = {
    "bfloat16": "bf16",
    **{f"zero_optimization.{name}": f"zero_optimization.stage3_{name}" for name in _ZERO3_NAMES},
}

# Old keys -> what is used instead. They are read with a warning; old and new at once are an error.
DEPRECATED: dict[str, str] = {
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory of zero_optimization.offload_optimizer and offload_param",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}
