"""Start an agent from the very files that the launcher runs, whatever the host's Python has installed.

A program, to be run as ``python -I -S start_agent.py``: the current folder, PYTHONPATH and installed packages, which are
the ranks' business, can hide none of the agent's modules.
"""

import sys
from pathlib import Path


def _main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    import hpc_ds  # noqa: F401 - the modules below it are found by its path from here on

    del sys.path[0]
    from hpc_ds.launch.agent import main

    return main()


if __name__ == "__main__":
    sys.exit(_main())
