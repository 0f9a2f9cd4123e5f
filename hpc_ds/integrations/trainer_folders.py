"""The checkpoint folders of Hugging Face's Trainer: which are whole, which this run has made, which may go.

Trainer writes ``checkpoint-<step>/`` file by file, from every rank, and removes older ones before the others have written
theirs. A folder is whole here when it has no mark of an unfinished save, and what a resume needs is there.
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

UNFINISHED = "hpc_ds.unfinished"
FINISHED = "hpc_ds.json"
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Made:
    """What a finished checkpoint says of its making.

    Attributes:
        run: folder of the run.
        attempt: which start of it.
        step: optimizer steps.
        batch: samples of a step, of all ranks.
        by_itself: the run asked for it, not the script.
    """

    run: str
    attempt: int
    step: int
    batch: int
    by_itself: bool


class Found(NamedTuple):
    """A checkpoint and its making."""

    path: Path
    made: Made


def begin(folder: Path) -> None:
    """Mark a folder as being written. For one process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    (folder / FINISHED).unlink(missing_ok=True)
    fsync_folder(folder)


def flush(folder: Path) -> None:
    """Make durable what this process has written."""
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.fsync(file.fileno())


def finish(folder: Path, made: Made) -> None:
    """Take the mark away. For one process, when all have flushed."""
    write_json(folder / FINISHED, {key: getattr(made, key) for key in Made.__slots__})
    (folder / UNFINISHED).unlink(missing_ok=True)
    fsync_folder(folder)


def last_whole(folder: str) -> str | None:
    """The newest checkpoint in a folder that no ended save has left half-written; transformers' ``get_last_checkpoint``."""
    whole = [(step, path) for step, path in _checkpoints(Path(folder)) if not (path / UNFINISHED).exists()]
    return str(max(whole)[1]) if whole else None


def newest_of_run(folder: Path, run: str, before_attempt: int) -> Found | None:
    """The newest whole checkpoint that earlier attempts of a run have made."""
    for _, path, made in sorted(_made(folder, run), reverse=True):
        if made.attempt < before_attempt and _is_whole(path):
            return Found(path, made)
    return None


def prune(folder: Path, run: str, keep: int, best: str | None) -> None:
    """Remove what a run has asked for by itself, but for the newest ``keep`` and the best. For one process."""
    own = [path for _, path, made in sorted(_made(folder, run)) if made.by_itself]
    for path in own[:-keep]:
        if best is None or path != Path(best):
            (path / UNFINISHED).touch()  # half of one must not be taken for a whole
            shutil.rmtree(path, ignore_errors=True)


def _made(folder: Path, run: str) -> Iterator[tuple[int, Path, Made]]:
    for step, path in _checkpoints(folder):
        said: dict[str, Any] = read_object(path / FINISHED)
        if said.get("run") == run and not (path / UNFINISHED).exists():
            yield step, path, Made(**{key: said.get(key, 0) for key in Made.__slots__})


def _is_whole(path: Path) -> bool:
    """Whether what a resume needs is there; an engine's checkpoint by its manifest and the sizes of its files."""
    of_engine = [damage for _, _, damage in listed(path)] if any(path.glob("global_step*")) else []
    return (path / _STATE).is_file() and (not of_engine or None in of_engine)


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for path in entries:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match.group(1)), path
