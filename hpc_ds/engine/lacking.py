"""What DeepSpeed's engine has and ours lacks, and what to use instead: for the error that a script gets."""

from __future__ import annotations

# What there is instead -> the names it is instead of.
_INSTEAD = {
    "the engine reduces gradients by itself; call backward and step": (
        "allreduce_gradients allreduce_bucket allreduce_and_copy allreduce_no_retain buffered_allreduce_fallback "
        "enable_backward_allreduce gradient_average use_ds_comm flatten unflatten"
    ),
    "DeepSpeed has removed sparse gradients too; use dense ones": (
        "sparse_allreduce sparse_allreduce_bucket sparse_allreduce_no_retain sparse_all_gather all_gather_scalar"
    ),
    "step clips by itself, as gradient_clipping says": "clip_fp32_gradients",
    "states stay where they are; set zero_optimization.offload_optimizer, or offload_param at stage 3": (
        "offload_states reload_states swap_tensor_config"
    ),
    "write to engine.monitor": "summary_events",
    "set wall_clock_breakdown and read the log, or the run's events": (
        "timers tput_timer engine_timers engine_timers_cache get_wall_clock_timers print_forward_breakdown fwd_duration"
    ),
    "set flops_profiler.enabled and read its report": "flops_profiler flops update_interval",
    "all ranks are data-parallel": (
        "seq_parallel_group get_sequence_parallel_group expert_parallel_group expert_data_parallel_group all_to_all_group "
        "local_all_to_all_group mesh_device tensor_parallel_config first_dataloader_check"
    ),
    "experts are ordinary modules": "gate_modules moe_layers num_experts load_moe_state_dict",
    "DeepCompile is not supported; set compile.enabled, or call engine.compile()": (
        "register_compile_pass get_compile_time get_deepcompile_backend get_deepspeed_compile_backend get_autosp_backend "
        "get_autotp_backend compile_zero_optimization_stage uses_parallelization_pass_only is_compiled "
        "module_forward_pre_hook module_forward_post_hook"
    ),
    "autotuning is not supported": (
        "autotuning_start_profile_step autotuning_end_profile_step autotuning_metric autotuning_metric_path "
        "autotuning_model_info autotuning_model_info_path autotuning_profile_model_info"
    ),
    "data efficiency is not supported; give the loader a sampler of your own": (
        "curriculum_learning_config data_efficiency_config data_sampling_config random_ltd_config random_ltd_initialize "
        "random_ltd_scheduler set_custom_curriculum_learning_schedule set_data_post_process_func"
    ),
    "it is inside DeepSpeed's engine; there is no need of it here": (
        "aio_config checkpoint_engine collect_python_gc cpuadam_cores_perc dont_change_device dynamic_loss_scale_args "
        "get_optimizer_configuration inside_no_sync_ctxt is_iterable_style_dataset is_map_style_dataset "
        "loaded_checkpoint_dp_world_size loaded_checkpoint_mp_world_size losses optimized_linear_base_weight_sharding "
        "optimized_linear_lora_enabled save_non_zero_checkpoint save_zero_checkpoint scale_wrt_gas get_type "
        "torch_autocast_lower_precision_safe_modules torch_autocast_z0_gradscaler zenflow warn_unscaled_loss"
    ),
}

LACKING = {name: reason for reason, names in _INSTEAD.items() for name in names.split()}
"""Name -> what there is instead."""
