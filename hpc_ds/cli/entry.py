"""``hpcds``: where a command line begins, and the one place where an error of ours is made a sentence and an exit code.

``run`` goes past typer, whose import takes longer than the whole start of a rank.
"""

from __future__ import annotations

import sys

from hpc_ds.errors import HpcdsError


def main() -> None:
    """Run the command line."""
    try:
        if sys.argv[1:2] == ["run"]:
            from hpc_ds.cli.run import run

            sys.exit(run(sys.argv[2:]))
        from hpc_ds.cli.main import app

        app()
    except HpcdsError as error:
        name = "hpcds run" if sys.argv[1:2] == ["run"] else "hpcds"
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is wrong.
        sys.stderr.close()
        sys.exit(141)
