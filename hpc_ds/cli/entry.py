"""``hpcds``: where a command line begins, and the one place where an error of ours is made a sentence and an exit code.

``run`` goes past typer, whose import takes longer than the whole start of a rank.
"""

from __future__ import annotations

import gc
import sys

from hpc_ds.errors import HpcdsError

_OBJECTS = 50_000
"""Made until Python looks for garbage. A start makes many that stay: looking at them every 700 takes a tenth of it."""


def main() -> None:
    """Run the command line."""
    gc.set_threshold(_OBJECTS)
    try:
        if sys.argv[1:2] == ["run"]:
            from hpc_ds.cli.run import run

            sys.exit(run(sys.argv[2:]))
        from hpc_ds.cli.main import app_of

        app_of(sys.argv[1] if len(sys.argv) > 1 else "")()
    except HpcdsError as error:
        name = "hpcds run" if sys.argv[1:2] == ["run"] else "hpcds"
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is wrong.
        sys.stderr.close()
        sys.exit(141)
    finally:
        # Python ends by looking for cycles in all that was imported, which takes as long as a verb's own work.
        gc.freeze()
