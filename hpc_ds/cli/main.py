"""``hpcds``: the app, and the one place where an error of ours becomes a sentence and an exit code.

Every verb imports what it needs when it is called, so that ``--help`` and the light verbs stay fast.
"""

from __future__ import annotations

import gc
import sys
from copy import copy
from typing import Annotated, Optional

import typer

from hpc_ds.cli import checkpoint, config, hostfile, init, rerun, runs, site, status, submit
from hpc_ds.errors import HpcdsError
from hpc_ds.version import __version__

_OBJECTS = 50_000
"""Made until Python looks for garbage. A start makes many that stay: looking at them every 700 takes a tenth of it."""

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
app.command("hostfile")(hostfile.hostfile)
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


def _with(verb: str) -> typer.Typer:
    """The app as far as one call needs it: typer looks at every parameter of every verb that it knows."""
    called = copy(app)
    called.registered_commands = [one for one in app.registered_commands if one.name == verb]
    called.registered_groups = [one for one in app.registered_groups if one.name == verb]
    return called if called.registered_commands or called.registered_groups else app


def main() -> None:
    """Run the command line."""
    gc.set_threshold(_OBJECTS)
    try:
        _with(sys.argv[1] if len(sys.argv) > 1 else "")()
    except HpcdsError as error:
        sys.stderr.write(f"hpcds: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is wrong.
        sys.stderr.close()
        sys.exit(141)
    finally:
        # Python ends by looking for cycles in all that was imported, which takes as long as a verb's own work.
        gc.freeze()
