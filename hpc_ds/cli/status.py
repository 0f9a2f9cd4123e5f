"""The verbs that tell of runs: status, list, history, report."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_ds.cli.options import JsonOption, RunArgument, RunsOption, SomeRuns
from hpc_ds.cli.show import console, history_table, list_table, show, show_goodput, status_line, status_table, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hpc_ds.report.status import Status
    from hpc_ds.run_dir import RunDir


def status(
    names: SomeRuns = None,
    runs: RunsOption = Path("runs"),
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again and again until all are over; Ctrl-C stops watching.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Say what runs are doing: one in full, several in a table.

    A sweep stands for all of its runs. Without RUN those of --runs that are not over (with --watch those too that are made
    meanwhile); `hpcds list` shows all. With
    --json one RUN is an object, several (or none given) are a list; --watch prints one line of that whenever something
    is new.
    """
    from hpc_ds.cluster.queue import Queue
    from hpc_ds.report.status import statuses_of
    from hpc_ds.report.summary import summary
    from hpc_ds.report.watch import watch as watch_runs
    from hpc_ds.run_dir import RunDir
    from hpc_ds.sweep_dir import runs_named

    queue = Queue()
    if names:
        found = [run for name in names for run in runs_named(name, runs)]
        statuses = [] if watch else statuses_of(found, queue)
    else:
        known = RunDir.all_in(runs)
        going = [(run, one) for run, one in zip(known, statuses_of(known, queue), strict=True) if not one.over]
        found, statuses = [run for run, _ in going], [one for _, one in going]
    alone = names is not None and len(names) == len(found) == 1
    if watch and found:
        looks = watch_runs(found, queue, folder=None if names else runs)
        _watch(looks, alone=found[0] if alone else None, json_output=json_output)
    elif json_output:
        typer.echo(_as_json(statuses, alone=alone))
    elif alone:
        show(summary(found[0], statuses[0]))
    elif not found:
        typer.echo(f"no run in {str(runs)!r} is going on; `hpcds list` shows all")
    else:
        console().print(status_table(statuses))


def list_runs(
    runs: RunsOption = Path("runs"),
    everywhere: Annotated[bool, typer.Option("--all", "-a", help="Those in other folders too.")] = False,
    json_output: JsonOption = False,
) -> None:
    """List all runs, oldest first."""
    from hpc_ds.cluster.queue import Queue
    from hpc_ds.report.status import statuses_of
    from hpc_ds.run_dir import RunDir

    now, known = time.time(), RunDir.all_in(runs, elsewhere=everywhere)
    rows = [
        {
            "run_dir": one.run_dir,
            "name": one.name,
            "site": one.site,
            "job_id": one.job_id,
            "state": one.state,
            "step": one.step,
            "attempts": len(one.attempts),
            "submitted": one.submitted,
            "age_s": None if one.submitted is None else round(max(now - one.submitted, 0.0), 1),
        }
        for one in statuses_of(known, Queue())
    ]
    if json_output:
        typer.echo(json.dumps(rows))
    elif not rows:
        typer.echo(f"no run in {str(runs)!r}; `hpcds list --all` looks into other folders too")
    else:
        console().print(list_table(rows, paths=everywhere))


def history(run: RunArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """List the attempts of a run: why each ended, what followed, what it cost."""
    from hpc_ds.report.history import history as history_of
    from hpc_ds.report.status import status_of
    from hpc_ds.run_dir import RunDir

    one = status_of(RunDir.find(run, runs))
    rows = history_of(one.attempts, time.time(), over=one.over)
    if json_output:
        typer.echo(json.dumps(rows))
    elif not rows:
        typer.echo(f"{one.name}: no attempt yet; {one.reason}")
    else:
        console().print(history_table(rows))


def report(run: RunArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """Say where the time of a run went.

    Goodput is the time in steps that counted, divided by the time that was allocated.
    """
    from hpc_ds.report.goodput import goodput_of
    from hpc_ds.run_dir import RunDir

    found = goodput_of(RunDir.find(run, runs))
    if json_output:
        typer.echo(json.dumps(found.as_data()))
    else:
        show_goodput(found)


def _as_json(statuses: Sequence[Status], *, alone: bool) -> str:
    return json.dumps(statuses[0].as_data() if alone else [one.as_data() for one in statuses])


def _watch(looks: Iterator[list[Status]], *, alone: RunDir | None, json_output: bool) -> None:
    try:
        if json_output:
            _watch_json(looks, alone=alone is not None)
        elif sys.stdout.isatty():
            _watch_live(looks, alone=alone)
        else:
            _watch_lines(looks)
    except KeyboardInterrupt:
        typer.echo("\nno longer watching; the runs go on", err=True)
        raise typer.Exit(130) from None


def _watch_json(looks: Iterator[list[Status]], *, alone: bool) -> None:
    before = ""
    for statuses in looks:
        text = _as_json(statuses, alone=alone)
        if text != before:
            typer.echo(text)
            sys.stdout.flush()
        before = text


def _watch_live(looks: Iterator[list[Status]], *, alone: RunDir | None) -> None:
    from rich.live import Live

    from hpc_ds.report.summary import facts, summary

    statuses: list[Status] = []
    with Live(console=console(), auto_refresh=False, transient=alone is not None) as live:
        for statuses in looks:
            live.update(told(statuses[0], facts(statuses[0])) if alone else status_table(statuses), refresh=True)
    if alone is not None:
        show(summary(alone, statuses[0]))


def _watch_lines(looks: Iterator[list[Status]]) -> None:
    from hpc_ds.report.watch import News

    news = News()
    for statuses in looks:
        for one in news.of(statuses):
            typer.echo(status_line(one))
        sys.stdout.flush()
