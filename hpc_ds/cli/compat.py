"""``hpcds compat``: the lines by which a shell takes hpc_ds for DeepSpeed."""

from __future__ import annotations

from typing import Annotated

import typer


def compat(
    shell: Annotated[
        str, typer.Option(metavar="SHELL", help="Which shell reads the lines: sh (bash, zsh), or fish.")
    ] = "sh",
) -> None:
    """Print the lines by which a shell takes hpc_ds for DeepSpeed.

    From eval "$(hpcds compat)" on, in this shell and all that it starts, `import deepspeed` finds hpc_ds, and `deepspeed`
    and `ds` are `hpcds run --as-deepspeed`. In fish it is: hpcds compat --shell fish | source

    A DeepSpeed that is installed is hidden, not changed: another shell finds it as before. For one launch say hpcds run
    --as-deepspeed instead, for a submitted run "compat": "deepspeed" in its job file, for one program python -m
    hpc_ds.compat PROGRAM.
    """
    import os
    import shlex
    import sys

    from hpc_ds.compat.environment import variables_of_the_name
    from hpc_ds.errors import ConfigError

    if shell not in {"sh", "fish"}:
        raise ConfigError(
            f"--shell {shell!r}: not a shell whose lines are known; use sh or fish", key="shell", value=shell
        )
    lines = []
    for name, value in variables_of_the_name(os.environ).items():
        if shell == "sh":
            lines.append(f"export {name}={shlex.quote(value)}")
        else:
            quoted = value.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"set -gx {name} '{quoted}'")
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode("\n".join(lines) + "\n"))
