"""The verbs on a run that exists: status, logs, cancel, preempt, resume, supervise."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_ds.cli.show import show
from hpc_ds.cli.submit import JsonOption, RunsOption

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.cluster.scheduler import Scheduler
    from hpc_ds.run_dir import RunDir


def _known_runs(incomplete: str) -> list[str]:
    runs = Path("runs")
    names = [path.name for path in runs.iterdir() if (path / "config.json").is_file()] if runs.is_dir() else []
    return sorted(name for name in names if name.startswith(incomplete))


RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, a job id or a run's name.", autocompletion=_known_runs)
]


def status(run: RunArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """Say what a run is doing, and how its attempts ended."""
    from hpc_ds.report.status import status_of
    from hpc_ds.report.summary import summary
    from hpc_ds.run_dir import RunDir

    found = RunDir.find(run, runs)
    if json_output:
        typer.echo(json.dumps(status_of(found).as_data()))
        return
    show(summary(found))


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt; default: the last.")] = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Print what a rank wrote."""
    from hpc_ds.run_dir import RunDir

    for text in _log_text(RunDir.find(run, runs), rank, attempt, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def cancel(run: RunArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """End a run; `resume` can still continue it."""
    found, scheduler, job_id = _job(run, runs)
    scheduler.cancel(job_id)
    _done(found, job_id, "cancelled", json_output=json_output)


def preempt(run: RunArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """Preempt a run: it saves and starts again by itself.

    The ranks get the signals that a scheduler would send them.
    """
    found, scheduler, job_id = _job(run, runs)
    scheduler.preempt(job_id)
    _done(found, job_id, "preempted", json_output=json_output)


def resume(
    run: RunArgument,
    runs: RunsOption = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the run until it is over.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Continue a run that was cancelled, held or lost."""
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.resume import resume as resume_run

    found = RunDir.find(run, runs)
    job_id = resume_run(found)
    _done(found, job_id, "resumed", json_output=json_output)
    if follow:
        show_until_over(found)


def supervise(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run folder.")]) -> None:
    """Run one attempt of a run. Job scripts call this; people call `submit`."""
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.supervisor import supervise as supervise_run

    raise typer.Exit(supervise_run(RunDir.open(run_dir)))


def show_until_over(run: RunDir) -> None:
    """Print a run as it happens and its summary; exit 1 unless it finished. Ctrl-C stops watching, not the run."""
    from hpc_ds.report.follow import follow
    from hpc_ds.report.summary import summary

    try:
        for line in follow(run):
            typer.echo(f"{time.strftime('%H:%M:%S')}  {line}")
    except KeyboardInterrupt:
        typer.echo(f"\nthe run goes on; `hpcds logs -f {run.root}` shows it again", err=True)
        raise typer.Exit(130) from None
    story = summary(run)
    typer.echo()
    show(story)
    if story.status.state != "finished":
        raise typer.Exit(1)


def _job(run: str, runs: Path) -> tuple[RunDir, Scheduler, str]:
    from hpc_ds.cluster.connect import scheduler_named
    from hpc_ds.errors import RunError
    from hpc_ds.run_dir import RunDir, read_object

    found = RunDir.find(run, runs)
    job_id = str(read_object(found.job).get("job_id", ""))
    if not job_id:
        raise RunError(f"run {run!r}: it was never submitted; `hpcds resume` submits it")
    return found, scheduler_named(str(read_object(found.site).get("scheduler")), found), job_id


def _done(run: RunDir, job_id: str, verb: str, *, json_output: bool) -> None:
    data = {"run_dir": str(run.root), "job_id": job_id, "action": verb}
    typer.echo(json.dumps(data) if json_output else f"{verb} job {job_id}, run {run.root}")


def _log_text(run: RunDir, rank: int, attempt: int | None, *, follow: bool) -> Iterator[str]:
    """The text of a rank's log; with ``follow`` of the attempts after it too, until the run is over."""
    from hpc_ds.errors import RunError
    from hpc_ds.launch.runner import rank_log
    from hpc_ds.report.status import OVER, status_of
    from hpc_ds.supervise.ledger import read_ledger

    number = attempt or max(len(read_ledger(run)), 1)
    position = 0
    while True:
        log = rank_log(run.attempt_logs(number), rank)
        over = not follow or status_of(run).state in OVER
        if not follow and not log.exists():
            raise RunError(f"log {str(log)!r}: no such file; that rank or attempt has written nothing")
        if log.exists():
            with log.open("r", encoding="utf-8", errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if len(read_ledger(run)) > number and attempt is None:
            number, position = number + 1, 0
            continue
        if over:
            return
        time.sleep(0.5)
