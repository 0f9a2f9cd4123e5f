"""The steps of a commit that one process does alone: begin, publish, or give up; and clearing away what dead saves left.

1. ``begin`` makes ``.saving-<tag>-<id>/`` and says in it whose it is
2. every rank writes its data file, then its index, and flushes both and the folder
3. ``publish`` writes the manifest, checks that the files fit together, renames the folder to ``<tag>``, flushes, then
   replaces ``latest``

There are no locks, because shared filesystems do not keep them. A hidden folder belongs to the process that began it:
dead is one whose process is gone (where that can be seen from here), one of an earlier attempt of the same run, and one
in which nothing has been written for an hour. Whoever removes a folder renames it first, so that nobody ever sees half of
one, and a save that was taken for dead fails at its rename instead of publishing less than all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_ds.checkpoint.layout import (
    LATEST,
    PINNED,
    REMOVING,
    REPLACED,
    SAVING,
    read_manifest,
    tag_of,
    write_manifest,
)
from hpc_ds.checkpoint.stored import read_stored
from hpc_ds.cluster.process import is_alive, start_time
from hpc_ds.run_dir import fsync_folder, read_object

_OWNER = ".owner.json"
_SILENT_S = 3600.0  # seconds without a write after which a save that cannot be asked counts as dead
_UNSIGNED_S = 60.0  # the same for a folder that does not say whose it is: it is signed right after it is made


@dataclass(frozen=True, slots=True)
class Run:
    """Which run saves, as far as that is known: its folder, and the number of this start of it."""

    root: str = ""
    attempt: int = 0


# The saves of this process that have neither been published nor given up.
_under_way: set[str] = set()


def begin(folder: Path, tag: str, run: Run) -> Path:
    """Make the hidden folder of a new save, after clearing away what dead saves left. For one process."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
    hidden = folder / f"{SAVING}{tag}-{uuid.uuid4().hex[:8]}"
    _under_way.add(str(hidden))
    try:
        hidden.mkdir()
        (hidden / _OWNER).write_text(json.dumps(_signature(run)), encoding="utf-8")
        clear(folder, run, now=hidden.stat().st_mtime)
    except BaseException:
        give_up(hidden)
        raise
    return hidden


def id_of(hidden: Path) -> str:
    """The id of the save in a hidden folder."""
    return hidden.name.rpartition("-")[2]


def publish(hidden: Path, final: Path, manifest: dict[str, Any], *, save_latest: bool) -> None:
    """Make a complete save visible. Killed at any point, the old checkpoint of that tag or the new one is whole.

    All that needs room on the disk is written before the first rename; when a rename fails, what was done is undone.

    Raises:
        DamagedError: what the ranks wrote does not fit together.
    """
    folder = final.parent
    replaced = folder / f"{REPLACED}{final.name}-{id_of(hidden)}"
    latest = folder / f".{LATEST}.{id_of(hidden)}"
    try:
        if (final / PINNED).exists():
            (hidden / PINNED).touch()
        write_manifest(hidden, manifest)
        # Whether the files are all there, and cover each tensor once: what cannot be loaded must not be called saved.
        # Without threads: the interpreter may be ending.
        read_stored(read_manifest(hidden), lanes=1)
        if save_latest:
            _write_durable(latest, final.name)
        if final.exists():
            final.rename(replaced)
        hidden.rename(final)
        fsync_folder(folder)
        if save_latest:
            latest.replace(folder / LATEST)
            fsync_folder(folder)
    except OSError:
        _undo(hidden, final, replaced)
        latest.unlink(missing_ok=True)
        raise
    _under_way.discard(str(hidden))
    with contextlib.suppress(OSError):  # from here on the save has succeeded
        (final / _OWNER).unlink()
    if replaced.exists():
        remove(replaced)


def _write_durable(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _undo(hidden: Path, final: Path, replaced: Path) -> None:
    with contextlib.suppress(OSError):
        if not hidden.exists():
            final.rename(hidden)
        if replaced.exists():
            replaced.rename(final)


def give_up(hidden: Path) -> None:
    """Remove what a save has written."""
    _under_way.discard(str(hidden))
    remove(hidden)


def remove(path: Path) -> bool:
    """Remove a checkpoint folder so that nobody sees half of it; whether it was there and could be removed.

    One that got pinned in the last moment stays.
    """
    tag = tag_of(path) if not path.name.startswith(SAVING) else path.name.removeprefix(SAVING).rpartition("-")[0]
    doomed = path.with_name(f"{REMOVING}{tag}-{uuid.uuid4().hex[:8]}")
    try:
        path.rename(doomed)
        if not path.name.startswith(".") and (doomed / PINNED).exists():
            doomed.rename(path)
            return False
    except OSError:
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def clear(folder: Path, run: Run, now: float) -> None:
    """Clear away what dead saves left; never what a live one needs.

    Args:
        folder: of the checkpoints.
        run: that asks.
        now: seconds since the epoch by the clock of the filesystem.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(REMOVING):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(SAVING) and _is_dead(path, run, now):
            remove(path)
        elif path.name.startswith(REPLACED):
            _settle(path, run, now)
        elif path.name.startswith(f".{LATEST}.") and _age(path, now) > _UNSIGNED_S:  # from inside of publish
            path.unlink(missing_ok=True)


def _settle(old: Path, run: Run, now: float) -> None:
    """A checkpoint whose successor never arrived gets its name back; one whose successor did is done with."""
    name, successor = old.with_name(tag_of(old)), old.with_name(SAVING + old.name.removeprefix(REPLACED))
    if successor.exists() and not _is_dead(successor, run, now):
        return  # another process is between its two renames
    if name.exists():
        remove(old)
    else:
        with contextlib.suppress(OSError):  # another process was faster
            old.rename(name)


def _is_dead(hidden: Path, run: Run, now: float) -> bool:
    if str(hidden) in _under_way:
        return False
    owner, mine = read_object(hidden / _OWNER), _signature(run)
    if not owner:
        return _age(hidden, now) > _UNSIGNED_S
    if owner.get("kernel") == mine["kernel"]:
        return owner.get("pid") == mine["pid"] or not is_alive(owner.get("pid", 0), owner.get("started", 0))
    if run.root and owner.get("run") == run.root and owner.get("attempt") != run.attempt:
        return True
    return _age(hidden, now) > _SILENT_S


def _age(path: Path, now: float) -> float:
    """Seconds since anything was written in a folder, or to a file."""
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = path.stat().st_mtime
        for inside in path.iterdir() if path.is_dir() else ():
            newest = max(newest, inside.stat().st_mtime)
    return now - newest


def _signature(run: Run) -> dict[str, Any]:
    """Who this process is: a process id means something only beside the kernel and namespace that gave it."""
    kernel = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        kernel = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    pid = os.getpid()
    return {
        "kernel": kernel or f"unknown {uuid.uuid4().hex}",
        "pid": pid,
        "started": start_time(pid),
        "run": run.root,
        "attempt": run.attempt,
    }
