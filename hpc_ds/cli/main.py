"""``hpcds``: the app of all verbs; ``entry.py`` calls it.

Every verb imports what it needs when it is called, so that ``--help`` and the light verbs stay fast.
"""

from __future__ import annotations

from copy import copy
from typing import Annotated, Optional

import typer

from hpc_ds.cli import checkpoint, compat, config, doctor, hostfile, init, rerun, runs, site, status, submit
from hpc_ds.version import __version__


def run_ranks(context: typer.Context) -> None:
    """Start a script as ranks: here, on hosts, or in a Slurm allocation.

    Takes the options of DeepSpeed's launcher; `hpcds run --help` lists them.
    """
    from hpc_ds.cli.run import run

    raise typer.Exit(run(context.args))


app = typer.Typer(
    name="hpcds",
    help="Training jobs on Slurm and on this machine that own themselves until their last step.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init.init)
app.command("schema")(init.schema)
app.command("submit", context_settings={"allow_interspersed_args": True})(submit.submit)
app.command("rerun")(rerun.rerun)
app.command("status")(status.status)
app.command("list")(status.list_runs)
app.command("history")(status.history)
app.command("report")(status.report)
app.command("logs")(runs.logs)
app.command("cancel")(runs.cancel)
app.command("preempt")(runs.preempt)
app.command("requeue")(runs.requeue)
app.command("resume")(runs.resume)
app.command(
    "run",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True},
)(run_ranks)
app.command("compat")(compat.compat)
app.command("hostfile")(hostfile.hostfile)
app.command(
    "doctor",
    # Without -h: it would be found within -Hhosts, which hpcds run takes.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)(doctor.doctor)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(config.app, name="config")
app.add_typer(site.app, name="site")
app.command("supervise")(runs.supervise)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpcds {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        Optional[bool],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop."),
    ] = None,
) -> None:
    """Training jobs on Slurm and on this machine that own themselves until their last step."""


def app_of(verb: str) -> typer.Typer:
    """The app as far as one call needs it: typer looks at every parameter of every verb that it knows."""
    called = copy(app)
    called.registered_commands = [one for one in app.registered_commands if one.name == verb]
    called.registered_groups = [one for one in app.registered_groups if one.name == verb]
    return called if called.registered_commands or called.registered_groups else app
