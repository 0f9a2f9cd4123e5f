"""The training config: DeepSpeed's JSON keys, spelling and defaults.

Three tables decide about keys: the models below are what the engine does; ``ACCEPTED`` are known keys that change
nothing here, each with the reason (one warning); ``REFUSED`` are known keys that would change results or memory.
Anything else is unknown and refused with the nearest known key.

Source: https://www.deepspeed.ai/docs/config-json, and the defaults of release 0.19.8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc_ds.config.model import Model, check, key_in_words, nearest
from hpc_ds.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_BUCKETS = "FSDP2 communicates one bucket a block"
_FSDP2 = "FSDP2 decides this by itself"

ACCEPTED = {
    "zero_allow_untested_optimizer": "any torch optimizer may be sharded",
    "zero_force_ds_cpu_optimizer": "there is no special CPU optimizer to force",
    "disable_allgather": "it has no effect in DeepSpeed either",
    "wall_clock_breakdown": "step times are in the run's events",
    "memory_breakdown": "it prints, and changes nothing",
    "dump_state": "the effective config is in the run folder",
    "zero_optimization.contiguous_gradients": _FSDP2,
    "zero_optimization.reduce_scatter": _FSDP2,
    "zero_optimization.reduce_bucket_size": _BUCKETS,
    "zero_optimization.allgather_partitions": _FSDP2,
    "zero_optimization.allgather_bucket_size": _BUCKETS,
    "zero_optimization.allgather_size": _BUCKETS,
    "zero_optimization.use_multi_rank_bucket_allreduce": _BUCKETS,
    "zero_optimization.overlap_comm": "communication always overlaps where the device can",
    "zero_optimization.round_robin_gradients": _FSDP2,
    "zero_optimization.load_from_fp32_weights": "master parameters are always fp32",
    "zero_optimization.elastic_checkpoint": "every checkpoint loads at any world size",
    "zero_optimization.ignore_unused_parameters": "unused parameters are always allowed",
    "zero_optimization.sub_group_size": _BUCKETS,
    "zero_optimization.memory_efficient_linear": _FSDP2,
    "zero_optimization.stage3_prefetch_bucket_size": _BUCKETS,
    "zero_optimization.stage3_param_persistence_threshold": _BUCKETS,
    "zero_optimization.stage3_model_persistence_threshold": _BUCKETS,
    "zero_optimization.stage3_max_live_parameters": _FSDP2,
    "zero_optimization.stage3_max_reuse_distance": _FSDP2,
    "managed_gradient_accumulation": "the engine always counts micro-batches",
    "fp16.auto_cast": "floating-point inputs are always cast",
    "log_level": "logging is the script's own",
    "vocabulary_size": "it only warns, about a size that is not a multiple of 8",
    "timers": "step times are in the run's events",
    "seq_parallel_communication_data_type": "there is no sequence parallelism",
    "checkpoint.use_node_local_storage": "each rank writes its own shards",
    "checkpoint.parallel_write": "each rank writes its own shards",
    "checkpoint.load_universal": "every checkpoint loads at any world size",
    "zero_optimization.legacy_stage1": "there is one stage 1",
    "zero_optimization.pipeline_loading_checkpoint": "loading always reads shards",
    "zero_optimization.override_module_apply": _FSDP2,
    "zero_optimization.log_trace_cache_warnings": "there is no trace to warn about",
    "zero_optimization.stage3_module_granularity_threshold": _BUCKETS,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _FSDP2,
    "zero_optimization.stage3_allgather_sequential": _FSDP2,
    "zero_optimization.cpu_offload_use_pin_memory": "there is no offloading in this version",
    "zero_optimization.enable_sanity_checks": "checks are always on",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "save_16bit_model always gathers",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "save_16bit_model always gathers",
}

REFUSED = {
    "zero_optimization.offload_optimizer": "offloading is not supported in this version",
    "zero_optimization.offload_param": "offloading is not supported in this version",
    "zero_optimization.cpu_offload": "offloading is not supported in this version",
    "zero_optimization.cpu_offload_param": "offloading is not supported in this version",
    "zero_optimization.leaf_module": "ZeRO leaf modules are not supported in this version",
    "zero_optimization.zero_quantized_nontrainable_weights": "ZeRO++ is not supported",
    "fp16.fp16_master_weights_and_grads": "master parameters are always fp32",
    "bf16.immediate_grad_update": "gradients are reduced by the ZeRO stage",
    "bf16.bf16_master_weights_and_grads": "master parameters are always fp32",
    "bf16.bf16_optimizer_states": "optimizer states are always fp32",
    "gradient_allreduce_op": "gradients are averaged",
    "zero_optimization.zenflow": "ZenFlow is not supported",
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ is not supported",
    "zero_optimization.zero_quantized_weights": "ZeRO++ is not supported",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ is not supported",
    "prescale_gradients": "gradients are averaged after the sum, in fp32",
    "gradient_predivide_factor": "gradients are averaged after the sum, in fp32",
    "sparse_gradients": "sparse gradients are not supported",
    "amp": 'Apex AMP is not supported; use "fp16" or "bf16"',
    "torch_autocast": 'autocast is not supported in this version; use "fp16" or "bf16"',
    "data_types": "other data types are not supported in this version",
    "activation_checkpointing": "it is not supported in this version; use torch.utils.checkpoint in the model",
    "pipeline": "pipeline parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
    "elasticity": "not needed: every checkpoint loads at any world size",
    "autotuning": "autotuning is not supported",
    "compression_training": "compression is not supported",
    "curriculum_learning": "curriculum learning is not supported",
    "data_efficiency": "data efficiency is not supported",
    "hybrid_engine": "the hybrid engine is not supported",
    "compile": "compile is not supported in this version; pass a compiled module",
    "flops_profiler": "the flops profiler is not supported in this version",
    "tensorboard": "monitors are not supported in this version; read events.jsonl",
    "csv_monitor": "monitors are not supported in this version; read events.jsonl",
    "wandb": "monitors are not supported in this version; read events.jsonl",
    "comet": "monitors are not supported in this version; read events.jsonl",
    "comms_logger": "the communication logger is not supported in this version",
    "aio": "NVMe offload is not supported",
    "quantize_training": "quantized training is not supported",
    "eigenvalue": "quantized training is not supported",
}

# What a refused key says when it asks for nothing.
_IDLE: dict[str, Any] = {
    "gradient_predivide_factor": 1.0,
    "zero_optimization.zero_hpz_partition_size": 1,
    "gradient_allreduce_op": "mean",
}
_DEEPEST = 20


class OptimizerConfig(Model):
    """``{"type": "AdamW", "params": {"lr": 1e-3}}``."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)
    legacy_fusion: bool = Field(False, description="accepted; there is one implementation of each optimizer")  # noqa: FBT003


