"""``hpcds hostfile``: write the hostfile of a node list, or of the Slurm job or step it is called in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def hostfile(
    node_list: Annotated[
        str | None,
        typer.Argument(metavar="NODELIST", help="Hosts, as 'gpu[01-04]'. Default: those of this Slurm job or step."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", metavar="N", help="Processes on each host. Default: what the Slurm job asks, else 1."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write this file instead of printing.")
    ] = None,
    form: Annotated[
        str, typer.Option(metavar="FORM", help="What will read it: deepspeed, openmpi, mpich (NAME:N) or plain (NAME).")
    ] = "deepspeed",
    json_output: Annotated[bool, typer.Option("--json", help="A JSON list of {name, slots} instead.")] = False,
) -> None:
    """Print a node list, or this Slurm job, as a hostfile.

    One line a host: NAME slots=N, or as --form says.
    """
    import json
    import os

    from hpc_ds.errors import ConfigError
    from hpc_ds.launch.gres import with_gpus
    from hpc_ds.launch.hostfile import hosts_from_list, hosts_from_slurm, render, write

    if json_output and form != "deepspeed":
        raise ConfigError(f"--form {form!r}: is for text, and --json is none; leave one out", key="form", value=form)
    if node_list is None:
        hosts = hosts_from_slurm(os.environ if slots is not None else with_gpus(os.environ), slots)
    else:
        hosts = hosts_from_list(node_list, 1 if slots is None else slots)
    text = json.dumps([host._asdict() for host in hosts]) + "\n" if json_output else render(hosts, form)
    if output is None:
        print(text, end="")
    else:
        write(output, text)
