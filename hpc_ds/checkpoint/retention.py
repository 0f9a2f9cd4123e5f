"""Which checkpoints stay: the newest N, every so many steps one, those pinned, and always a whole one. Needs no torch.

A run by itself removes only what it made by itself: other runs may save into the same folder, and what a user saved by
a call of his own is his.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.checkpoint.commit import remove
from hpc_ds.checkpoint.layout import PINNED, Saved, check_tag, listed, read_manifest
from hpc_ds.errors import CheckpointError
from hpc_ds.run_dir import fsync_folder

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Keep:
    """What stays.

    Attributes:
        last: so many of the newest; at least one.
        every_steps: besides, those whose step is a multiple of this.
    """

    last: int
    every_steps: int | None = None


def to_remove(folder: Path, keep: Keep, made_by: str | None = None) -> list[Path]:
    """The checkpoints that do not stay, newest first. Nothing is removed.

    Args:
        folder: of the checkpoints.
        keep: what stays.
        made_by: count only those that this run made by itself; None: all.
    """
    ours = [
        (path, saved, damage)
        for path, saved, damage in listed(folder)
        if made_by is None or (saved is not None and saved.state.get("made_by") == made_by)
    ]
    whole = [path for path, saved, damage in ours if saved is not None and damage is None]
    return [
        path
        for number, (path, saved, _) in enumerate(ours)
        if number >= max(keep.last, 1) and path != next(iter(whole), None) and not _stays(saved, keep)
    ]


def prune(folder: Path, keep: Keep, made_by: str | None = None) -> list[str]:
    """Remove the checkpoints that do not stay; returns their names. For one process.

    A folder is renamed before its files go, so that a crash in between leaves no half checkpoint.
    """
    try:
        return [path.name for path in to_remove(folder, keep, made_by) if remove(path)]
    except OSError:  # a folder that cannot be listed has nothing to remove
        return []


def pin(folder: Path, tag: str) -> None:
    """Let retention leave a checkpoint alone; durable on return.

    Raises:
        CheckpointError: there is none of that tag, or it cannot be marked.
    """
    path = _checkpoint(folder, tag)
    try:
        (path / PINNED).touch()
        fsync_folder(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: not pinned: {error.strerror}", str(path)) from None


def unpin(folder: Path, tag: str) -> None:
    """Take back ``pin``.

    Raises:
        CheckpointError: there is none of that tag, or its mark cannot be removed.
    """
    path = _checkpoint(folder, tag)
    try:
        with contextlib.suppress(FileNotFoundError):
            (path / PINNED).unlink()
        fsync_folder(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: not unpinned: {error.strerror}", str(path)) from None


def _checkpoint(folder: Path, tag: str) -> Path:
    check_tag(tag)
    return read_manifest(folder / tag).path


def _stays(saved: Saved | None, keep: Keep) -> bool:
    if saved is None:
        return False
    return saved.pinned or bool(keep.every_steps and saved.step % keep.every_steps == 0)