class SchedulerConfig(Model):
    """``{"type": "WarmupDecayLR", "params": {"total_num_steps": 1000}}``."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class Fp16Config(Model):
    """fp16 compute with loss scaling; ``loss_scale`` 0 is dynamic."""

    enabled: bool = False
    loss_scale: NonNegative = 0.0
    initial_scale_power: Annotated[int, Field(ge=0, le=60)] = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Bf16Config(Model):
    """bf16 compute; there is no loss scale."""

    enabled: bool = False
    check_grad_overflow: bool = True


class ZeroConfig(Model):
    """What is sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""

    stage: Literal[0, 1, 2, 3] = 0


class CheckpointSection(Model):
    """DeepSpeed's ``checkpoint`` section, as far as it has a meaning here."""

    tag_validation: Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail"] = "Warn"


class TrainingConfig(Model):
    """One training config, checked."""

    train_batch_size: Positive | None = None
    train_micro_batch_size_per_gpu: Positive | None = None
    gradient_accumulation_steps: Positive | None = None
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None
    fp16: Fp16Config = Field(default_factory=Fp16Config)
    bf16: Bf16Config = Field(default_factory=Bf16Config)
    gradient_clipping: NonNegative = 1.0
    zero_optimization: ZeroConfig = Field(default_factory=ZeroConfig)
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    steps_per_print: Annotated[float, Field(gt=0)] | None = None
    dataloader_drop_last: bool = False
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    seed: int = Field(0, description="of the data order; this key is ours")

    @model_validator(mode="after")
    def _one_precision(self) -> TrainingConfig:
        if self.fp16.enabled and self.bf16.enabled:
            raise ValueError("fp16.enabled, bf16.enabled: both are true; enable one of them")
        return self


