"""``python -m hpc_ds.compat PROGRAM [ARGS]``: run a program for which the name ``deepspeed`` means hpc_ds, as env(1) would.

It becomes that program, with what ``environment.py`` lists set. It runs with the interpreter of the rank, in its container
where there is one, so that all paths are right there. Loads no torch.
"""

from __future__ import annotations

import os
import sys

from hpc_ds.compat.environment import variables_of_the_name, variables_of_the_rank
from hpc_ds.errors import HpcdsError

_CANNOT_RUN, _NOT_FOUND = 126, 127


def main(words: list[str]) -> int:
    """Become the program; returns an exit code only where that cannot be done."""
    if not words:
        return _complain("program: missing; write python -m hpc_ds.compat PROGRAM [ARGS]", 2)
    try:
        environ = {**os.environ, **variables_of_the_name(os.environ), **variables_of_the_rank(os.environ)}
    except HpcdsError as error:
        return _complain(str(error), error.exit_code)
    try:
        os.execvpe(words[0], words, environ)  # noqa: S606 - a command is a list already
    except FileNotFoundError:
        return _complain(f"program {words[0]!r}: not found; give its path, or have it on PATH", _NOT_FOUND)
    except (OSError, ValueError) as error:  # ValueError: an empty name
        problem = getattr(error, "strerror", None) or str(error)
        return _complain(f"program {words[0]!r}: cannot be run: {problem}; name one that can", _CANNOT_RUN)


def _complain(text: str, code: int) -> int:
    sys.stderr.write(f"hpc_ds.compat: {text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
