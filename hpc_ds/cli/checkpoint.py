"""``hpcds checkpoint``: what checkpoints there are, whether they are whole, and what else can be made of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_ds.cli.options import JsonOption, RunsOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hpc_ds.checkpoint.layout import Saved

app = typer.Typer(
    help="List, verify, export, compare and prune checkpoints; import DeepSpeed's.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DirArgument = Annotated[str, typer.Argument(metavar="DIR|RUN", help="A folder of checkpoints, or a run.")]
TagArgument = Annotated[
    str | None, typer.Argument(metavar="[TAG]", help="Which one. Default: the newest, as a resume takes it.")
]
OneTag = Annotated[str, typer.Argument(metavar="TAG", help="Which one.")]
OneArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="DIR/TAG; or DIR or a run, and the newest in it is meant.")
]


class Format(str, Enum):
    """What an export can be."""

    safetensors = "safetensors"
    pt = "pt"


class Dtype(str, Enum):
    """What floats can become in an export."""

    keep = "keep"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@app.command("ls")
def ls(folder: DirArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """List checkpoints, newest first."""
    from hpc_ds.checkpoint.layout import listed, read_latest

    path = _folder(folder, runs)
    latest = read_latest(path)
    found = [_described(one, saved, damage, latest) for one, saved, damage in listed(path)]
    if json_output:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo(f"no checkpoints in {path}")
        return
    _show_list(found)


@app.command("verify")
def verify(
    folder: DirArgument, tag: TagArgument = None, runs: RunsOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """Check every byte of a checkpoint.

    Exit 4 if it is damaged.
    """
    from hpc_ds.checkpoint.layout import damaged
    from hpc_ds.checkpoint.verify import damages, open_whole
    from hpc_ds.errors import DamagedError

    path = _checkpoint(folder, runs, tag)
    began = time.monotonic()
    try:
        stored = open_whole(path)
        size = sum(index.file_bytes for index in stored.files)
        with _progress(f"verifying {path.name}", size) as progress:
            found = damages(stored, progress)
    except DamagedError as error:
        size, found = 0, [error.damage]
    told = {"checkpoint": str(path), "whole": not found, "damage": found, "bytes": size}
    if json_output:
        typer.echo(json.dumps(told))
    elif not found:
        typer.echo(f"{path}: whole, {_size(size)} verified in {time.monotonic() - began:.1f} s")
    if found:
        raise damaged(path, "; ".join(found))


@app.command("export")
def export(
    folder: DirArgument,
    tag: TagArgument = None,
    to: Annotated[
        Path, typer.Option("--to", metavar="OUT", help="The folder to make; with --format pt the file.")
    ] = ...,  # type: ignore[assignment]
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.safetensors,
    dtype: Annotated[Dtype, typer.Option(help="Convert floats; keep: as they were saved.")] = Dtype.keep,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest safetensors file, as 5GB, 500MB or 2GiB. Default: 5GB.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    runs: RunsOption = Path("runs"),
    json_output: JsonOption = False,
) -> None:
    """Write full weights for other programs.

    Needs no GPU and little memory, whatever the model's size; every byte is verified.
    """
    from hpc_ds.checkpoint.export import TYPES, bytes_of, export_safetensors, export_torch, weights_to_export
    from hpc_ds.checkpoint.verify import open_whole
    from hpc_ds.errors import ConfigError

    if form is Format.pt and max_shard_size is not None:
        raise ConfigError("--max-shard-size: a .pt is one file; leave it out, or use --format safetensors")
    largest = bytes_of("--max-shard-size", max_shard_size or "5GB")
    path = _checkpoint(folder, runs, tag)
    stored, wanted = open_whole(path), TYPES[dtype.value]
    weights = weights_to_export(stored, wanted)
    total = sum(weight.size_bytes for weight in weights)
    with _progress(f"exporting {path.name}", total) as progress:
        if form is Format.pt:
            files = export_torch(stored, to, wanted, force=force, progress=progress)
        else:
            files = export_safetensors(stored, to, wanted, largest, force=force, progress=progress)
    if json_output:
        told = {"checkpoint": str(path), "step": stored.step, "files": [str(file) for file in files]}
        typer.echo(json.dumps({**told, "tensors": len(weights), "bytes": total}))
    else:
        typer.echo(f"{to}: {len(weights)} tensors of step {stored.step}, {_size(total)} in {len(files)} file(s)")


@app.command("prune")
def prune(
    folder: DirArgument,
    keep: Annotated[int, typer.Option("--keep", min=1, metavar="N", help="Keep the newest N.")] = ...,  # type: ignore[assignment]
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", min=1, metavar="K", help="Keep those whose step is a multiple of K too."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
    runs: RunsOption = Path("runs"),
    json_output: JsonOption = False,
) -> None:
    """Remove old checkpoints.

    Never a pinned one, and never the newest whole one.
    """
    from hpc_ds.checkpoint import retention

    path, rule = _folder(folder, runs), retention.Keep(keep, keep_every)
    gone = [one.name for one in retention.to_remove(path, rule)] if dry_run else retention.prune(path, rule)
    if json_output:
        typer.echo(json.dumps({"folder": str(path), "dry_run": dry_run, "removed": gone}))
        return
    verb = "would remove" if dry_run else "removed"
    typer.echo("\n".join(f"{verb} {name}" for name in gone) or "nothing to remove")


@app.command("pin")
def pin(folder: DirArgument, tag: OneTag, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """Keep a checkpoint from being pruned."""
    from hpc_ds.checkpoint import retention

    _mark(retention.pin, folder, tag, runs, "pinned", json_output=json_output)


@app.command("unpin")
def unpin(folder: DirArgument, tag: OneTag, runs: RunsOption = Path("runs"), json_output: JsonOption = False) -> None:
    """Take back `pin`."""
    from hpc_ds.checkpoint import retention

    _mark(retention.unpin, folder, tag, runs, "unpinned", json_output=json_output)


@app.command("diff")
def diff(
    first: OneArgument, second: OneArgument, runs: RunsOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """Compare two checkpoints.

    Weights and optimizer state; exit 1 if they differ.
    """
    from hpc_ds.checkpoint.compare import bytes_to_compare, differences, names_in
    from hpc_ds.checkpoint.verify import open_whole

    a, b = (open_whole(_checkpoint(one, runs, None)) for one in (first, second))
    with _progress("comparing", bytes_to_compare(a, b)) as progress:
        found = list(differences(a, b, progress))
    if json_output:
        rows = [{"name": one.name, "problem": one.problem, "max_abs": _number(one.max_abs)} for one in found]
        told = {"first": str(a.path), "second": str(b.path), "compared": len(names_in(a) | names_in(b))}
        typer.echo(json.dumps({**told, "same": not found, "different": rows}))
    else:
        for one in found:
            amount = "" if one.max_abs is None else f", largest difference {one.max_abs:.3g}"
            typer.echo(f"{one.name}: {one.problem}{amount}")
        typer.echo(f"{len(names_in(a) | names_in(b))} tensors compared, {len(found)} differ")
    if found:
        raise typer.Exit(1)


@app.command("import-deepspeed")
def import_deepspeed(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="What DeepSpeed's save_checkpoint was given.")],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="The folder of our checkpoints.")],
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="TAG", help="Which one. Default: the one that its `latest` names.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Take over a DeepSpeed checkpoint.

    Of ZeRO stage 0 to 3: weights, optimizer state, schedule, loss scale, counters and client state included.
    """
    from hpc_ds.checkpoint.import_deepspeed import import_deepspeed as run_import
    from hpc_ds.checkpoint.layout import read_manifest

    with _progress("importing", 0) as progress:
        done = [0]

        def to(now: int, total: int) -> None:
            if progress is not None:
                progress(now - done[0], total)
                done[0] = now

        saved = read_manifest(run_import(source, folder, tag, to))
    if json_output:
        told = {"checkpoint": str(saved.path), "step": saved.step, "zero_stage": saved.stage}
        typer.echo(json.dumps({**told, "bytes": saved.size_bytes}))
    else:
        typer.echo(f"{saved.path}: step {saved.step} of ZeRO stage {saved.stage}, {_size(saved.size_bytes)}")


