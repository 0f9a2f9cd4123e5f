"""Questions to DeepSpeed's engine that scripts ask, answered by the real one and by ours: whose ``import deepspeed`` it is."""

from __future__ import annotations

import enum
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

STAGES = (0, 1, 2, 3)
ADAM = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0, "torch_adam": True}}
BATCH = {"train_micro_batch_size_per_gpu": 2}

PLAIN = {**BATCH, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
RICH = {
    **BATCH,
    "gradient_accumulation_steps": 3,
    "optimizer": ADAM,
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
    "bf16": {"enabled": True},
    "gradient_clipping": 0.25,
    "gradient_predivide_factor": 2.0,
    "prescale_gradients": True,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "steps_per_print": 11,
    "dataloader_drop_last": True,
    "memory_breakdown": False,
    "log_level": "warning",
    "checkpoint": {"tag_validation": "Fail"},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 2000,
        "allgather_partitions": False,
        "round_robin_gradients": True,
        "sub_group_size": 3000,
        "stage3_max_live_parameters": 4000,
        "stage3_max_reuse_distance": 5000,
        "stage3_prefetch_bucket_size": 6000,
        "stage3_param_persistence_threshold": 7000,
    },
    "zero_allow_untested_optimizer": True,
    "flops_profiler": {"enabled": False, "profile_step": 3, "module_depth": 2, "top_modules": 4, "detailed": False},
}

# What a config asks for -> the config. Which of them are refused is compared.
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "only accumulation": {"gradient_accumulation_steps": 2},
    "sizes that contradict": {**BATCH, "train_batch_size": 7, "gradient_accumulation_steps": 1},
    "a batch of none": {"train_batch_size": 0},
    "a micro-batch below none": {"train_micro_batch_size_per_gpu": -2},
    "stage 4": {**BATCH, "zero_optimization": {"stage": 4}},
    "stage in quotes": {**BATCH, "optimizer": ADAM, "zero_optimization": {"stage": "2"}},
    "stage as a yes": {**BATCH, "optimizer": ADAM, "bf16": {"enabled": True}, "zero_optimization": True},
    "stage as a no": {**BATCH, "optimizer": ADAM, "zero_optimization": False},
    "stage as a list": {**BATCH, "zero_optimization": [1]},
    "an unknown key of a section": {**BATCH, "zero_optimization": {"stagee": 1}},
    "an unknown key of bf16": {**BATCH, "bf16": {"enable": True}},
    "two precisions": {**BATCH, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "bfloat16": {**BATCH, "optimizer": ADAM, "bfloat16": {"enabled": True}},
    "a loss scale below none": {**BATCH, "fp16": {"enabled": True, "loss_scale": -1}},
    "a window of none": {**BATCH, "fp16": {"enabled": True, "loss_scale_window": 0}},
    "an unknown optimizer": {**BATCH, "optimizer": {"type": "Adamm", "params": {"lr": 0.1}}},
    "an optimizer of torch": {**BATCH, "optimizer": {"type": "NAdam", "params": {"lr": 0.1}}},
    "a clip in the optimizer": {**BATCH, "optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
    "an unknown schedule": {**BATCH, "optimizer": ADAM, "scheduler": {"type": "Warm", "params": {}}},
    "a schedule of torch": {**BATCH, "optimizer": ADAM, "scheduler": {"type": "StepLR", "params": {"step_size": 2}}},
    "a schedule without its end": {**BATCH, "optimizer": ADAM, "scheduler": {"type": "WarmupDecayLR", "params": {}}},
    "a warm-up of none": {
        **BATCH,
        "optimizer": ADAM,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}},
    },
    "no optimizer at stage 1": {**BATCH, "zero_optimization": {"stage": 1}},
    "no optimizer at stage 3": {**BATCH, "zero_optimization": {"stage": 3}},
    "a reduction that is none": {**BATCH, "gradient_allreduce_op": "max"},
    "a sum at stage 3": {
        **BATCH,
        "optimizer": ADAM,
        "gradient_allreduce_op": "sum",
        "zero_optimization": {"stage": 3},
    },
    "a type that is none": {**BATCH, "communication_data_type": "fp8"},
    "a validation that is none": {**BATCH, "checkpoint": {"tag_validation": "Perhaps"}},
    "another type of parameters": {**BATCH, "data_types": {"param_dtype": "fp16"}},
    "old and new offload": {
        **BATCH,
        "zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}},
    },
    "elasticity": {**BATCH, "elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1]}},
    "1-bit Adam": {**BATCH, "optimizer": {"type": "OneBitAdam", "params": {"lr": 0.1}}},
    "sparse gradients": {**BATCH, "optimizer": ADAM, "sparse_gradients": True},
    "amp": {**BATCH, "amp": {"enabled": True}},
    "an untested optimizer": {
        **BATCH,
        "optimizer": {"type": "Rprop", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 1},
    },
    "an unknown key": {**BATCH, "optimizer": ADAM, "gradient_cliping": 1.0},
    "auto": {"train_batch_size": "auto", "optimizer": ADAM},
}


