"""Which names the package ``deepspeed`` has, module by module, and where each is at home. Data only; loads nothing."""

from __future__ import annotations

VERSION = "0.19.8+hpcds"
"""The release of DeepSpeed whose names these are."""

_ZERO = (
    "GatheredParameters",
)  # fmt: skip
_FRAGMENTS = (
    "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param", "safe_get_local_grad", "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param", "safe_set_full_grad", "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param", "safe_set_local_grad", "safe_set_local_optimizer_state",
)  # fmt: skip

# module -> name -> where it is at home: "module:attribute", or "module" for a whole module.
NAMES: dict[str, dict[str, str]] = {
    "deepspeed": {
        "initialize": "hpc_ds.engine.initialize:initialize",
        "init_distributed": "hpc_ds.runtime.process_group:init_distributed",
        "add_config_arguments": "hpc_ds.engine.initialize:add_config_arguments",
        "DeepSpeedEngine": "hpc_ds.engine.engine:Engine",
        "DeepSpeedConfigError": "hpc_ds.errors:ConfigError",
        "zero": "deepspeed.runtime.zero",
    },
    "deepspeed.runtime": {},
    "deepspeed.runtime.zero": {name: f"hpc_ds.zero:{name}" for name in _ZERO},
    "deepspeed.utils": {name: f"hpc_ds.zero:{name}" for name in _FRAGMENTS},
    "deepspeed.checkpointing": {},
}
