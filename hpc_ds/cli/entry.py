"""``hpcds``: where a command line begins, and the one place where an error of ours is made a sentence and an exit code.

``run`` goes past typer, whose import takes longer than the whole start of a rank.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys

from hpc_ds.errors import HpcdsError

_OBJECTS = 50_000
"""Made until Python looks for garbage. A start makes many that stay: looking at them every 700 takes a tenth of it."""


_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main() -> None:
    """Run the command line."""
    gc.set_threshold(_OBJECTS)
    try:
        _call(sys.argv[1:])
    except HpcdsError as error:
        name = "hpcds run" if sys.argv[1:2] == ["run"] else "hpcds"
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is wrong.
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        sys.stderr.write(f"hpcds: output: cannot be written: {error.strerror}; look at where it goes\n")
        os.close(1)  # else what is still held back is tried once more
        sys.exit(1)
    finally:
        # Python ends by looking for cycles in all that was imported, which takes as long as a verb's own work.
        gc.freeze()


def _call(words: list[str]) -> None:
    try:
        if words[:1] == ["run"]:
            from hpc_ds.cli.run import run

            sys.exit(run(words[1:]))
        from hpc_ds.cli.main import app_of

        app_of(words[0] if words else "")()
    finally:
        sys.stdout.flush()
