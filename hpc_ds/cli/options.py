"""The arguments and options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping


def known_runs(incomplete: str) -> list[str]:
    """What a shell may complete a RUN to."""
    runs = Path("runs")
    marks = ("config.json", "hpcds-sweep.json")
    known = runs.iterdir() if runs.is_dir() else ()
    names = [path.name for path in known if any((path / mark).is_file() for mark in marks)]
    return sorted(name for name in names if name.startswith(incomplete))


RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, a job id or a run's name.", autocompletion=known_runs)
]
SomeRuns = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN]...", help="Run or sweep folders, job ids or names.", autocompletion=known_runs),
]
RunsArgument = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Run or sweep folders, job ids or names.", autocompletion=known_runs),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job, such as resources.nodes=4."),
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where the run folders are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Show the run until it is over.")]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="A site's name or file; default: the job's, else found out.")
]
AfterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--after",
        metavar="RUN[:ok|any|notok]",
        help="Start when that run is over: finished (ok, the default), however, or not.",
    ),
]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=V1,V2,...|FILE.json",
        help="A run for each value, or combination of values, as one array.",
    ),
]
ThrottleOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Of a sweep, at most so many at a time; on site local 1 is the default."),
]
UncheckedOption = Annotated[
    bool, typer.Option("--no-check", help="Queue it without asking the site's limits and `sbatch --test-only` first.")
]

NodesOption = Annotated[int | None, typer.Option(help="Nodes.")]
GpusOption = Annotated[int | None, typer.Option(help="GPUs on each node.")]
TasksOption = Annotated[int | None, typer.Option(help="Ranks on each node; default: one per GPU, else one.")]
CoresOption = Annotated[int | None, typer.Option(help="Cores of each rank.")]
MemOption = Annotated[str | None, typer.Option(help="Memory of a node, as sbatch takes it.")]
TimeOption = Annotated[str | None, typer.Option("--time", help="Time limit of one start, as sbatch takes it.")]
PartitionOption = Annotated[str | None, typer.Option(help="Partition.")]
AccountOption = Annotated[str | None, typer.Option(help="Account.")]
QosOption = Annotated[str | None, typer.Option(help="Quality of service.")]
ConstraintOption = Annotated[str | None, typer.Option(help="Node features.")]


def options_as_overrides(
    resources: Mapping[str, Any], name: str | None = None, training: Path | None = None
) -> list[str]:
    """Options of the command line as ``key=value``; those that were not given are left out."""
    options: dict[str, Any] = {f"resources.{key}": value for key, value in resources.items()}
    options |= {"name": name, "training": None if training is None else str(training.resolve())}
    return [f"{key}={value}" for key, value in options.items() if value is not None]
