"""``hpcds submit``: a job, from a file or straight from a script, with its plan before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    RunsOption,
    SetOption,
    SiteOption,
    TasksOption,
    TimeOption,
    UncheckedOption,
    options_as_overrides,
)

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig


def submit(
    target: Annotated[str, typer.Argument(metavar="JOB.json|SCRIPT.py", help="A job file, or a training script.")],
    args: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGS]", help="Arguments for the script.")] = None,
    site: SiteOption = None,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs"),
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    nodes: NodesOption = None,
    gpus_per_node: GpusOption = None,
    tasks_per_node: TasksOption = None,
    cpus_per_task: CoresOption = None,
    mem: MemOption = None,
    time: TimeOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    qos: QosOption = None,
    constraint: ConstraintOption = None,
    training: Annotated[
        Path | None, typer.Option("--deepspeed-config", "--training", help="The DeepSpeed JSON.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script and the plan, and stop.")] = False,
    unchecked: UncheckedOption = False,
    follow: FollowOption = False,
    json_output: JsonOption = False,
) -> None:
    """Submit a job, from a file or straight from a script.

    Before it is queued the job is held against the site's limits, the files it names, and Slurm's own opinion.
    """
    resources = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "tasks_per_node": tasks_per_node, "cpus_per_task": cpus_per_task,
        "mem": mem, "time": time, "partition": partition, "account": account, "qos": qos, "constraint": constraint,
    }  # fmt: skip
    asked = options_as_overrides(resources, name=name, training=training) + (overrides or [])
    job = _load(target, asked, args or [])
    chosen = _site(job, site)
    if dry_run:
        _preview(job, chosen, runs, check=not unchecked, json_output=json_output)
    else:
        _submit(job, chosen, runs, check=not unchecked, follow=follow, json_output=json_output)


def _site(job: JobConfig, name: str | None) -> SiteConfig:
    from hpc_ds.config.load import load_site

    return load_site(name or _site_name(job))


def _preview(job: JobConfig, site: SiteConfig, runs: Path, *, check: bool, json_output: bool) -> None:
    from hpc_ds.script.plan import plan_lines
    from hpc_ds.script.submit import preview

    text, plan = preview(job, site, runs, check=check)
    if json_output:
        typer.echo(json.dumps({"site": site.name, "script": text, "plan": plan.as_data()}))
        return
    typer.echo(text + "\n# The plan; nothing is queued yet.\n" + "\n".join(f"# {line}" for line in plan_lines(plan)))


def _submit(job: JobConfig, site: SiteConfig, runs: Path, *, check: bool, follow: bool, json_output: bool) -> None:
    from hpc_ds.script.submit import submit as submit_job

    done = submit_job(job, site, runs, check=check)
    warn(done.warnings)
    if json_output:
        typer.echo(json.dumps({"run_dir": str(done.run.root), "job_id": done.job_id, "site": site.name}))
    else:
        typer.echo(f"job {done.job_id} on site {site.name}\nrun {done.run.root}")
    if follow:
        from hpc_ds.cli.runs import show_until_over

        show_until_over(done.run)


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


def warn(warnings: list[str]) -> None:
    """Say on stderr what is worth a look."""
    for warning in warnings:
        typer.echo(f"hpcds: warning: {warning}", err=True)
