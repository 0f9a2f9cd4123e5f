"""What DeepSpeed has and hpc_ds has not: what each name is, and what to use instead. Data, and the sentence made of it.

Three tables: modules, and names of the top package, that are lacking with all that is below them; names of the modules that
``names.py`` has, each by itself, so that none is forgotten (tests/compat/test_all_names.py reads the real package); and the
modules whose names in capitals are constants of DeepSpeed's inside.
"""

from __future__ import annotations

GUIDE = "docs/migrating-from-deepspeed.md"

# What it is -> what to use instead.
_PIPELINES = "DeepSpeed's pipeline parallelism", "use ZeRO stage 3, which shards parameters too, over the plain module"
_TENSOR = "DeepSpeed's tensor parallelism", "use ZeRO stage 3"
_INFERENCE = (
    "DeepSpeed's inference",
    "use engine.module for evaluation and generation, or an inference server for service",
)
_KERNELS = (
    "DeepSpeed's compiled kernels",
    "use torch's own operators, as scaled_dot_product_attention and torch.compile",
)
_MOE = "DeepSpeed's expert parallelism", "train the experts as ordinary modules at ZeRO stage 3 (set_z3_leaf_modules)"
_SEQUENCE = "DeepSpeed's sequence parallelism", "use activation checkpointing for long sequences"
_HYBRID = "DeepSpeed's hybrid engine for RLHF", "use initialize, and engine.module.generate for generation"
_NVME = (
    "DeepSpeed's asynchronous files and offload to NVMe",
    "use offload to the CPU; checkpoints are written in the background",
)
_TUNING = "DeepSpeed's autotuner", "use hpcds config explain for memory, and a sweep in hpcds submit for measuring"
_PASSES = "DeepSpeed's compiler passes", "set compile.enabled in the config, or call engine.compile()"
_COMPRESSION = "DeepSpeed's compression and quantization", "use torch.ao, or a library of its own"
_DATA = "DeepSpeed's data efficiency library", "make a dataset or sampler of your own and pass initialize the dataset"
_ELASTIC = (
    "DeepSpeed's elastic batches, which 0.19.8 itself has no more",
    "resume at any world size: checkpoints fit all of them",
)
_LORA = "DeepSpeed's LoRA layers", "use the library peft"
_REPORT = "DeepSpeed's report on this machine", "run hpcds doctor"
_LAUNCHERS = "a part of DeepSpeed's launcher", "run hpcds run or hpcds submit"
_LAYOUT = (
    "a part of DeepSpeed's checkpoint files and their conversion",
    "use hpcds checkpoint import-deepspeed and export",
)
_KEYS = "DeepSpeed's name of a config key or of its default", "write the key itself, as docs/config.md has it"
_SECTION = (
    "DeepSpeed's object for a section of the config",
    "read it from DeepSpeedConfig, or write the section as a dict",
)
_COMM = (
    "a part of DeepSpeed's layer over torch.distributed",
    "use the functions of deepspeed.comm, or torch.distributed",
)
_DISCOVERY = "DeepSpeed's discovery of ranks", "call deepspeed.init_distributed(), which knows Slurm, MPI and PMI"
_DEVICES = "a part of DeepSpeed's layer over devices", "use deepspeed.accelerator.get_accelerator(), or torch.cuda"
_SCALING = "DeepSpeed's loss scaler", "set fp16 in the config, and read optimizer.cur_scale"
_WRAPPERS = "DeepSpeed's wrapper of the optimizer", "use the optimizer that initialize returns, a torch.optim.Optimizer"
_GATHERING = "a part of DeepSpeed's gathering of parameters", "use deepspeed.zero.GatheredParameters"
_FRAGMENTS = "a part of DeepSpeed's flat buffers", "use deepspeed.utils.safe_get_full_fp32_param and its siblings"
_TILING = "DeepSpeed's linear layer in tiles", "use torch.nn.Linear, which stage 3 gathers block by block"
_ACTIVATIONS = "a part of DeepSpeed's activation checkpointing", "use deepspeed.checkpointing.checkpoint and configure"
_ESTIMATES = "DeepSpeed's estimate of memory", "run hpcds config explain, which says what each stage takes"
_PROFILE = "a part of DeepSpeed's flops profiler", "use get_model_profile, or flops_profiler in the config"
_MONITORS = "one of DeepSpeed's monitors", "set tensorboard, csv_monitor or wandb in the config"
_INSIDE = "a part of DeepSpeed's inside", "write it in the script, or see the guide"
_MODEL_PARALLEL = "a group of DeepSpeed's model or expert parallelism", "leave it out: every rank is data-parallel"
_MUON = "DeepSpeed's Muon", 'write "type": "Muon" in the optimizer section of the config'
_AUTOCAST = "a part of DeepSpeed's torch_autocast", "set torch_autocast in the config"
_DEBUG = "a part of DeepSpeed's debugging", "use named_parameters and logging"
_SAVING = "DeepSpeed's way to write checkpoints", "use engine.save_checkpoint, which writes in the background if asked"
_THROUGHPUT = "DeepSpeed's timer of throughput", "set wall_clock_breakdown or steps_per_print in the config"

