"""``hpcds config``: what a training config means, and its JSON schema."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_ds.cli.options import JsonOption
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.config.explain import Explanation

app = typer.Typer(
    help="What a training config means.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LARGE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_MOST = 10**18


def _count(text: str | int) -> int:
    """``1300000000``, ``26M`` or ``1.3B`` -> how many."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)([KMBGT]?)", str(text), re.IGNORECASE | re.ASCII)
    count = round(float(match[1]) * _LARGE[match[2].upper()]) if match else 0
    if not 0 < count <= _MOST:
        raise ConfigError(f"--parameters {text!r}: not a number of them; write for example 1300000000, 26M or 1.3B")
    return count


@app.command("explain")
def explain(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A training config, or a job file that has one.")],
    world_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ranks. Default: the job's, else what the batch sizes leave, else 1."),
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="N", help="Trainable parameters, such as 26M or 1.3B."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Print the effective values, where each comes from, the batch arithmetic and the bytes a rank needs."""
    from hpc_ds.config.explain import explain as explain_config

    found = explain_config(file, world_size, parameters)
    if json_output:
        typer.echo(json.dumps(found.as_data()))
        return
    for line in _lines(found, one=parameters is None):
        typer.echo(line)


@app.command("schema")
def schema(
    job: Annotated[bool, typer.Option("--job", help="That of a job file instead.")] = False,
) -> None:
    """Print the JSON schema of a training config, for editors."""
    from hpc_ds.config.schema import job_schema, training_schema

    typer.echo(json.dumps(job_schema() if job else training_schema(), indent=2))


def _lines(found: Explanation, *, one: bool) -> list[str]:
    lines = [found.file, ""]
    lines += _table([("key", "value", "source"), *((key, json.dumps(value), why) for key, value, why in found.values)])
    lines += ["", f"world size {found.world_size} ({found.because})", *_batch(found)]
    size = _bytes if not one else _plain
    titles = ("stage", "parameters", "masters", "gradients", "optimizer", "total")
    offloaded = any(held.on_host for held in found.memory.values())
    rows: list[Sequence[str]] = [(*titles, "of it on host") if offloaded else titles]
    for stage, held in found.memory.items():
        parts = [held.parameters, held.masters, held.gradients, held.optimizer, held.total]
        parts += [held.on_host] if offloaded else []
        rows.append((f"{stage} *" if stage == found.stage else str(stage), *(size(part) for part in parts)))
    what = "bytes a parameter" if one else f"{found.parameters:,} parameters"
    lines += ["", f"held by a rank, {what} (compute {found.compute}; optimizer {found.optimizer}):"]
    lines += _table(rows)
    lines += ["* this config; activations and what is in flight come on top"]
    return lines + [f"warning: {warning}" for warning in found.warnings]


def _batch(found: Explanation) -> list[str]:
    if found.batch is None:
        return ["train_batch_size: not given, nor train_micro_batch_size_per_gpu; training needs one of them"]
    batch = found.batch
    line = (
        f"train_batch_size {batch.train} = train_micro_batch_size_per_gpu {batch.micro} x gradient_accumulation_steps "
        f"{batch.accumulation} x world size {batch.world_size}"
    )
    return [line]


def _table(rows: list[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(size: float) -> str:
    return f"{size:.4g}"


def _bytes(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < 6:
        size, unit = size / 1024, unit + 1
    return f"{size:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[unit]}"
