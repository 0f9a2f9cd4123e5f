"""The files of a checkpoint, and which of several to try first.

<dir>/
    latest                     the tag of the newest whole checkpoint
    <tag>/                     visible only when whole: it was renamed here after everything in it was durable
        manifest.json          format, step, world size, stage, versions, engine and client state, size of every file,
                               SHA-256 of the indexes, and a seal: the SHA-256 of all that
        rank-R.safetensors     the tensors that rank R wrote: ranges of flattened tensors (hpc_ds/checkpoint/index.py)
        rank-R.json            index of that file: its tensors, the checksum of every block; the state of rank R
        pinned                 there is one where retention must leave the checkpoint alone
    .saving-<tag>-<id>/        a save under way, or one that died (hpc_ds/checkpoint/commit.py)
    .replaced-<tag>-<id>/      the old <tag>, for the moment in which it is replaced; as whole as any other
    .removing-<tag>-<id>/      on its way out
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import CheckpointError, DamagedError
from hpc_ds.run_dir import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMAT = 2  # 1 was torch.distributed.checkpoint's files with a manifest
MANIFEST = "manifest.json"
LATEST = "latest"
PINNED = "pinned"
SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"
# What other programs leave, and what to say of it.
_FOREIGN = {
    "mp_rank_*_model_states.pt": "DeepSpeed's; turn it into one of ours with `hpcds checkpoint import-deepspeed`",
    "zero_pp_rank_*": "DeepSpeed's; turn it into one of ours with `hpcds checkpoint import-deepspeed`",
    ".metadata": "torch.distributed.checkpoint's; load it with torch and save it again",
    "*.safetensors": "plain weights; load them into the model before hpc_ds.initialize",
    "pytorch_model*.bin": "plain weights; load them into the model before hpc_ds.initialize",
}


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint on disk, as its manifest describes it.

    Attributes:
        path: its folder.
        id: of this save; its indexes carry it too, so that files of two saves are never taken for one.
        step: optimizer steps taken.
        files: name -> {"size": bytes} and, for indexes, "sha256".
        state: the engine's own state, plain JSON.
        client_state: what the user and the engine left, encoded (hpc_ds/checkpoint/plain.py).
        created: seconds since the epoch.
        stage: ZeRO stage that it was saved at.
        versions: of hpc_ds, torch and Python.
    """

    path: Path
    id: str
    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    state: dict[str, Any]
    client_state: Any = None
    created: float = 0.0
    stage: int | None = None
    config_hash: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """The name it was saved under."""
        return tag_of(self.path)

    @property
    def size_bytes(self) -> int:
        """Of all its files but the manifest."""
        return sum(int(entry["size"]) for entry in self.files.values())

    @property
    def pinned(self) -> bool:
        """Whether retention must leave it alone."""
        return (self.path / PINNED).exists()


def tag_of(path: Path) -> str:
    """The tag of a checkpoint folder, also of one that is being replaced."""
    name = path.name
    return name.removeprefix(REPLACED).rpartition("-")[0] if name.startswith(REPLACED) else name


def check_tag(tag: str) -> None:
    """Refuse what is not the name of a folder in the checkpoint folder.

    Raises:
        CheckpointError: it is none.
    """
    if not tag or tag.startswith(".") or "/" in tag or "\0" in tag or tag == LATEST:
        raise CheckpointError(f"checkpoint tag {tag!r}: not a folder name; use for example 'global_step100'")


def data_file(rank: int) -> str:
    """The name of the file with the tensors of one rank."""
    return f"rank-{rank}.safetensors"


def index_file(rank: int) -> str:
    """The name of the index of one rank."""
    return f"rank-{rank}.json"


