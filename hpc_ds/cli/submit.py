"""``hpcds submit``: a job, from a file or straight from a script, with its plan before anything is queued."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_ds.cli.options import (
    AccountOption,
    AfterOption,
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
    SweepOption,
    TasksOption,
    ThrottleOption,
    TimeOption,
    UncheckedOption,
    options_as_overrides,
)

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.script.sweep import SubmittedSweep
    from hpc_ds.script.waiting import Wait


def submit(
    target: Annotated[str, typer.Argument(metavar="JOB.json|SCRIPT.py", help="A job file, or a training script.")],
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGS]", help="Arguments for the script; with --chain further job files."),
    ] = None,
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
    after: AfterOption = None,
    chain: Annotated[
        bool, typer.Option("--chain", help="Several job files: each starts when the one before has finished.")
    ] = False,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Run from a copy of the files that git tracks, as they are now.")
    ] = False,
    sweep: SweepOption = None,
    throttle: ThrottleOption = None,
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
    options = options_as_overrides(resources, name=name, training=training) + (["snapshot=true"] if snapshot else [])
    targets, words = ([target, *(args or [])], []) if chain else ([target], args or [])
    jobs = [_load(one, options, overrides or [], words) for one in (_job_files(targets) if chain else targets)]
    found = [_site(job, site) for job, _ in jobs]
    wanted = Wanted([job for job, _ in jobs], [one for _, one in jobs], found, runs, after or [], check=not unchecked)
    if sweep:
        _sweep(wanted, target, sweep, throttle, dry_run=dry_run, chain=chain, json_output=json_output)
    elif dry_run:
        _preview(wanted, json_output=json_output)
    else:
        _submit(wanted, chain=chain, follow=follow, json_output=json_output)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a submit asks for: jobs, the site of each, where the runs are, and what they wait for."""

    jobs: list[JobConfig]
    sources: list[dict[str, str]]
    sites: list[SiteConfig]
    runs: Path
    after: list[str]
    check: bool

    def waits(self) -> list[Wait]:
        """What the first job waits for."""
        if not self.after:
            return []
        from hpc_ds.cluster.queue import Queue
        from hpc_ds.report.after import read_waits

        return read_waits(self.after, self.runs, self.sites[0], Queue())


def _job_files(targets: list[str]) -> list[str]:
    """The job files of a chain."""
    from hpc_ds.errors import ConfigError

    for target in targets:
        if not target.endswith(".json"):
            raise ConfigError(f"--chain {target!r}: not a job file; give files such as a.json b.json", value=target)
    return targets


def _site(job: JobConfig, name: str | None) -> SiteConfig:
    from hpc_ds.config.load import load_site

    return load_site(name or _site_name(job))


def _preview(wanted: Wanted, *, json_output: bool) -> None:
    from hpc_ds.script.plan import plan_lines
    from hpc_ds.script.submit import preview

    wanted.waits()
    data = []
    for job, site in zip(wanted.jobs, wanted.sites, strict=True):
        text, plan = preview(job, site, wanted.runs, check=wanted.check)
        data.append({"site": site.name, "script": text, "plan": plan.as_data()})
        if not json_output:
            lines = "\n".join(f"# {line}" for line in plan_lines(plan))
            typer.echo(f"{text}\n# The plan; nothing is queued yet.\n{lines}")
    if json_output:
        typer.echo(json.dumps(data[0] if len(data) == 1 else data))


def _submit(wanted: Wanted, *, chain: bool, follow: bool, json_output: bool) -> None:
    from hpc_ds.script.submit import submit as submit_job
    from hpc_ds.script.submit import submit_chain

    jobs = list(zip(wanted.jobs, wanted.sites, wanted.sources, strict=True))
    if chain:
        done = submit_chain(jobs, wanted.runs, waits=wanted.waits(), check=wanted.check)
    else:
        job, site, sources = jobs[0]
        done = [submit_job(job, site, wanted.runs, waits=wanted.waits(), sources=sources, check=wanted.check)]
    data = []
    for one, site in zip(done, wanted.sites, strict=True):
        warn(one.warnings)
        data.append({"run_dir": str(one.run.root), "job_id": one.job_id, "site": site.name})
        if not json_output:
            typer.echo(f"job {one.job_id} on site {site.name}\nrun {one.run.root}")
    if json_output:
        typer.echo(json.dumps(data if chain else data[0]))
    if follow:
        from hpc_ds.cli.runs import show_until_over

        show_until_over(done[-1].run)


def _sweep(
    wanted: Wanted,
    target: str,
    texts: list[str],
    throttle: int | None,
    *,
    dry_run: bool,
    chain: bool,
    json_output: bool,
) -> None:
    from hpc_ds.config.sweep import jobs_of, read_points
    from hpc_ds.errors import ConfigError
    from hpc_ds.script.plan import plan_lines
    from hpc_ds.script.sweep import Sweep, preview_sweep, submit_sweep

    if chain:
        raise ConfigError("--sweep, --chain: give one of them")
    (base,), (site,) = wanted.jobs, wanted.sites
    points = read_points(texts)
    asked = Sweep(base, points, jobs_of(base, points, target), throttle)
    if dry_run:
        text, plan = preview_sweep(asked, site, wanted.runs, check=wanted.check)
        data = {"site": site.name, "script": text, "plan": plan.as_data(), "points": points}
        lines = "\n".join(f"# {line}" for line in plan_lines(plan))
        typer.echo(json.dumps(data) if json_output else f"{text}\n# The plan; nothing is queued yet.\n{lines}")
        return
    done = submit_sweep(asked, site, wanted.runs, waits=wanted.waits(), sources=wanted.sources[0], check=wanted.check)
    warn(done.warnings)
    tell_of_sweep(done, site.name, len(points), json_output=json_output)


def tell_of_sweep(done: SubmittedSweep, site: str, count: int, *, json_output: bool) -> None:
    """Say what was queued."""
    told = {"sweep_dir": str(done.sweep.root), "job_id": done.job_id, "site": site, "runs": count}
    words = f"job {done.job_id} on site {site}, {count} runs\nsweep {done.sweep.root}"
    typer.echo(json.dumps(told) if json_output else words)


def _load(target: str, options: list[str], overrides: list[str], args: list[str]) -> tuple[JobConfig, dict[str, str]]:
    """The job, and where each of its values comes from."""
    from hpc_ds.config.job import is_run_name
    from hpc_ds.config.load import build_job, read_json
    from hpc_ds.config.sources import sources_of

    asked = options + overrides
    if target.endswith(".json"):
        data, base = read_json(Path(target), "job file"), Path(target).resolve().parent
        file = target
    else:
        script, base, file = Path(target), Path.cwd(), "command line"
        data = {"script": str(script)}
        if not any(override.startswith("name=") for override in asked) and is_run_name(script.stem):
            data["name"] = script.stem
    job = build_job(data, asked, args, file=target, base=base)
    more = ["args="] if args else []
    return job, sources_of(job, data, file, options + more, overrides)


def _site_name(job: JobConfig) -> str:
    if job.site != "auto":
        return job.site
    from hpc_ds.cluster.connect import detect_site

    return detect_site()


def warn(warnings: list[str]) -> None:
    """Say on stderr what is worth a look."""
    for warning in warnings:
        typer.echo(f"hpcds: warning: {warning}", err=True)
