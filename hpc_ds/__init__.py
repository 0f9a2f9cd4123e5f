"""hpc_ds: distributed PyTorch training jobs that own themselves from submit to the last step.

The public names are loaded when first used (PEP 562): importing hpc_ds loads neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hpc_ds.version import __version__

_HOME = {
    "add_config_arguments": "hpc_ds.engine.initialize",
    "initialize": "hpc_ds.engine.initialize",
    "init_distributed": "hpc_ds.runtime.process_group",
    "Engine": "hpc_ds.engine.engine",
    "Preempted": "hpc_ds.runtime.preemption",
    "CheckpointError": "hpc_ds.errors",
    "ConfigError": "hpc_ds.errors",
    "DivergedError": "hpc_ds.errors",
    "FunctionError": "hpc_ds.errors",
    "HpcdsError": "hpc_ds.errors",
    "RankError": "hpc_ds.errors",
    "submit": "hpc_ds.script.functions",
}

# What scripts use as a module of its own: hpc_ds.zero.GatheredParameters, hpc_ds.preemption.requested.
_MODULES = {
    "checkpointing": "hpc_ds.checkpointing",
    "preemption": "hpc_ds.runtime.preemption",
    "zero": "hpc_ds.zero",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "Engine",
    "FunctionError",
    "HpcdsError",
    "Preempted",
    "RankError",
    "__version__",
    "add_config_arguments",
    "checkpointing",
    "init_distributed",
    "initialize",
    "preemption",
    "submit",
    "zero",
]

if TYPE_CHECKING:
    from hpc_ds import checkpointing, zero
    from hpc_ds.engine.engine import Engine
    from hpc_ds.engine.initialize import add_config_arguments, initialize
    from hpc_ds.errors import CheckpointError, ConfigError, DivergedError, FunctionError, HpcdsError, RankError
    from hpc_ds.runtime import preemption
    from hpc_ds.runtime.preemption import Preempted
    from hpc_ds.runtime.process_group import init_distributed
    from hpc_ds.script.functions import submit


def __getattr__(name: str) -> object:
    """Load a public name from the room it lives in."""
    value: object
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'hpc_ds' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