class Small(nn.Module):
    """Weights that are bf16 numbers; DeepSpeed makes its masters from the bf16 model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))).float().square().mean()


_METHODS = """
autotp_size autotuning_enabled bf16_master_weights_and_gradients bf16_optimizer_states bfloat16_enabled
checkpoint_serialization_enabled checkpoint_tag_validation_enabled checkpoint_tag_validation_fail
checkpoint_writer_enabled compile_autosp compile_autotp curriculum_learning_enabled data_efficiency_enabled
data_sampling_enabled dataloader_drop_last dump_state dynamic_loss_scale flops_profiler_detailed
flops_profiler_enabled flops_profiler_module_depth flops_profiler_output_file flops_profiler_profile_step
flops_profiler_recompute_fwd_factor flops_profiler_top_modules fp16_auto_cast fp16_enabled
fp16_master_weights_and_gradients get_data_types gradient_accumulation_steps gradient_clipping
gradient_predivide_factor initial_dynamic_scale is_deepcompile_active is_deepcompile_enabled
is_first_weights_partition_group is_sanity_checks_enabled load_universal_checkpoint log_level loss_scale
managed_gradient_accumulation memory_breakdown optimizer_legacy_fusion optimizer_name optimizer_params
postscale_gradients random_ltd_enabled scheduler_name scheduler_params steps_per_print super_offload
torch_autocast_dtype torch_autocast_enabled train_batch_size train_micro_batch_size_per_gpu use_node_local_storage
wall_clock_breakdown zenflow_config zero_allgather_bucket_size zero_allgather_partitions zero_allgather_sequential
zero_allow_untested_optimizer zero_compute_grad_norm zero_contiguous_gradients zero_cpu_offload
zero_elastic_checkpoint zero_force_ds_cpu_optimizer zero_gather_16bit_weights_on_model_save zero_hpz_partition_size
zero_ignore_unused_parameters zero_legacy_stage1 zero_load_from_fp32_weights zero_log_trace_cache_warnings
zero_max_live_parameters zero_max_reuse_distance zero_model_persistence_threshold zero_module_granularity_threshold
zero_multi_rank_bucket_allreduce zero_nvme_offload_optimizer zero_offload_optimizer zero_offload_param
zero_optimization zero_optimization_partition_gradients zero_optimization_partition_weights zero_optimization_stage
zero_overlap_comm zero_param_persistence_threshold zero_parameter_alignment zero_partial_offload
zero_prefetch_bucket_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
zero_reduce_bucket_size zero_reduce_scatter zero_round_robin_gradients zero_save_muon_momentum_buffer_in_memory
zero_sub_group_size zero_use_cpu_optimizer
"""
METHODS = _METHODS.split()


def questions(payload: dict[str, Any]) -> dict[str, Any]:
    folder = Path(payload["folder"])
    return {
        "names": names(),
        "answers": {"plain": answers(PLAIN), "rich": answers(RICH)},
        "configs": {name: outcome(lambda config=config: make(config)) for name, config in CONFIGS.items()},
        "stages": {f"stage {stage}": at_stage(stage, folder / f"stage{stage}") for stage in STAGES},
    }


def make(config: dict[str, Any], model: nn.Module | None = None) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model or Small(), config=config)[0]


def at_stage(stage: int, folder: Path) -> dict[str, Any]:
    config = {**BATCH, "optimizer": ADAM, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    checkpoint = {"checkpoint": {"tag_validation": "Fail"}}
    found = {"returns": returns(config, folder), "no_sync": no_sync(config)}
    found["saves"] = saves({**config, **checkpoint}, folder / "saves")
    if stage > 0:
        found["fragments"] = fragments(config)
    return found


def simple(value: Any) -> Any:
    """Something that JSON has."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): simple(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [simple(one) for one in value]
    if isinstance(value, torch.Tensor):
        return value.float().flatten().tolist()
    if isinstance(value, torch.dtype):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def outcome(call: Any) -> str:
    try:
        call()
    except Exception:  # noqa: BLE001 - what kind it is, is each side's own matter
        return "refused"
    return "taken"


def names() -> list[str]:
    """What an engine has beside what every module has."""
    return sorted(name for name in dir(make(PLAIN)) if not name.startswith("_") and not hasattr(nn.Module, name))


def answers(config: dict[str, Any]) -> dict[str, Any]:
    engine = make(config)
    found = {name: simple(getattr(engine, name)()) for name in METHODS}
    return found | {"communication_data_type": str(engine.communication_data_type)}


def sample(engine: Any) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(engine.global_rank)
    return torch.randn(2, 6, generator=drawn).to(next(engine.parameters()).dtype)