# Each for all that is below it: "moe" speaks for deepspeed.moe.layer.MoE.
_WHOLE: dict[tuple[str, str], str] = {
    _PIPELINES: "pipe runtime.pipe PipelineModule PipelineEngine DualPipeVEngine DualPipeVModule",
    _TENSOR: """
        module_inject runtime.tensor_parallel runtime.domino tp_model_init set_autotp_mode merge_tp_model_init_into_config
        record_tp_model_init_args replace_transformer_layer
    """,
    _INFERENCE: """
        inference model_implementations init_inference InferenceEngine DeepSpeedInferenceConfig default_inference_config
    """,
    _KERNELS: """
        ops.op_builder ops.transformer ops.triton_ops ops.deepspeed4science ops.compile ops.pin_memory
        ops.adam.multi_tensor_apply ops.lion.multi_tensor_apply runtime.chunked_cross_entropy HAS_TRITON
        DeepSpeedTransformerLayer DeepSpeedTransformerConfig
    """,
    _MOE: "moe",
    _SEQUENCE: "sequence runtime.sequence_parallel",
    _HYBRID: "runtime.hybrid_engine runtime.hybrid_engine_graph runtime.rollout DeepSpeedHybridEngine",
    _NVME: "nvme io ops.aio ops.gds runtime.swap_tensor datastates runtime.superoffload runtime.zenflow",
    _TUNING: "autotuning",
    _PASSES: "compile",
    _COMPRESSION: "compression ops.fp_quantizer ops.quantizer runtime.weight_quantizer",
    _DATA: "runtime.data_pipeline ops.random_ltd",
    _ELASTIC: "elasticity",
    _LORA: "linear",
    _REPORT: "env_report",
    _LAUNCHERS: "launcher.constants launcher.launch launcher.launcher_helper launcher.multinode_runner",
    _LAYOUT: """
        checkpoint.affine checkpoint.affine_transfer checkpoint.autoep_affine checkpoint.autoep_universal
        checkpoint.autoep_zero3_metadata checkpoint.constants checkpoint.deepspeed_checkpoint checkpoint.ds_to_universal
        checkpoint.reshape_3d_utils checkpoint.reshape_meg_2d checkpoint.reshape_utils checkpoint.universal_checkpoint
        checkpoint.zero_checkpoint runtime.state_dict_factory utils.zero_to_torch
    """,
    _KEYS: """
        runtime.constants comm.config profiling.config profiling.constants runtime.activation_checkpointing.config utils.config
    """,
    _SECTION: "runtime.config_utils runtime.precision_config runtime.zero.leaf_module_config monitor.config load_ds_config",
    _COMM: "comm.backend comm.ccl comm.mori comm.pg_utils comm.torch runtime.comm utils.comms_logging",
    _DEVICES: """
        accelerator.cpu_accelerator accelerator.cuda_accelerator accelerator.hpu_accelerator accelerator.klxpu_accelerator
        accelerator.mlu_accelerator accelerator.mps_accelerator accelerator.npu_accelerator accelerator.sdaa_accelerator
        accelerator.supa_accelerator accelerator.xpu_accelerator utils.numa utils.pin_memory utils.pin_memory_tracker
    """,
    _SCALING: "runtime.fp16",
    _WRAPPERS: """
        runtime.bf16_optimizer runtime.zero.stage3 runtime.zero.stage_1_and_2 ops.adam.zenflow_cpu_adam
        ops.adam.zenflow_torch_adam set_optimizer_flags
    """,
    _GATHERING: """
        runtime.zero.parameter_offload runtime.zero.partitioned_param_coordinator runtime.zero.partitioned_param_profiler
        runtime.zero.offload_states runtime.zero.test
    """,
    _FRAGMENTS: "utils.mixed_precision_linkage runtime.zero.contiguous_memory_allocator",
    _TILING: "runtime.zero.tiling runtime.zero.linear",
    _ACTIVATIONS: "runtime.activation_checkpointing.offload_activations",
    _MONITORS: "monitor.comet monitor.csv_monitor monitor.tensorboard monitor.utils monitor.wandb",
    _MODEL_PARALLEL: "utils.bwc",
    _MUON: "runtime.zero.muon resolve_per_head_muon_after_sharding QUERY KV MLA_Q MLA_KV NOT_HEAD_BLOCKED",
    _AUTOCAST: "runtime.torch_autocast runtime.keep_in_fp32",
    _DEBUG: "utils.debug",
    _SAVING: "runtime.checkpoint_engine runtime.model_checkpointing",
    _INSIDE: """
        compat git_version_info_installed runtime.python_gc runtime.sparse_tensor utils.exceptions utils.static_cache utils.torch
        utils.types
    """,
    # estimates that scripts call by their full names
    _ESTIMATES: """
        runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live
        runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_cold
        runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live
        runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold
    """,
}

