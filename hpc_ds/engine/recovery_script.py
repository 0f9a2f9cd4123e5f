"""``zero_to_fp32.py`` beside the checkpoints of a script that says ``import deepspeed``: DeepSpeed puts one there too."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hpc_ds.runtime.by_name import goes_by_deepspeed

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("hpc_ds")

NAME = "zero_to_fp32.py"

_SCRIPT = '''#!/usr/bin/env python
"""Whole fp32 weights of a checkpoint beside this file, by hpc_ds: python zero_to_fp32.py . OUTPUT_DIR [--help]"""

from hpc_ds.compat.zero_to_fp32 import main

main()
'''


def leave_recovery_script(folder: Path) -> None:
    """Write it, where hpc_ds goes by the name deepspeed in this process and there is none. For rank 0."""
    path = folder / NAME
    if not goes_by_deepspeed() or path.exists():
        return
    try:
        path.write_text(_SCRIPT, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:  # the checkpoint is durable: nothing is lost for want of this
        log.warning("%s is not written: %s", path, error.strerror)