def returns(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What calls give back, and what counters and the optimizer say after them."""
    engine = make(config)
    loss = engine(sample(engine))
    found = {
        "module": isinstance(engine, nn.Module),
        "names": [name for name, _ in engine.named_parameters()],
        "state": sorted(engine.state_dict()) if config["zero_optimization"]["stage"] < 3 else None,
        "backward": engine.backward(loss).item() == loss.item(),
        "boundary": engine.is_gradient_accumulation_boundary(),
        "step": engine.step(),
        "train": engine.train(),
        "eval": engine.eval(),
        "zero_grad": engine.zero_grad(),
        "applied": engine.was_step_applied(),
        "norm": round(float(engine.get_global_grad_norm()), 3),
        "lr": engine.get_lr(),
        "mom": simple(engine.get_mom()),
        "counted": [engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps],
        "sizes": [engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()],
        "ranks": [engine.dp_world_size, engine.mp_world_size, engine.global_rank, engine.local_rank],
        "groups": sorted(engine.optimizer.param_groups[0])[:2],
        "missing": simple(engine.load_checkpoint(str(folder / "none"))),
        "monitor": [engine.monitor.enabled, engine.monitor.write_events([("Eval/loss", 0.5, 2)])],
        "saved": engine.save_checkpoint(str(folder), client_state={"more": 1}),
        "latest": (folder / "latest").read_text(),
    }
    engine.set_train_micro_batch_size(4)
    found["more"] = [engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()]
    engine.set_train_batch_size(16)
    found["most"] = [engine.train_batch_size(), engine.gradient_accumulation_steps()]
    found["indivisible"] = outcome(lambda: engine.set_train_batch_size(15))
    found["no such thing"] = hasattr(engine, "no_such_thing")
    if config["zero_optimization"]["stage"] > 0:
        optimizer = engine.optimizer
        found["optimizer"] = [bool(optimizer.overflow), optimizer.loss_scale, optimizer.cur_scale, optimizer.get_lr()]
        optimizer.set_lr(0.5)
        found["set"] = engine.get_lr()
    return found


def no_sync(config: dict[str, Any]) -> dict[str, str]:
    engine = make(config)

    def enter(depth: int, step: bool = False) -> None:
        with ExitStack() as stack:
            for _ in range(depth):
                stack.enter_context(engine.no_sync())
            engine.backward(engine(sample(engine)))
            if step:
                engine.step()

    found = {"entered": outcome(lambda: enter(1))}
    engine.zero_grad()
    return found | {"entered twice": outcome(lambda: enter(2)), "step": outcome(lambda: enter(1, step=True))}


def saves(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Where a load finds what a save has left."""
    import torch.distributed as dist

    engine = make(config)
    engine.backward(engine(sample(engine)))
    engine.step()
    found: dict[str, Any] = {}
    engine.save_checkpoint(str(folder), tag="hidden", client_state={"at": 1}, save_latest=False)
    found["hidden"] = simple(engine.load_checkpoint(str(folder)))
    found["no such tag"] = outcome(lambda: engine.load_checkpoint(str(folder), tag="none"))
    found["tags that differ"] = outcome(lambda: engine.save_checkpoint(str(folder), tag=f"rank{dist.get_rank()}"))
    engine.save_checkpoint(str(folder), tag=17, client_state={"at": 2})
    found["latest"] = (folder / "latest").read_text()
    again = make(config)
    path, client = again.load_checkpoint(str(folder))
    found["found"] = [path is not None, client["at"], again.global_steps]
    path, client = again.load_checkpoint(str(folder), tag="hidden", load_optimizer_states=False)
    found["asked for"] = [path is not None, client["at"]]
    fresh = make(config)
    fresh.load_checkpoint(str(folder), load_module_only=True)
    found["weights only"] = fresh.global_steps
    return found


def fragments(config: dict[str, Any]) -> dict[str, Any]:
    """Whole values, gradients and optimizer state of a parameter; and what is written to them."""
    from deepspeed import utils

    model = Small()
    engine = make(config, model)
    weight = model.up.weight
    engine.backward(engine(sample(engine)))
    found = {"gradient": simple(utils.safe_get_full_grad(weight))}
    engine.step()
    found["value"] = simple(utils.safe_get_full_fp32_param(weight))
    found["state"] = simple(utils.safe_get_full_optimizer_state(weight, "exp_avg"))
    before = engine(sample(engine)).item()
    utils.safe_set_full_fp32_param(weight, torch.full((8, 6), 0.5))
    utils.safe_set_full_optimizer_state(weight, torch.full((8, 6), 0.25), "exp_avg_sq")
    found["written"] = simple(utils.safe_get_full_fp32_param(weight))
    found["written state"] = simple(utils.safe_get_full_optimizer_state(weight, "exp_avg_sq"))
    found["at once"] = engine(sample(engine)).item() != before
    return found