_COMM_NAMES: dict[tuple[str, str], str] = {
    _COMM: """
        cdb timers timer_summary comms_logger nccl_backend mpi_backend ccl_backend hccl_backend timed_op init_deepspeed_backend
        set_backend enable_symm_mem_for_group get_default_args get_tensor_position get_tensor_kwarg get_msg_size_from_args
        get_debug_log_name
    """,
    _DISCOVERY: """
        mpi_discovery in_aml in_aws_sm in_dlts patch_aml_env_for_torch_nccl_backend patch_aws_sm_env_for_torch_nccl_backend
    """,
}
_PROFILE_NAMES = {
    _PROFILE: """
        Tensor module_flop_count module_mac_count old_functions wrapFunc get_module_flops get_module_macs get_module_duration
    """
}
_BUFFERS = """
    tensor_fragment fragment_address get_full_hp_param get_full_hp_grad set_full_hp_param set_full_hp_grad
    get_hp_fragment_mapping map_to_flat_opt_states
"""
_GROUP_NAMES = """
    set_tensor_model_parallel_world_size set_tensor_model_parallel_rank get_tensor_model_parallel_src_rank
"""

# Of a module that names.py has -> its names that are lacking.
_NAMES: dict[str, dict[tuple[str, str], str]] = {
    "accelerator.real_accelerator": {_DEVICES: "accel_logger dsa1 dsa2 ds_accelerator"},
    "checkpoint": {
        _LAYOUT: """
            reshape_meg_2d_parallel DeepSpeedCheckpoint merge_state model_3d_desc get_model_3d_descriptor ZeROCheckpoint
            enable_universal_checkpoint SubparamShape
        """
    },
    "comm": _COMM_NAMES,
    "comm.comm": _COMM_NAMES,
    "comm.utils": _COMM_NAMES,
    "git_version_info": {_REPORT: "installed_ops accelerator_name torch_info"},
    "launcher.runner": {_LAUNCHERS: "parse_args parse_node_config parse_node_config_list", _TUNING: "run_autotuning"},
    "monitor.monitor": {_MONITORS: "Monitor"},
    "ops": {_KERNELS: "DeepSpeedTransformerLayer DeepSpeedTransformerConfig"},
    "ops.adam": {_WRAPPERS: "ZenFlowCPUAdam ZenFlowSelectiveAdamW ZenFlowSelectiveAdamW_stage3"},
    "ops.adam.fused_adam": {_KERNELS: "multi_tensor_applier"},
    "ops.lion.fused_lion": {_KERNELS: "multi_tensor_applier"},
    "profiling.flops_profiler": _PROFILE_NAMES,
    "profiling.flops_profiler.profiler": _PROFILE_NAMES,
    "runtime.activation_checkpointing.checkpointing": {
        _ACTIVATIONS: """
            deepspeed_checkpointing_enabled mpu mp_rank mp_size mp_group num_layers contiguous_data_buffers data_offsets
            contiguous_size_buffers size_offsets timers detach_variable CudaRNGStatesTracker get_cuda_rng_tracker
            model_parallel_cuda_manual_seed model_parallel_reconfigure_tp_seed get_partition_start get_partition_size
            gather_partitioned_activations extract_tensors merge_tensors is_activation_to_checkpoint partition_activations
            get_partitioned_activations_for_backward get_cpu_activations_for_backward get_offloaded_activations_for_backward
            restore_offloaded_activations CheckpointFunction partition_activations_in_checkpoint set_num_layers
        """
    },
    "runtime.base_optimizer": {_WRAPPERS: "BackwardHookStateManager"},
    "runtime.compiler": {
        _PASSES: """
            torch_is_compiling lazy_disable enable compiled_autograd dummy_decorator compile compile_autoep_non_moe_regions
        """
    },
    "runtime.config": {
        _KEYS: "ValidationMode DtypeEnum",
        _SECTION: """
            HybridEngineConfig DeepSpeedConfigWriter get_expert_parallel_config get_torch_autocast_enabled
            get_torch_autocast_dtype get_lower_precision_safe_modules get_gradient_accumulation_steps
            get_managed_gradient_accumulation get_communication_data_type get_prescale_gradients
            get_gradient_predivide_factor get_gradient_allreduce_op get_steps_per_print get_disable_allgather get_dump_state
            get_disable_python_gc get_gradient_clipping get_pipeline_config get_optimizer_name get_optimizer_params
            get_optimizer_gradient_clipping get_optimizer_legacy_fusion get_zero_allow_untested_optimizer
            get_zero_force_ds_cpu_optimizer get_scheduler_name get_scheduler_params get_train_batch_size
            get_train_micro_batch_size_per_gpu get_wall_clock_breakdown get_memory_breakdown get_hybrid_engine_config
            get_expert_data_topo_config get_checkpoint_params get_data_types_params get_checkpoint_tag_validation_mode
            get_checkpoint_parallel_write_pipeline get_dataloader_drop_last get_log_level
        """,
    },
    "runtime.engine": {_INSIDE: "split_half_float_double_sparse EngineTimers"},
    "runtime.utils": {
        _DEVICES: "torch_memory_reserved torch_max_memory_reserved mem_alloced mem_cached offload_adam_states reload_adam_states",
        _MODEL_PARALLEL: """
            is_model_parallel_parameter get_norm_with_moe_layers_fast get_norm_with_moe_layers combine_grad_norm_groups
            PartitionedTensor prefix_sum_inc partition_uniform partition_balanced TLinear
        """,
        _INSIDE: """
            filter_empty_parameters has_inf_or_nan is_invalid_grad_norm CheckOverflow get_global_norm get_flattened_grad_norm
            get_grad_zeros get_weight_norm is_optimized_parameter call_to_str get_only_unique_item
            mask_nan_or_inf_with_val_inplace get_global_norm_of_tensors clip_tensors_by_global_norm align_dense_tensors
            all_gather_into_tensor_dp_groups all_gather_dp_groups get_tensor_bytes get_checkpoint_folder_size
            get_inactive_params is_transformers_cache compare_tensors_in_structures maybe_loss_for_backward
            OutputBackwardHookManager register_output_backward_hooks check_internal_apis_for_count_used_parameters
            count_used_parameters_in_backward
        """,
    },
    "runtime.zero": {
        _GATHERING: "DeepSpeedZeRoOffload DeepSpeedTensorOverride",
        _TILING: "TiledLinear TiledLinearReturnBias",
    },
    "runtime.zero.config": {_SECTION: "read_zero_config_deprecated get_zero_config DeepSpeedZeroConfig"},
    "runtime.zero.offload_config": {_SECTION: "DeepSpeedZeroOffloadParamConfig DeepSpeedZeroOffloadOptimizerConfig"},
    "runtime.zero.partition_parameters": {
        _GATHERING: """
            partitioned_param_data_shape zero_init_context top_level_context DeepSpeedTensorOverride get_allgather_dtype
            NoGatherHandle NoGatherCoalescedHandle print_rank_0 debug_rank0
            get_new_tensor_fn_for_dtype get_all_subclasses free_param reuse_buffers temp_contiguous_tensor empty_buffers
            InsertPostInitMethodToModuleSubClasses AllGatherHandle AllGatherCoalescedHandle MultipleAllGatherHandles
            AllReduceCoalescedHandle QuantizationInfo CUDAQuantizer
        """
    },
    "runtime.zero.utils": {
        _INSIDE: """
            warned get_norm_dtype assert_lst_len_same_as_other_ranks get_lst_from_rank0 assert_ints_same_as_other_ranks
            is_builtin_type isinstance_namedtuple apply_to_tensors_only get_mapping_to_flat_buffer defragment
        """
    },
    "utils": {
        _INSIDE: "get_caller_func DeprecatedException",
        _DEVICES: "get_numactl_cmd",
        _MODEL_PARALLEL: f"{_GROUP_NAMES} bwc_tensor_model_parallel_world_size bwc_pipeline_parallel_world_size",
        _FRAGMENTS: f"{_BUFFERS} link_hp_params lazy_init_hp_params_optimizer_state",
    },
    "utils.groups": {_MODEL_PARALLEL: _GROUP_NAMES},
    "utils.nvtx": {_PROFILE: "enable_nvtx"},
    "utils.tensor_fragment": {_FRAGMENTS: _BUFFERS},
    "utils.timer": {_THROUGHPUT: "ThroughputTimer", _DEVICES: "CudaEventTimer"},
    "utils.z3_leaf_module": {_SECTION: "apply_zero_leaf_module_config"},
    "utils.zero_to_fp32": {
        _LAYOUT: """
            zero_model_state debug device atoi natural_keys get_model_state_file get_checkpoint_files get_optim_files
            get_model_state_files parse_model_states parse_optim_states zero3_partitioned_param_info GatheredTensor
            to_torch_tensor parser args
        """
    },
}

