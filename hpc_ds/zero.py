"""``hpc_ds.zero``, for scripts: whole parameters, gradients and optimizer state at any ZeRO stage."""

from hpc_ds.engine.early import ZeroParamStatus
from hpc_ds.engine.early_init import Init
from hpc_ds.engine.external import register_external_parameter, unregister_external_parameter
from hpc_ds.engine.leaf_modules import (
    get_leaf_modules,
    is_leaf_module,
    set_leaf_module,
    set_leaf_modules,
    set_leaf_modules_by_name,
    set_leaf_modules_by_suffix,
    unset_leaf_modules,
)
from hpc_ds.engine.zero import (
    GatheredParameters,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    unwrap_model_for_generation,
)

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "get_leaf_modules",
    "is_leaf_module",
    "register_external_parameter",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "set_leaf_module",
    "set_leaf_modules",
    "set_leaf_modules_by_name",
    "set_leaf_modules_by_suffix",
    "unregister_external_parameter",
    "unset_leaf_modules",
    "unwrap_model_for_generation",
]