_SECTIONS: dict[str, type[Model]] = {
    "": TrainingConfig,
    "zero_optimization": ZeroConfig,
    "fp16": Fp16Config,
    "bf16": Bf16Config,
    "checkpoint": CheckpointSection,
    "optimizer": OptimizerConfig,
}


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The batch arithmetic of a run: ``train = micro * accumulation * world_size``, all in samples but the last two."""

    train: int
    micro: int
    accumulation: int
    world_size: int


def load_training(data: dict[str, Any], file: str = "training config") -> tuple[TrainingConfig, list[str]]:
    """Check a DeepSpeed config.

    Returns:
        The config, and one warning for each key that was accepted and does nothing.

    Raises:
        ConfigError: an unknown or refused key, or a value out of range.
    """
    data = _without_auto(data, file)
    data, renamed = _respelled(data, file)
    _refuse_unknown(data, file)
    _refuse(data, file)
    data, ignored = _without_accepted(data)
    warnings = renamed + [f"{file}: {key}: has no effect, because {ACCEPTED[key]}" for key in ignored]
    return check(TrainingConfig, data, file), warnings


def resolve_batch_sizes(config: TrainingConfig, world_size: int) -> BatchSizes:
    """Fill in what is missing of the three batch sizes, and check them against each other.

    Raises:
        ConfigError: none is given, or they contradict each other; all four numbers are named.
    """
    train, micro = config.train_batch_size, config.train_micro_batch_size_per_gpu
    accumulation = config.gradient_accumulation_steps
    if train is None and micro is None:
        raise ConfigError(
            "train_batch_size, train_micro_batch_size_per_gpu: neither is given; give at least one",
            key="train_batch_size",
        )
    if micro is None:
        micro = max((train or 0) // world_size // (accumulation or 1), 1)
    if accumulation is None:
        accumulation = 1 if train is None else max(train // micro // world_size, 1)
    if train is None:
        train = micro * accumulation * world_size
    if train != micro * accumulation * world_size:
        raise ConfigError(
            f"train_batch_size {train}: not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x world size {world_size} = {micro * accumulation * world_size}; make them agree, or leave "
            "one of the three sizes out",
            key="train_batch_size",
            value=train,
        )
    return BatchSizes(train, micro, accumulation, world_size)


def _without_auto(data: dict[str, Any], file: str, depth: int = 0) -> dict[str, Any]:
    """Without what is "auto": the default is meant (a Trainer that fills it in has done so by now)."""
    if depth > _DEEPEST:
        raise ConfigError(f"{file}: nested more than {_DEEPEST} sections deep; no key stands there", file=file)
    return {
        key: _without_auto(value, file, depth + 1) if isinstance(value, dict) else value
        for key, value in data.items()
        if value != "auto"
    }


def _respelled(data: dict[str, Any], file: str) -> tuple[dict[str, Any], list[str]]:
    data = dict(data)
    if "bf16" in data and "bfloat16" in data:
        raise ConfigError(f"{file}: bf16, bfloat16: two names of one section; keep bf16", file=file, key="bfloat16")
    if "bfloat16" in data:
        data["bf16"] = data.pop("bfloat16")
    # accelerate passes infinity for "never".
    if data.get("steps_per_print") in (math.inf, 0):
        data["steps_per_print"] = None
    zero = data.get("zero_optimization")
    if isinstance(zero, bool):
        stage = int(zero)
        data["zero_optimization"] = {"stage": stage}
        return data, [f'zero_optimization {str(zero).lower()}: read as stage {stage}; write {{"stage": {stage}}}']
    return data, []


def _refuse_unknown(data: dict[str, Any], file: str) -> None:
    """Unknown keys, before the models see them: keys that are only listed can be meant as well."""
    for section, model in _SECTIONS.items():
        holder = data.get(section) if section else data
        listed = [key.rpartition(".") for key in (*ACCEPTED, *REFUSED)]
        known = {*model.model_fields, *(name for of, _, name in listed if of == section)}
        for name in holder if isinstance(holder, dict) else ():
            if name not in known:
                key = f"{section}.{name}" if section else name
                cure = nearest(name, list(known))
                raise ConfigError(f"{file}: {key_in_words(key)}: unknown key; {cure}", file=file, key=key)


def _refuse(data: dict[str, Any], file: str) -> None:
    for key, reason in REFUSED.items():
        found, value = _look_up(data, key)
        idle = value is None or value is False or value == {} or (key in _IDLE and value == _IDLE[key])
        if found and not idle and not _switched_off(value):
            raise ConfigError(f"{file}: {key}: refused, because {reason}", file=file, key=key, value=value)


def _switched_off(value: object) -> bool:
    """Whether a section says itself that it is off."""
    return isinstance(value, dict) and (value.get("enabled") is False or value.get("device") == "none")


def _without_accepted(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Without the keys that do nothing: those of ``ACCEPTED`` (named), and refused ones that are switched off."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    ignored = [key for key in ACCEPTED if _look_up(data, key)[0]]
    for key in (*ignored, *(key for key in REFUSED if _look_up(data, key)[0])):
        section, _, name = key.rpartition(".")
        (data[section] if section else data).pop(name)
    return data, ignored


def _look_up(data: dict[str, Any], key: str) -> tuple[bool, Any]:
    section, _, name = key.rpartition(".")
    holder = data.get(section) if section else data
    return (True, holder[name]) if isinstance(holder, dict) and name in holder else (False, None)
