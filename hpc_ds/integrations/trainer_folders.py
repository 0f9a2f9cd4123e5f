"""The checkpoint folders of Hugging Face's Trainer: which are whole, which this run has made, which may go.

Trainer writes ``checkpoint-<step>/`` file by file, from every rank. A file beside it says so until it is whole:
``.checkpoint-<step>.unfinished``. What is in it then says who made it: ``hpc_ds.json``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_ds.checkpoint.layout import listed
from hpc_ds.run_dir import fsync_folder, read_object, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

FINISHED = "hpc_ds.json"
STATE = "trainer_state.json"
_OF_ENGINE = "global_step*"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Made:
    """What a finished checkpoint says of its making.

    Attributes:
        run: folder of the run.
        attempt: which start of it.
        call: which call of ``train()`` in that start, from 1.
        step: optimizer steps.
        batch: samples of a step, of all ranks.
        complete: it has what a resume needs, not the weights alone.
        by_itself: the run asked for it, not the script.
    """

    run: str
    attempt: int
    call: int
    step: int
    batch: int
    complete: bool
    by_itself: bool

    @classmethod
    def read(cls, folder: Path) -> Made | None:
        """That of a folder; None where there is none, or one that says something else."""
        said = read_object(folder / FINISHED)
        kinds = {
            "run": str,
            "attempt": int,
            "call": int,
            "step": int,
            "batch": int,
            "complete": bool,
            "by_itself": bool,
        }
        fits = all(type(said.get(key)) is kind for key, kind in kinds.items())
        return cls(**{key: said[key] for key in kinds}) if fits else None


class Found(NamedTuple):
    """A checkpoint and its making."""

    path: Path
    made: Made


def mark_of(folder: Path) -> Path:
    """The file that says that a checkpoint is not whole."""
    return folder.with_name(f".{folder.name}.unfinished")


def begin(folder: Path) -> None:
    """Make a folder to write to; what stood there is of no use any more. For one process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark_of(folder).touch()
    fsync_folder(folder.parent)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def flush(folder: Path, *, everything: bool, rank: int) -> None:
    """Make durable what this rank has written; the engine's files are so already.

    Args:
        folder: of the checkpoint.
        everything: this rank writes for all.
        rank: whose random state, else.
    """
    of_engine = {path for part in folder.glob(_OF_ENGINE) for path in part.rglob("*")}
    for path in [*folder.rglob("*"), folder]:
        mine = everything or path.parent != folder or path.stem == f"rng_state_{rank}"
        if path in of_engine or not mine:
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                fsync_folder(path)
            else:
                with path.open("rb") as file:
                    os.fsync(file.fileno())


def finish(folder: Path, made: Made) -> None:
    """Say that it is whole. For one process, when all have flushed."""
    write_json(folder / FINISHED, {key: getattr(made, key) for key in Made.__slots__})
    mark_of(folder).unlink(missing_ok=True)
    fsync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint, so that half of one is never taken for a whole. For one process."""
    mark_of(folder).touch()
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        mark_of(folder).unlink(missing_ok=True)


def last_whole(folder: str) -> str | None:
    """The newest checkpoint in a folder that no ended save has left half-written; transformers' ``get_last_checkpoint``."""
    whole = [(step, path) for step, path in _checkpoints(Path(folder)) if not mark_of(path).exists()]
    return str(max(whole)[1]) if whole else None


def newest_of_run(folder: Path, run: str, before_attempt: int, call: int) -> Found | None:
    """The newest checkpoint to go on from that earlier attempts of a run have made in the same call of ``train()``."""
    for _, path, made in sorted(_made(folder, run), key=lambda one: one[0], reverse=True):
        if made.attempt < before_attempt and made.call == call and made.complete and _is_whole(path):
            return Found(path, made)
    return None


def prune(folder: Path, run: str, keep: int, keep_every: int | None, best: str | None) -> None:
    """Remove what a run has asked for by itself, but for the newest ``keep`` and the best. For one process.

    Args:
        folder: of the Trainer.
        run: its folder.
        keep: how many stay.
        keep_every: besides, those whose step is a multiple of this.
        best: the Trainer's best.
    """
    own = [(step, path) for step, path, made in sorted(_made(folder, run), key=lambda one: one[0]) if made.by_itself]
    for step, path in own[:-keep]:
        if (best is None or path != Path(best)) and not (keep_every and step % keep_every == 0):
            remove(path)


def _made(folder: Path, run: str) -> Iterator[tuple[int, Path, Made]]:
    for step, path in _checkpoints(folder):
        made = None if mark_of(path).exists() else Made.read(path)
        if made is not None and made.run == run:
            yield step, path, made


def _is_whole(path: Path) -> bool:
    """Whether what is looked for is there; an engine's checkpoint by its manifest and the sizes of its files."""
    of_engine = [damage for _, _, damage in listed(path)] if any(path.glob(_OF_ENGINE)) else [None]
    return (path / STATE).is_file() and None in of_engine


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    try:
        entries: list[Any] = list(folder.iterdir())
    except OSError:
        return
    for path in entries:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match.group(1)), path
