"""Whether a script knows this engine by the name ``deepspeed`` (docs/decisions/019)."""

from __future__ import annotations

import sys


def goes_by_deepspeed() -> bool:
    """Whether ``import deepspeed`` has found hpc_ds in this process."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "")).endswith("+hpcds")
