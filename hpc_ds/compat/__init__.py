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

    Call it before anything that looks for DeepSpeed is imported: transformers and accelerate look when they are. Sets what
    ``environment.py`` lists.

    Raises:
        ConfigError: the real one, or accelerate without any, is imported already; or the folder of hpc_ds has a name that no
            path can hold.
    """
    loaded = sys.modules.get("deepspeed")
    if loaded is not None and not str(getattr(loaded, "__file__", "")).startswith(str(PATH)):
        raise ConfigError(
            f"deepspeed: the package at {getattr(loaded, '__file__', None)!r} is imported already; call "
            "hpc_ds.compat.activate() before it, first in the script"
        )
    if "accelerate.utils" in sys.modules and not hasattr(sys.modules["accelerate.utils"], "DeepSpeedEngineWrapper"):
        raise ConfigError(
            "accelerate: it is imported already, and has found no deepspeed; call hpc_ds.compat.activate() before it, first in the "
            "script"
        )
    from hpc_ds.compat.environment import variables_of_the_name, variables_of_the_rank
    from hpc_ds.compat.startup.sitecustomize import install

    os.environ.update({**variables_of_the_name(os.environ), **variables_of_the_rank(os.environ)})
    folder = str(PATH)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    install()
