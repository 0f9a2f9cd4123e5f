"""``hpc_ds.checkpointing``, for scripts: activation checkpointing as DeepSpeed's."""

from hpc_ds.engine.activation_checkpointing import checkpoint, configure, is_configured, reset

__all__ = ["checkpoint", "configure", "is_configured", "reset"]
