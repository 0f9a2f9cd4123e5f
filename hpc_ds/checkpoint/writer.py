"""Saving: everything is durable under a temporary name before one rename makes it visible.

1. rank 0 clears away what dead saves left, and makes ``.saving-<tag>-<id>/``
2. every rank writes its shards and its own file there, and flushes them to disk
3. sizes and checksums are gathered; rank 0 writes the manifest, flushes file and folder
4. rank 0 renames the folder to ``<tag>``, flushes, then replaces ``latest``

A failure of any rank up to 3 ends the save on all ranks with the same error; the checkpoints before are untouched.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import shutil
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from hpc_ds.checkpoint.agree import on_rank_0, reason, together
from hpc_ds.checkpoint.layout import (
    CLIENT_STATE,
    FORMAT,
    LATEST,
    REPLACED,
    SAVING,
    candidates,
    rank_file,
    read_manifest,
    sha256,
    write_manifest,
)
from hpc_ds.errors import CheckpointError
from hpc_ds.run_dir import fsync_folder, write_atomic

if TYPE_CHECKING:
    from pathlib import Path


class _Writer(FileSystemWriter):
    """A FileSystemWriter whose errors say what the operating system said, also on their way to another rank."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Write this rank's tensors."""
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise CheckpointError(reason(error)) from error


@dataclass(frozen=True, slots=True)
class Content:
    """What goes into one checkpoint.

    Attributes:
        tensors: name -> DTensor (each rank writes its shard) or plain tensor (equal on all ranks; one of them writes).
        rank_state: plain types and tensors that belong to this rank.
        client_state: plain types and tensors of the user's; rank 0's is kept.
        state: the engine's own state, plain JSON.
        step: optimizer steps taken.
    """

    tensors: dict[str, torch.Tensor]
    rank_state: dict[str, Any]
    client_state: dict[str, Any]
    state: dict[str, Any]
    step: int


def save(folder: Path, tag: str, content: Content, *, save_latest: bool = True) -> Path:
    """Write one checkpoint. Collective: every rank calls it, with the same tag.

    Args:
        folder: where the run's checkpoints live.
        tag: name of this one.
        content: what goes into it.
        save_latest: whether ``latest`` shall name it.

    Raises:
        CheckpointError: the same on every rank; nothing of this save is visible, and all before it is untouched.
    """
    _check_tag(tag)
    what = f"checkpoint {str(folder / tag)!r}: not saved"
    rank = dist.get_rank()
    temporary = on_rank_0(what, lambda: _begin(folder, tag))
    try:
        together(what, lambda: _write_tensors(content.tensors, temporary))
        own = {rank_file(rank): content.rank_state} | ({CLIENT_STATE: content.client_state} if rank == 0 else {})
        files = together(what, lambda: _write_rank_files(temporary, own))
        manifest = {
            "format": FORMAT,
            "step": content.step,
            "world_size": dist.get_world_size(),
            "created": time.time(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "files": {name: entry for of_rank in files for name, entry in of_rank.items()},
            "state": content.state,
        }
        on_rank_0(what, lambda: _publish(folder, tag, temporary, manifest, save_latest=save_latest))
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / tag


def prune(folder: Path, keep: int, made_by: str | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints, counting only those of one maker if asked to. For rank 0 only.

    A folder is renamed before its files go, so that a crash in between leaves no half checkpoint.
    """
    try:
        ours = [path for path in candidates(folder) if made_by is None or _maker_of(path) == made_by]
    except OSError:
        return
    for path in ours[max(keep, 1) :]:
        doomed = path.with_name(f"{SAVING}{path.name}-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _maker_of(path: Path) -> object:
    try:
        return read_manifest(path).state.get("made_by")
    except CheckpointError:
        return None


def _check_tag(tag: str) -> None:
    if not tag or tag.startswith(".") or os.sep in tag or tag == LATEST:
        raise CheckpointError(f"checkpoint tag {tag!r}: not a folder name; use for example 'global_step100'")


def _begin(folder: Path, tag: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{SAVING}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(f".{LATEST}.*"):  # from inside of write_atomic
        left.unlink(missing_ok=True)
    # An old checkpoint whose successor never arrived gets its name back; one whose successor did is done with.
    for old in folder.glob(f"{REPLACED}*"):
        name = folder / old.name.removeprefix(REPLACED).rpartition("-")[0]
        if name.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(name)
    temporary = folder / f"{SAVING}{tag}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def _write_tensors(tensors: dict[str, torch.Tensor], temporary: Path) -> None:
    try:
        save_sharded(tensors, storage_writer=_Writer(temporary, sync_files=True))
    except CheckpointException as error:
        failure = error.failures.get(dist.get_rank())
        if failure is not None:  # else another rank says why
            raise CheckpointError(reason(failure[0])) from None


def _write_rank_files(temporary: Path, own: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write this rank's own files; returns size and checksum of everything that this rank wrote."""
    for name, data in own.items():
        try:
            with (temporary / name).open("wb") as file:
                torch.save(data, file)
                file.flush()
                os.fsync(file.fileno())
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise _not_plain(name, data, error) from None
        _check_plain(temporary / name, data)
    rank = dist.get_rank()
    mine = [*own] + [path.name for path in temporary.glob(f"__{rank}_*")]
    if rank == 0:
        mine.append(".metadata")
    return {name: {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in mine}


def _check_plain(path: Path, data: dict[str, Any]) -> None:
    """What is written must be readable without running code; find the culprit now, not at the resume."""
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - torch raises whatever the foreign class's pickle leads to
        raise _not_plain(path.name, data, error) from None


def _not_plain(name: str, data: dict[str, Any], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name} with keys {', '.join(map(repr, data))}: holds something other than tensors, numbers, text, lists and "
        f"dicts ({reason(error).splitlines()[0][:200]}); store its state_dict instead"
    )


def _publish(folder: Path, tag: str, temporary: Path, manifest: dict[str, Any], *, save_latest: bool) -> None:
    write_manifest(temporary, manifest)
    final = folder / tag
    replaced = folder / f"{REPLACED}{tag}-{uuid.uuid4().hex[:8]}"
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    fsync_folder(folder)
    if save_latest:
        write_atomic(folder / LATEST, tag)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)