# Where names in capitals are constants of DeepSpeed's inside, as names of config keys are.
_CONSTANTS: dict[tuple[str, str], str] = {
    _KEYS: """
        constants comm comm.comm comm.constants runtime.config runtime.zero.config runtime.zero.utils runtime.engine
        runtime.activation_checkpointing.checkpointing runtime.zero.partition_parameters
    """,
    _LAYOUT: "checkpoint utils.zero_to_fp32",
    _LAUNCHERS: "launcher.runner",
    _PROFILE: "profiling.flops_profiler profiling.flops_profiler.profiler utils.nvtx utils.timer",
    _DEVICES: "accelerator.real_accelerator",
}


def _by_name(table: dict[tuple[str, str], str], prefix: str = "deepspeed.") -> dict[str, tuple[str, str]]:
    return {f"{prefix}{name}": told for told, names in table.items() for name in names.split()}


_SPEAKS = _by_name(_WHOLE)
_EXACT = {
    name: told for module, table in _NAMES.items() for name, told in _by_name(table, f"deepspeed.{module}.").items()
}
_CAPITALS = _by_name(_CONSTANTS)


def told_of(dotted: str) -> tuple[str, str] | None:
    """What a dotted name is, and what to use instead; None where no table has it."""
    module, _, name = dotted.rpartition(".")
    if dotted in _EXACT:
        return _EXACT[dotted]
    above = dotted
    while above:
        if above in _SPEAKS:
            return _SPEAKS[above]
        above = above.rpartition(".")[0]
    return _CAPITALS.get(module) if name.isupper() else None


def reason(dotted: str) -> str:
    """Why there is no such name, in one sentence that says what to do."""
    told = told_of(dotted)
    if told is None:
        return f"{dotted}: neither hpc_ds nor DeepSpeed 0.19.8 has this name for scripts; check it, or see {GUIDE}"
    return f"{dotted}: {told[0]}, which hpc_ds lacks; {told[1]} ({GUIDE})"