def _folder(text: str, runs: Path) -> Path:
    """The folder of checkpoints that a user means: itself, or that of a run."""
    from hpc_ds.errors import ConfigError, RunError
    from hpc_ds.run_dir import RunDir, read_object

    if Path(text).is_dir() and not (Path(text) / "config.json").is_file():
        return Path(text)
    try:
        run = RunDir.find(text, runs)
    except RunError:
        raise ConfigError(
            f"checkpoint folder {text!r}: neither a folder nor a run of {str(runs)!r}; check it", value=text
        ) from None
    checkpoint = read_object(run.config).get("checkpoint")
    named = checkpoint.get("dir") if isinstance(checkpoint, dict) else None
    return Path(named) if named else run.checkpoints


def _checkpoint(text: str, runs: Path, tag: str | None) -> Path:
    """The folder of one checkpoint: DIR and TAG, DIR/TAG, or the one that a resume takes from DIR."""
    from hpc_ds.checkpoint.layout import MANIFEST, candidates, check_foreign, check_tag
    from hpc_ds.errors import CheckpointError

    if tag is None and (Path(text) / MANIFEST).is_file():
        return Path(text)
    folder = _folder(text, runs)
    if tag is not None:
        check_tag(tag)
        return folder / tag
    found = candidates(folder)
    if not found:
        check_foreign(folder)
        raise CheckpointError(f"checkpoint folder {str(folder)!r}: no checkpoint in it; give another", str(folder))
    return found[0]