def failed_file(rank: int) -> str:
    """The name of the file in which a rank says that it could not write."""
    return f"rank-{rank}.failed"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the checkpoint in a folder, with its seal; it is durable on return."""
    # Nothing but ASCII: a user's text may hold what UTF-8 cannot.
    write_atomic(path / MANIFEST, json.dumps({**manifest, "seal": _seal(manifest)}, indent=2))


def _seal(manifest: dict[str, Any]) -> str:
    """The checksum of what a manifest says, as a reader of its JSON understands it."""
    said = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "seal"}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Saved:
    """The checkpoint in a folder, its files not yet looked at.

    Raises:
        DamagedError: its manifest is not what was written.
        CheckpointError: there is none, or one of another format.
    """
    what = f"checkpoint {str(path)!r}"
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        wanted = int(manifest["format"])
        if wanted != FORMAT:
            cure = "use a newer one" if wanted > FORMAT else "load it with hpc_ds 0.1 and its weights into a new run"
            raise CheckpointError(f"{what}: format {wanted}, this hpc_ds reads {FORMAT}; {cure}", str(path))
        return _parse(path, manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise _not_ours(path) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read: {error!r}") from None


def _parse(path: Path, manifest: dict[str, Any]) -> Saved:
    if manifest["seal"] != _seal(manifest):
        raise damaged(path, f"{MANIFEST} does not fit its seal")
    saved = Saved(
        path, manifest["id"], int(manifest["step"]), int(manifest["world_size"]), dict(manifest["files"]),
        manifest["state"], manifest["client_state"], float(manifest["created"]), manifest["stage"],
        manifest["config_hash"], dict(manifest["versions"]),
    )  # fmt: skip
    if len(saved.files) != 2 * saved.world_size or saved.files.keys() != set(files_of(saved.world_size)):
        raise damaged(path, f"{MANIFEST} does not name the files of {saved.world_size} ranks")
    return saved


def damaged(path: Path, damage: str) -> DamagedError:
    """The error for a checkpoint one of whose files is not what was written."""
    return DamagedError(f"checkpoint {str(path)!r}: damaged: {damage}; load another tag", str(path), damage)


def files_of(world_size: int) -> list[str]:
    """The names of all files but the manifest."""
    return [name for rank in range(world_size) for name in (data_file(rank), index_file(rank))]


def _not_ours(path: Path) -> CheckpointError:
    what = f"checkpoint {str(path)!r}"
    if not path.is_dir():
        beside = [found.name for found in candidates(path.parent)][:3]
        there = f"; there are {', '.join(map(repr, beside))}" if beside else "; there is none in that folder"
        return CheckpointError(f"{what}: no such checkpoint{there}", str(path))
    for pattern, whose in _FOREIGN.items():
        if next(path.glob(pattern), None) is not None:
            return CheckpointError(f"{what}: it has no {MANIFEST}; it looks like {whose}", str(path))
    return CheckpointError(f"{what}: it has no {MANIFEST}; it is none of ours, give another", str(path))


def wrong_size(saved: Saved) -> str | None:
    """The first file of a checkpoint that is missing or has another size than was written; one look at each file."""
    for name, entry in saved.files.items():
        try:
            size = (saved.path / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
    return None


def candidates(folder: Path) -> list[Path]:
    """The checkpoint folders to try, best first: what ``latest`` names, then by step, newest first."""
    latest = read_latest(folder)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        hidden = path.name.startswith(".") and not path.name.startswith(REPLACED)
        if hidden or not (path / MANIFEST).is_file():
            continue
        try:
            saved = read_manifest(path)
            step, created = saved.step, saved.created
        except CheckpointError:
            step, created = -1, 0.0
        found.append((path.name == latest, step, created, path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def read_latest(folder: Path) -> str:
    """What ``latest`` says; empty where there is none."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def listed(folder: Path) -> Iterator[tuple[Path, Saved | None, str | None]]:
    """Every checkpoint of a folder in the order of ``candidates``: its folder, its manifest, what is wrong with it.

    Wrong is what one look at each file shows; for checksums see hpc_ds/checkpoint/verify.py.
    """
    for path in candidates(folder):
        try:
            saved = read_manifest(path)
        except CheckpointError as error:
            yield path, None, str(error)
        else:
            yield path, saved, wrong_size(saved)


def newest_step(folder: Path) -> int | None:
    """The step that a load would go on from, as far as one look at each file shows; None where there is none."""
    return next((saved.step for _, saved, damage in listed(folder) if saved is not None and damage is None), None)


def check_foreign(folder: Path) -> None:
    """Refuse to start fresh in a folder that holds another program's checkpoints.

    Raises:
        CheckpointError: ``latest`` stands there, and names something that is none of ours.
    """
    latest = read_latest(folder)
    if not latest:
        return
    named = folder / latest
    if "/" not in latest and named.is_dir():
        raise _not_ours(named)
    raise CheckpointError(
        f"checkpoint folder {str(folder)!r}: it has a file {LATEST!r} but no checkpoint of ours; is it another program's?",
        str(folder),
    )
