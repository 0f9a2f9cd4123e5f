"""The name ``deepspeed`` for scripts that import it: all of it forwards to hpc_ds (docs/decisions/019).

``path/`` holds a package of that name, with the metadata by which transformers and accelerate look for it. It is found only
where ``path/`` is put before everything else on the path: by ``activate()``, ``hpcds run --as-deepspeed``, or ``"compat":
"deepspeed"`` in a job. Loads no torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpc_ds.errors import ConfigError

PATH = Path(__file__).with_name("path")
"""The folder that has the package ``deepspeed``, and nothing else that could be imported by accident."""


def activate() -> None:
    """Let ``import deepspeed`` find hpc_ds from now on, here and in the processes that this one starts.

    A real DeepSpeed that is installed too stays where it is, and is not found. Call this before anything that looks for
    DeepSpeed is imported: transformers and accelerate look when they are.

    Raises:
        ConfigError: the real one is imported already.
    """
    from hpc_ds.compat.environment import variables_of_the_name
    from hpc_ds.compat.startup import sitecustomize

    loaded = sys.modules.get("deepspeed")
    if loaded is not None and not str(getattr(loaded, "__file__", "")).startswith(f"{PATH}{os.sep}"):
        raise ConfigError(
            f"deepspeed: the package at {getattr(loaded, '__file__', None)!r} is imported already; call "
            "hpc_ds.compat.activate() before it, first in the script"
        )
    sys.path[:] = [str(PATH), *(folder for folder in sys.path if folder != str(PATH))]
    os.environ.update(variables_of_the_name(os.environ))
    sitecustomize.install()
