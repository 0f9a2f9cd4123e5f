"""Which names the package ``deepspeed`` has, module by module, and where each is at home. Data only; loads nothing.

What the real package has and this table has not stands in ``lacking.py``.
"""

from __future__ import annotations

VERSION = "0.19.8+hpcds"
"""The release of DeepSpeed whose names these are."""
GIT_HASH = GIT_BRANCH = "hpc_ds"

_ZERO = "Init GatheredParameters register_external_parameter"
_FRAGMENTS = """
    safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state
    safe_get_local_fp32_param safe_get_local_grad safe_get_local_optimizer_state
    safe_set_full_fp32_param safe_set_full_grad safe_set_full_optimizer_state
    safe_set_local_fp32_param safe_set_local_grad safe_set_local_optimizer_state
"""
_LEAVES = """
    set_z3_leaf_modules=set_leaf_modules set_z3_leaf_module=set_leaf_module unset_z3_leaf_modules=unset_leaf_modules
    get_z3_leaf_modules=get_leaf_modules z3_leaf_module=is_leaf_module z3_leaf_parameter=is_of_leaf_module
    set_z3_leaf_modules_by_name=set_leaf_modules_by_name set_z3_leaf_modules_by_suffix=set_leaf_modules_by_suffix
"""
_LOGGING = "logger log_dist log_dist_once set_log_level_from_string"
_COLLECTIVES = """
    all_gather all_gather_coalesced all_gather_into_tensor all_gather_object all_reduce all_reduce_coalesced all_to_all
    all_to_all_single allgather_fn barrier batch_isend_irecv broadcast broadcast_object_list configure destroy_process_group
    gather get_all_ranks_from_group get_comm_operation_count get_global_rank get_local_rank get_logged_comm_ops get_rank
    get_world_group get_world_size has_all_gather_into_tensor=has_it has_all_reduce_coalesced=has_it has_coalescing_manager=has_it
    has_comm_data has_reduce_scatter_tensor=has_it inference_all_reduce init_distributed initialize_mesh_device irecv is_available
    is_initialized isend log_summary monitored_barrier new_group P2POp ProcessGroup recv reduce reduce_scatter
    reduce_scatter_fn reduce_scatter_tensor ReduceOp reset_log scatter send
"""
_FROM_LAUNCHER = "get_local_rank_from_launcher=get_local_rank get_world_rank_from_launcher get_world_size_from_launcher"
_COLLECTIVES += _FROM_LAUNCHER
_BACKENDS = "NCCL_BACKEND CCL_BACKEND MPI_BACKEND GLOO_BACKEND SCCL_BACKEND HCCL_BACKEND"
_CHECKPOINT_FILES = "get_model_ckpt_name_for_rank get_zero_ckpt_name_for_rank get_layer_ckpt_name_for_rank"
_FLOPS = """
    FlopsProfiler get_model_profile number_to_string flops_to_string macs_to_string params_to_string bytes_to_string
    duration_to_string
"""
_OPTIMIZERS = """
    ADAGRAD_OPTIMIZER ADAM_OPTIMIZER ADAMW_OPTIMIZER LAMB_OPTIMIZER LION_OPTIMIZER MUADAM_OPTIMIZER MUADAMW_OPTIMIZER
    MUSGD_OPTIMIZER MUON_OPTIMIZER DEEPSPEED_OPTIMIZERS=OPTIMIZERS TORCH_ADAM_PARAM ADAM_W_MODE ADAM_W_MODE_DEFAULT
"""
_TIMERS = """
    FORWARD_MICRO_TIMER FORWARD_GLOBAL_TIMER BACKWARD_MICRO_TIMER BACKWARD_GLOBAL_TIMER BACKWARD_INNER_MICRO_TIMER
    BACKWARD_INNER_GLOBAL_TIMER BACKWARD_REDUCE_MICRO_TIMER BACKWARD_REDUCE_GLOBAL_TIMER STEP_MICRO_TIMER STEP_GLOBAL_TIMER
"""
_GROUPS = """
    mpu mesh_device expert_tensor_parallel_world_size initialize
    get_data_parallel_group get_data_parallel_world_size get_data_parallel_rank
    get_model_parallel_group=alone get_model_parallel_world_size=one get_model_parallel_rank=first
    get_tensor_model_parallel_group=alone get_tensor_model_parallel_world_size=one get_tensor_model_parallel_rank=first
"""
_OF_GROUPS_ONLY = """
    _get_data_parallel_group=get_data_parallel_group _get_data_parallel_world_size=get_data_parallel_world_size
    _get_data_parallel_rank=get_data_parallel_rank _get_data_parallel_group_ranks=get_data_parallel_ranks
    _get_sequence_data_parallel_group=get_data_parallel_group _get_sequence_data_parallel_rank=get_data_parallel_rank
    _get_sequence_data_parallel_world_size=get_data_parallel_world_size
    _get_sequence_parallel_group=alone _get_sequence_parallel_world_size=one _get_sequence_parallel_rank=first
    _get_model_parallel_world_size=one
"""
_SCHEDULE_NAMES = """
    LR_SCHEDULE LR_RANGE_TEST ONE_CYCLE WARMUP_LR WARMUP_DECAY_LR WARMUP_COSINE_LR VALID_LR_SCHEDULES
    LR_RANGE_TEST_MIN_LR LR_RANGE_TEST_STEP_RATE LR_RANGE_TEST_STEP_SIZE LR_RANGE_TEST_STAIRCASE EDGE_VALUE MID_VALUE
    CYCLE_FIRST_STEP_SIZE CYCLE_FIRST_STAIR_COUNT CYCLE_SECOND_STEP_SIZE CYCLE_SECOND_STAIR_COUNT DECAY_STEP_SIZE
    CYCLE_MIN_LR CYCLE_MAX_LR DECAY_LR_RATE CYCLE_MIN_MOM CYCLE_MAX_MOM DECAY_MOM_RATE WARMUP_MIN_LR WARMUP_MAX_LR
    WARMUP_NUM_STEPS WARMUP_TYPE WARMUP_LOG_RATE WARMUP_LINEAR_RATE WARMUP_MIN_RATIO COS_MIN_RATIO TOTAL_NUM_STEPS
    add_tuning_arguments parse_arguments override_lr_range_test_params override_1cycle_params override_warmupLR_params
    override_warmupCosineLR_params override_params get_config_from_args get_lr_from_config update_lr get_torch_optimizer
    LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR
"""

