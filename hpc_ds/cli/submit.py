"""``hpcds submit``, and the arguments and options that several verbs have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_ds.config.job import JobConfig


def known_runs(incomplete: str) -> list[str]:
    """What a shell may complete a RUN to."""
    runs = Path("runs")
    names = [path.name for path in runs.iterdir() if (path / "config.json").is_file()] if runs.is_dir() else []
    return sorted(name for name in names if name.startswith(incomplete))


RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, a job id or a run's name.", autocompletion=known_runs)
]
SomeRuns = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN]...", help="Run folders, job ids or runs' names.", autocompletion=known_runs),
]
RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run folders, job ids or runs' names.", autocompletion=known_runs)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job, such as resources.nodes=4."),
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where the run folders are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def submit(
    target: Annotated[str, typer.Argument(metavar="JOB.json|SCRIPT.py", help="A job file, or a training script.")],
    args: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGS]", help="Arguments for the script.")] = None,
    site: Annotated[
        str | None, typer.Option("--site", help="A site's name or file; default: the job's, else found out.")
    ] = None,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs"),
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs on each node.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(help="Ranks on each node; default: one per GPU, else one.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Cores of each rank.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of a node, as sbatch takes it.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one start, as sbatch takes it.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Node features.")] = None,
    training: Annotated[
        Path | None, typer.Option("--deepspeed-config", "--training", help="The DeepSpeed JSON.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script and stop.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the run until it is over.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Submit a job, from a file or straight from a script."""
    from hpc_ds.config.load import load_site
    from hpc_ds.script.submit import preview
    from hpc_ds.script.submit import submit as submit_job

    resources = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "tasks_per_node": tasks_per_node, "cpus_per_task": cpus_per_task,
        "mem": mem, "time": time, "partition": partition, "account": account, "qos": qos, "constraint": constraint,
    }  # fmt: skip
    asked = options_as_overrides(resources, name=name, training=training) + (overrides or [])
    job = _load(target, asked, args or [])
    chosen = load_site(site or _site_name(job))
    if dry_run:
        text = preview(job, chosen, runs)
        typer.echo(json.dumps({"site": chosen.name, "script": text}) if json_output else text, nl=json_output)
        return
    warn(job)
    run, job_id = submit_job(job, chosen, runs)
    if json_output:
        typer.echo(json.dumps({"run_dir": str(run.root), "job_id": job_id, "site": chosen.name}))
    else:
        typer.echo(f"job {job_id} on site {chosen.name}\nrun {run.root}")
    if follow:
        from hpc_ds.cli.runs import show_until_over

        show_until_over(run)


def options_as_overrides(
    resources: Mapping[str, Any], name: str | None = None, training: Path | None = None
) -> list[str]:
    """Options of the command line as ``key=value``; those that were not given are left out."""
    options: dict[str, Any] = {f"resources.{key}": value for key, value in resources.items()}
    options |= {"name": name, "training": None if training is None else str(training.resolve())}
    return [f"{key}={value}" for key, value in options.items() if value is not None]


def _load(target: str, overrides: list[str], args: list[str]) -> JobConfig:
    from hpc_ds.config.job import is_run_name
    from hpc_ds.config.load import build_job, load_job_file

    if target.endswith(".json"):
        return load_job_file(Path(target), overrides, args)
    script = Path(target)
    data: dict[str, Any] = {"script": str(script)}
    if not any(override.startswith("name=") for override in overrides) and is_run_name(script.stem):
        data["name"] = script.stem
    return build_job(data, overrides, args, file=target, base=Path.cwd())


def _site_name(job: JobConfig) -> str:
    if job.site != "auto":
        return job.site
    from hpc_ds.cluster.connect import detect_site

    return detect_site()


def warn(job: JobConfig) -> None:
    """Say what a job's training config asks for in vain."""
    from hpc_ds.config.load import check_training

    warnings = []
    if isinstance(job.training, dict):
        warnings += check_training(job.training, job.resources, "job")
    for warning in warnings:
        typer.echo(f"hpcds: warning: {warning}", err=True)
