"""The verbs that act on runs: cancel, preempt, requeue, resume; logs; and supervise, which job scripts call."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_ds.cli.options import (
    AccountOption,
    ConstraintOption,
    CoresOption,
    FollowOption,
    GpusOption,
    JsonOption,
    MemOption,
    NodesOption,
    PartitionOption,
    QosOption,
    RunArgument,
    RunsArgument,
    RunsOption,
    SetOption,
    TasksOption,
    TimeOption,
    options_as_overrides,
)
from hpc_ds.cli.show import show
from hpc_ds.cli.submit import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hpc_ds.cluster.scheduler import Scheduler
    from hpc_ds.report.logs import Said
    from hpc_ds.run_dir import RunDir


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[
        str, typer.Option(metavar="R|all", help="Whose log; all: of all ranks, named before each line.")
    ] = "0",
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt; default: the last.")] = None,
    scheduler: Annotated[
        bool, typer.Option("--scheduler", help="What the job script and the supervisor wrote instead.")
    ] = False,
    runs: RunsOption = Path("runs"),
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object a line: attempt, rank, line.")] = False,
) -> None:
    """Print what a rank wrote."""
    from hpc_ds.errors import ConfigError
    from hpc_ds.report.logs import Wanted, read_logs, read_scheduler_log
    from hpc_ds.run_dir import RunDir

    if rank != "all" and not (rank.isascii() and rank.isdigit()):
        raise ConfigError(f"--rank {rank!r}: not a rank; use 0, 1, ... or all", value=rank)
    whose = None if rank == "all" else int(rank)
    wanted = Wanted(whose, attempt, follow, lines=json_output or whose is None)
    read = read_scheduler_log if scheduler else read_logs
    try:
        for said in read(RunDir.find(run, runs), wanted):
            sys.stdout.write(_said(said, json_output=json_output, named=whose is None and not scheduler))
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def cancel(names: RunsArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """End runs; `resume` can still continue them. A sweep stands for all of its runs."""

    def end(_: RunDir, scheduler: Scheduler, job_id: str) -> str:
        scheduler.cancel(job_id)
        return "cancelled"

    _each(names, runs, end, json_output=json_output)


def preempt(names: RunsArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """Preempt runs: they save and start again by themselves.

    The ranks get the signals that a scheduler would send them.
    """

    def tell(_: RunDir, scheduler: Scheduler, job_id: str) -> str:
        scheduler.preempt(job_id)
        return "preempted"

    _each(names, runs, tell, json_output=json_output)


def requeue(run: RunArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """End this start of a run now, as `scontrol requeue` does, and queue it again.

    The ranks save if there is time. `preempt` asks more gently.
    """
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.requeue import requeue as requeue_run

    found = RunDir.find(run, runs)
    job_id, seen = requeue_run(found)
    if not seen:
        typer.echo("hpcds: warning: the scheduler took the request, but has not acted on it yet", err=True)
    _done([(found, job_id, "requeued")], alone=True, json_output=json_output)


def resume(
    run: RunArgument,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs"),
    nodes: NodesOption = None,
    gpus_per_node: GpusOption = None,
    tasks_per_node: TasksOption = None,
    cpus_per_task: CoresOption = None,
    mem: MemOption = None,
    time_limit: TimeOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    qos: QosOption = None,
    constraint: ConstraintOption = None,
    follow: FollowOption = False,
    json_output: JsonOption = False,
) -> None:
    """Continue a run that was cancelled, held or lost; with other resources, if they are given.

    The job is checked as at submit; the config before is kept as config-before-attempt-N.json. A job that waits in the
    queue, or is held there, is cancelled for a change and submitted anew.
    """
    from hpc_ds.errors import RunError
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.resume import resume as resume_run
    from hpc_ds.supervise.resume_sweep import resume_sweep
    from hpc_ds.sweep_dir import find_sweep, runs_named

    resources = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "tasks_per_node": tasks_per_node, "cpus_per_task": cpus_per_task,
        "mem": mem, "time": time_limit, "partition": partition, "account": account, "qos": qos, "constraint": constraint,
    }  # fmt: skip
    changes = options_as_overrides(resources) + (overrides or [])
    sweep = find_sweep(run, runs)
    if sweep is not None and len(runs_named(run, runs)) > 1:
        if changes:
            raise RunError(f"run {run!r}: a sweep is resumed as it is; change one of its runs, such as {run}/1")
        _done([(one, job_id, "resumed") for one, job_id in resume_sweep(sweep)], alone=False, json_output=json_output)
        return
    found = RunDir.find(run, runs)
    job_id = resume_run(found, changes)
    if changes:
        from hpc_ds.config.load import load_resolved, load_site
        from hpc_ds.script.plan import plan_of

        warn(plan_of(load_resolved(found.config), load_site(str(found.site))).warnings)
    _done([(found, job_id, "resumed")], alone=True, json_output=json_output)
    if follow:
        show_until_over(found, from_now=True)


def supervise(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run folder.")]) -> None:
    """Run one attempt of a run. Job scripts call this; people call `submit`."""
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.supervisor import supervise as supervise_run

    raise typer.Exit(supervise_run(RunDir.open(run_dir)))


def show_until_over(run: RunDir, *, from_now: bool = False) -> None:
    """Print a run as it happens and its summary; exit 1 unless it finished. Ctrl-C stops watching, not the run."""
    from hpc_ds.cluster.queue import Queue
    from hpc_ds.report.follow import follow
    from hpc_ds.report.status import status_of
    from hpc_ds.report.summary import summary

    queue = Queue()
    try:
        for line in follow(run, queue, from_now=from_now):
            typer.echo(f"{time.strftime('%H:%M:%S')}  {line}")
    except KeyboardInterrupt:
        typer.echo(f"\nthe run goes on; `hpcds logs -f {run.root}` shows it again", err=True)
        raise typer.Exit(130) from None
    story = summary(run, status_of(run, queue))
    typer.echo()
    show(story)
    if story.status.state != "finished":
        raise typer.Exit(1)


def _said(said: Said, *, json_output: bool, named: bool) -> str:
    if json_output:
        return json.dumps({"attempt": said.attempt, "rank": said.rank, "line": said.text}) + "\n"
    return f"{said.rank}: {said.text}\n" if named else said.text


def _each(names: Sequence[str], runs: Path, do: Callable[[RunDir, Scheduler, str], str], *, json_output: bool) -> None:
    """Do something to every run that is named; one that refuses does not keep the others from it."""
    from hpc_ds.errors import HpcdsError

    done, refusal = [], None
    for name in _expanded(names, runs):
        try:
            found, scheduler, job_id = _job(name, runs)
            done.append((found, job_id, do(found, scheduler, job_id)))
        except HpcdsError as error:
            if len(names) == 1 and isinstance(name, str):
                raise
            typer.echo(f"hpcds: {error}", err=True)
            refusal = refusal or error
    _done(done, alone=len(names) == len(done) == 1, json_output=json_output)
    if refusal is not None:
        raise typer.Exit(refusal.exit_code)


def _expanded(names: Sequence[str], runs: Path) -> list[str | RunDir]:
    """The names; in the place of a sweep, its runs that are not over, the last first: none starts because another ends."""
    from hpc_ds.cluster.queue import Queue
    from hpc_ds.report.status import statuses_of
    from hpc_ds.sweep_dir import find_sweep, runs_named

    expanded: list[str | RunDir] = []
    for name in names:
        if find_sweep(name, runs) is None:
            expanded.append(name)
            continue
        found = runs_named(name, runs)
        states = statuses_of(found, Queue())
        going = [run for run, state in zip(found, states, strict=True) if not state.over or state.state == "held"]
        expanded += going[::-1]
    return expanded


def _job(run: str | RunDir, runs: Path) -> tuple[RunDir, Scheduler, str]:
    from hpc_ds.cluster.connect import scheduler_named
    from hpc_ds.errors import RunError
    from hpc_ds.run_dir import RunDir, read_object

    found = RunDir.find(run, runs) if isinstance(run, str) else run
    job_id = str(read_object(found.job).get("job_id", ""))
    if not job_id:
        raise RunError(f"run {str(run)!r}: it was never submitted; `hpcds resume` submits it")
    return found, scheduler_named(str(read_object(found.site).get("scheduler")), found), job_id


def _done(done: Sequence[tuple[RunDir, str, str]], *, alone: bool, json_output: bool) -> None:
    data = [{"run_dir": str(run.root), "job_id": job_id, "action": verb} for run, job_id, verb in done]
    if json_output:
        typer.echo(json.dumps(data[0] if alone else data))
    else:
        for run, job_id, verb in done:
            typer.echo(f"{verb} job {job_id}, run {run.root}")