# module -> where names are at home -> those names; "theirs=ours" where the two differ. A home that is followed by "=" stands
# for a whole module.
_TABLE: dict[str, dict[str, str]] = {
    "deepspeed": {
        "hpc_ds.engine.initialize": "initialize add_config_arguments",
        "hpc_ds.engine.engine": "DeepSpeedEngine=Engine",
        "hpc_ds.errors": "DeepSpeedConfigError=ConfigError",
        "hpc_ds.compat.config": "DeepSpeedConfig MUON_OPTIMIZER",
        "hpc_ds.compat.comm": "init_distributed",
        "hpc_ds.compat.accelerator": "get_accelerator",
        "hpc_ds.compat.loaders": "DeepSpeedDataLoader",
        "hpc_ds.compat.logs": "logger log_dist",
        "hpc_ds.compat.helpers": "OnDevice",
        "hpc_ds.compat.values": """
            DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable TORCH_DISTRIBUTED_DEFAULT_PORT version git_hash git_branch
        """,
        "torch.optim": "DeepSpeedOptimizer=Optimizer",
        "deepspeed.comm": "dist=",
        "deepspeed.runtime.zero": "zero=",
        "deepspeed.runtime.activation_checkpointing.checkpointing": "checkpointing=",
    },
    "deepspeed.accelerator": {
        "hpc_ds.compat.accelerator": """
            DeepSpeedAccelerator=Accelerator get_accelerator set_accelerator is_current_accelerator_supported
        """
    },
    "deepspeed.accelerator.abstract_accelerator": {"hpc_ds.compat.accelerator": "DeepSpeedAccelerator=Accelerator"},
    "deepspeed.accelerator.real_accelerator": {
        "hpc_ds.compat.accelerator": "get_accelerator set_accelerator is_current_accelerator_supported"
    },
    "deepspeed.checkpoint": {"hpc_ds.compat.checkpoint": _CHECKPOINT_FILES},
    "deepspeed.checkpoint.utils": {"hpc_ds.compat.checkpoint": f"clone_tensors_for_torch_save {_CHECKPOINT_FILES}"},
    "deepspeed.comm": {"hpc_ds.compat.comm": _COLLECTIVES, "hpc_ds.compat.values": _BACKENDS},
    "deepspeed.comm.comm": {"hpc_ds.compat.comm": _COLLECTIVES, "hpc_ds.compat.values": _BACKENDS},
    "deepspeed.comm.constants": {"hpc_ds.compat.values": _BACKENDS},
    "deepspeed.comm.reduce_op": {"hpc_ds.compat.comm": "ReduceOp"},
    "deepspeed.comm.utils": {"hpc_ds.compat.comm": _FROM_LAUNCHER},
    "deepspeed.constants": {
        "hpc_ds.compat.values": "TORCH_DISTRIBUTED_DEFAULT_PORT default_pg_timeout CROSS_RANK CROSS_SIZE LOCAL_RANK"
    },
    "deepspeed.git_version_info": {"hpc_ds.compat.values": "version git_hash git_branch"},
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": {
        "hpc_ds.compat.launcher": """
            DLTS_HOSTFILE EXPORT_ENVS DEEPSPEED_ENVIRONMENT_NAME DEEPSPEED_ENVIRONMENT_PATHS PDSH_MAX_FAN_OUT fetch_hostfile
            parse_resource_filter parse_inclusion_exclusion apply_num_nodes_and_gpus encode_world_info main
        """
    },
    "deepspeed.monitor": {},
    "deepspeed.monitor.monitor": {"hpc_ds.compat.monitor": "MonitorMaster"},
    "deepspeed.ops": {"hpc_ds.compat.values": "__compatible_ops__=NO_OPS"},
    "deepspeed.ops.adagrad": {"hpc_ds.compat.optimizers": "DeepSpeedCPUAdagrad"},
    "deepspeed.ops.adagrad.cpu_adagrad": {"hpc_ds.compat.optimizers": "DeepSpeedCPUAdagrad"},
    "deepspeed.ops.adam": {"hpc_ds.compat.optimizers": "DeepSpeedCPUAdam FusedAdam"},
    "deepspeed.ops.adam.cpu_adam": {"hpc_ds.compat.optimizers": "DeepSpeedCPUAdam"},
    "deepspeed.ops.adam.fused_adam": {"hpc_ds.compat.optimizers": "FusedAdam"},
    "deepspeed.ops.lamb": {"hpc_ds.compat.optimizers": "FusedLamb"},
    "deepspeed.ops.lamb.fused_lamb": {"hpc_ds.compat.optimizers": "FusedLamb"},
    "deepspeed.ops.lion": {"hpc_ds.compat.optimizers": "DeepSpeedCPULion FusedLion"},
    "deepspeed.ops.lion.cpu_lion": {"hpc_ds.compat.optimizers": "DeepSpeedCPULion"},
    "deepspeed.ops.lion.fused_lion": {"hpc_ds.compat.optimizers": "FusedLion"},
    "deepspeed.profiling": {},
    "deepspeed.profiling.flops_profiler": {"hpc_ds.compat.flops": _FLOPS},
    "deepspeed.profiling.flops_profiler.profiler": {"hpc_ds.compat.flops": _FLOPS},
    "deepspeed.runtime": {},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": {
        "hpc_ds.checkpointing": "checkpoint configure is_configured reset non_reentrant_checkpoint=checkpoint"
    },
    "deepspeed.runtime.base_optimizer": {"torch.optim": "DeepSpeedOptimizer=Optimizer ZeROOptimizer=Optimizer"},
    "deepspeed.runtime.compiler": {
        "hpc_ds.compat.values": "is_compile_supported",
        "torch.compiler": "is_compiling disable",
    },
    "deepspeed.runtime.config": {
        "hpc_ds.compat.config": f"DeepSpeedConfig {_OPTIMIZERS}",
        "hpc_ds.errors": "DeepSpeedConfigError=ConfigError",
    },
    "deepspeed.runtime.dataloader": {"hpc_ds.compat.loaders": "RepeatingLoader DeepSpeedDataLoader"},
    "deepspeed.runtime.engine": {
        "hpc_ds.engine.engine": "DeepSpeedEngine=Engine",
        "hpc_ds.compat.values": "DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable",
    },
    "deepspeed.runtime.lr_schedules": {"hpc_ds.compat.schedules": _SCHEDULE_NAMES},
    "deepspeed.runtime.utils": {
        "hpc_ds.compat.helpers": """
            DummyOptim clip_grad_norm_ copy_to_device=move_to_device empty_cache ensure_directory_exists get_ma_status
            memory_status move_to_device noop_decorator see_memory_usage set_random_seed
        """,
        "contextlib": "noop_context=nullcontext",
    },
    "deepspeed.runtime.zero": {
        "hpc_ds.zero": f"{_ZERO} ZeroParamStatus unwrap_model_for_generation",
        "hpc_ds.compat.parameters": "ZeroParamType",
    },
    "deepspeed.runtime.zero.config": {"hpc_ds.compat.parameters": "ZeroStageEnum"},
    "deepspeed.runtime.zero.offload_config": {"hpc_ds.compat.parameters": "OffloadDeviceEnum OffloadStateTypeEnum"},
    "deepspeed.runtime.zero.partition_parameters": {
        "hpc_ds.zero": f"{_ZERO} ZeroParamStatus unregister_external_parameter",
        "hpc_ds.compat.parameters": """
            ZeroParamType zero_wrapper_for_fp_tensor_constructor _orig_torch_arange=ORIGINAL_ARANGE
            shutdown_init_context restore_init_context
        """,
        "hpc_ds.compat.accelerator": "get_accelerator",
    },
    "deepspeed.runtime.zero.utils": {
        "hpc_ds.compat.parameters": "is_zero_param is_zero_supported_optimizer",
        "hpc_ds.errors": "ZeRORuntimeException=HpcdsError",
    },
    "deepspeed.utils": {
        "hpc_ds.zero": _FRAGMENTS,
        "hpc_ds.engine.leaf_modules": _LEAVES,
        "hpc_ds.compat.logs": _LOGGING,
        "hpc_ds.compat.loaders": "RepeatingLoader",
        "hpc_ds.compat.groups": _GROUPS,
        "hpc_ds.compat.accelerator": "get_accelerator",
        "hpc_ds.compat.helpers": """
            OnDevice instrument_w_nvtx recursive_getattr recursive_setattr safe_update_full_grad_vectorized
        """,
        "deepspeed.comm": "dist=",
    },
    "deepspeed.utils.groups": {"hpc_ds.compat.groups": f"{_GROUPS} {_OF_GROUPS_ONLY}"},
    "deepspeed.utils.init_on_device": {"hpc_ds.compat.helpers": "OnDevice"},
    "deepspeed.utils.logging": {
        "hpc_ds.compat.logs": f"""
            {_LOGGING} log_levels LoggerFactory warning_once print_configuration get_dist_msg print_dist print_json_dist
            get_log_level_from_string get_current_level should_log_le
        """
    },
    "deepspeed.utils.module_utils": {"hpc_ds.compat.helpers": "recursive_getattr recursive_setattr"},
    "deepspeed.utils.nvtx": {"hpc_ds.compat.helpers": "instrument_w_nvtx"},
    "deepspeed.utils.tensor_fragment": {
        "hpc_ds.zero": _FRAGMENTS,
        "hpc_ds.compat.helpers": "safe_update_full_grad_vectorized",
    },
    "deepspeed.utils.timer": {
        "hpc_ds.compat.clock": "SynchronizedWallClockTimer NoopTimer trim_mean",
        "hpc_ds.compat.values": _TIMERS,
    },
    "deepspeed.utils.z3_leaf_module": {"hpc_ds.engine.leaf_modules": _LEAVES},
    "deepspeed.utils.zero_to_fp32": {
        "hpc_ds.compat.zero_to_fp32": """
            get_fp32_state_dict_from_zero_checkpoint convert_zero_checkpoint_to_state_dict
            convert_zero_checkpoint_to_fp32_state_dict load_state_dict_from_zero_checkpoint main
        """
    },
}


def _homes(of_module: dict[str, str]) -> dict[str, str]:
    """Name -> "module:attribute", or "module" alone."""
    homes = {}
    for home, words in of_module.items():
        for theirs, same, ours in (word.partition("=") for word in words.split()):
            homes[theirs] = f"{home}:{ours}" if ours else home if same else f"{home}:{theirs}"
    return homes


NAMES = {module: _homes(of_module) for module, of_module in _TABLE.items()}
"""module -> name -> where it is at home: "module:attribute", or "module" for a whole module."""
