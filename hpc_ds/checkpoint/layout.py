"""The files of a checkpoint, and which of several is whole.

<dir>/
    latest                     the tag of the newest whole checkpoint
    <tag>/                     visible only when whole: it was renamed here after everything in it was durable
        manifest.json          format, step, world size, stage, versions, engine state, size and SHA-256 of each file,
                               and a seal: the SHA-256 of all that
        .metadata, __R_0.distcp   torch.distributed.checkpoint: parameters, buffers, optimizer state
        rank-R.pt              random-number states of rank R
        client_state.pt        what the user handed to save_checkpoint
    .saving-<tag>-<id>/        a save under way, or one that died
    .replaced-<tag>-<id>/      the old <tag>, for the moment in which it is replaced; as whole as any other
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import CheckpointError
from hpc_ds.run_dir import write_json

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
CLIENT_STATE = "client_state.pt"
SAVING = ".saving-"
REPLACED = ".replaced-"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint on disk, as its manifest describes it.

    Attributes:
        path: its folder.
        step: optimizer steps taken.
        files: name -> {"size": bytes, "sha256": hex}.
        state: the engine's own state, plain JSON.
    """

    path: Path
    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    state: dict[str, Any]

    @property
    def tag(self) -> str:
        """The name it was saved under."""
        name = self.path.name
        return name.removeprefix(REPLACED).rpartition("-")[0] if name.startswith(REPLACED) else name


def rank_file(rank: int) -> str:
    """The name of the file of one rank."""
    return f"rank-{rank}.pt"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the checkpoint in a folder, with its seal."""
    write_json(path / MANIFEST, {**manifest, "seal": _seal(manifest)})


def _seal(manifest: dict[str, Any]) -> str:
    """The checksum of what a manifest says, as a reader of its JSON understands it."""
    said = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "seal"}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Saved:
    """The checkpoint in a folder, its files not yet looked at.

    Raises:
        CheckpointError: there is none, or one of a newer hpc_ds.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"checkpoint {str(path)!r}: format {manifest['format']}, this hpc_ds reads up to {FORMAT}; use a newer one",
                str(path),
            )
        _check_seal(path, manifest)
        return Saved(
            path, int(manifest["step"]), int(manifest["world_size"]), dict(manifest["files"]), manifest["state"]
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: it has no {MANIFEST}; it is none of ours", str(path)
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: {MANIFEST} is damaged: {error!r}; use another", str(path)
        ) from None


def _check_seal(path: Path, manifest: dict[str, Any]) -> None:
    if manifest["seal"] != _seal(manifest):
        raise CheckpointError(
            f"checkpoint {str(path)!r}: {MANIFEST} is damaged: it does not fit its seal; use another", str(path)
        )


def damage_in(saved: Saved, names: list[str]) -> str | None:
    """The first thing wrong with some files of a checkpoint: missing, of another size, or other bytes."""
    for name in names:
        wanted, path = saved.files[name], saved.path / name
        try:
            if path.stat().st_size != wanted["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['size']}"
            if sha256(path) != wanted["sha256"]:
                return f"{name} does not have the bytes that were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def sha256(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def candidates(folder: Path) -> list[Path]:
    """The checkpoint folders to try, best first: what ``latest`` names, then by step, newest first."""
    try:
        latest = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        latest = ""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(SAVING) or not (path / MANIFEST).is_file():
            continue
        try:
            step = read_manifest(path).step
        except CheckpointError:
            step = -1
        found.append((path.name == latest, step, path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint that its manifest can be read of; None where there is none."""
    for path in candidates(folder):
        try:
            return read_manifest(path).step
        except CheckpointError:
            continue
    return None
