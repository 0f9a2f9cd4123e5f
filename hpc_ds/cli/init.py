"""``hpcds init`` and ``hpcds schema``: a job file to begin with, and what may stand in one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hpc_ds.cli.options import (
    AccountOption,
    GpusOption,
    JsonOption,
    NodesOption,
    PartitionOption,
    SiteOption,
    TimeOption,
)

if TYPE_CHECKING:
    from hpc_ds.config.site import SiteConfig


def init(
    script: Annotated[str | None, typer.Argument(metavar="[SCRIPT.py]", help="The training script.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The job file.")] = Path("job.json"),
    site: SiteOption = None,
    name: Annotated[str | None, typer.Option(help="The run's name; default: the script's.")] = None,
    nodes: NodesOption = None,
    gpus_per_node: GpusOption = None,
    time: TimeOption = None,
    account: AccountOption = None,
    partition: PartitionOption = None,
    training: Annotated[str | None, typer.Option("--training", help="The DeepSpeed JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Write a job file to begin with, with a comment on each key.

    In a terminal it asks for what the options do not say; elsewhere it takes the defaults.
    """
    from hpc_ds.config.new_job import new_job
    from hpc_ds.errors import ConfigError

    if output.exists() and not force:
        raise ConfigError(f"job file {str(output)!r}: is there already; choose another with --output, or --force")
    chosen = _site(site)
    asked: dict[str, Any] = {
        "script": script, "site": site or chosen.name, "training": training, "resources.nodes": nodes,
        "resources.gpus_per_node": gpus_per_node, "resources.time": time, "resources.account": account,
        "resources.partition": partition,
    }  # fmt: skip
    given = _answered(asked, chosen)
    given["name"] = name or _name(str(given["script"]))
    data = new_job(given)
    _check(data, output)
    _write(output, data)
    if json_output:
        typer.echo(json.dumps({"file": str(output), "job": data}))
    else:
        typer.echo(f"{output}, for site {chosen.name}\nlook at it, then: hpcds submit {output} --dry-run")


def _site(name: str | None) -> SiteConfig:
    from hpc_ds.cluster.connect import detect_site
    from hpc_ds.config.load import load_site

    return load_site(name or detect_site())


def _answered(asked: dict[str, Any], site: SiteConfig) -> dict[str, Any]:
    """What was asked for by options, by answers in a terminal, or by defaults."""
    slurm = site.scheduler == "slurm"
    gpus = site.gpus_per_node or 0 if slurm else 0
    defaults: dict[str, Any] = {
        "script": "train.py", "resources.nodes": 1, "resources.gpus_per_node": gpus,
        "resources.time": "04:00:00" if slurm else None,
    }  # fmt: skip
    questions = {
        "script": "training script", "resources.nodes": "nodes", "resources.gpus_per_node": "GPUs on each node",
        "resources.time": "time limit of one start (HH:MM:SS)",
    }  # fmt: skip
    if site.account is not None and site.account.required:
        questions["resources.account"] = "account"
    given = dict(asked)
    for key, default in {**defaults, **dict.fromkeys(questions.keys() - defaults.keys())}.items():
        if given.get(key) is not None:
            continue
        ask = sys.stdin.isatty() and key in questions and not (key == "resources.time" and not slurm)
        given[key] = typer.prompt(questions[key], default=default) if ask else default
    return given


def _name(script: str) -> str:
    from hpc_ds.config.job import is_run_name

    return Path(script).stem if is_run_name(Path(script).stem) else "run"


def _check(data: dict[str, Any], output: Path) -> None:
    """The keys and values; the script need not be there yet."""
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.load import without_comments
    from hpc_ds.config.model import check

    check(JobConfig, without_comments(data), str(output))


def _write(output: Path, data: dict[str, Any]) -> None:
    from hpc_ds.errors import ConfigError
    from hpc_ds.run_dir import as_text

    try:
        output.write_text(as_text(data), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"job file {str(output)!r}: cannot be written: {error.strerror}; choose another") from None


def schema(
    of: Annotated[
        Literal["job", "site", "training"], typer.Argument(metavar="job|site|training", help="Of which file.")
    ],
) -> None:
    """Print the JSON schema of a job file, a site file or a training config, for editors."""
    from hpc_ds.config.schema import job_schema, site_schema, training_schema

    made = {"job": job_schema, "site": site_schema, "training": training_schema}[of]
    typer.echo(json.dumps(made(), indent=2))