def _described(path: Path, saved: Saved | None, damage: str | None, latest: str) -> dict[str, Any]:
    from hpc_ds.checkpoint.layout import tag_of

    told: dict[str, Any] = {"tag": tag_of(path), "path": str(path), "latest": path.name == latest}
    told |= {"whole": saved is not None and damage is None, "damage": damage}
    if saved is None:
        return told
    return told | {
        "step": saved.step, "created": saved.created, "size_bytes": saved.size_bytes, "world_size": saved.world_size,
        "stage": saved.stage, "pinned": saved.pinned, "versions": saved.versions,
    }  # fmt: skip


def _show_list(found: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or a pipe has no width: lines there are as long as they are.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("tag", "step", "age", "size", "ranks", "stage", "", "whole"):
        table.add_column(title, justify="right" if title in {"step", "age", "size", "ranks", "stage"} else "left")
    for one in found:
        numbers = ["?"] * 5
        if "step" in one:
            age = _age(time.time() - one["created"])
            stage = "-" if one["stage"] is None else str(one["stage"])
            numbers = [str(one["step"]), age, _size(one["size_bytes"]), str(one["world_size"]), stage]
        marks = " ".join(mark for mark in ("latest", "pinned") if one.get(mark))
        whole = Text("yes", "green") if one["whole"] else Text(f"no: {one['damage']}", "red")
        table.add_row(Text(one["tag"]), *numbers, marks, whole)
    Console(highlight=False, width=width).print(table)


def _mark(do: Callable[[Path, str], None], folder: str, tag: str, runs: Path, verb: str, *, json_output: bool) -> None:
    path = _folder(folder, runs)
    do(path, tag)
    data = {"checkpoint": str(path / tag), "action": verb}
    typer.echo(json.dumps(data) if json_output else f"{verb} {path / tag}")


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[..., None] | None]:
    """A bar on a terminal, nothing elsewhere; it is given bytes done, and optionally another total."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total or None)

        def advance(count: int, known_total: int | None = None) -> None:
            bar.update(task, advance=count, total=known_total)

        yield advance


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or abs(value) < float("inf") else str(value)
