"""Saving: everything is durable under a temporary name before one rename makes it visible.

A failure of any rank before the rename ends the save on all ranks with the same error; the checkpoints before are
untouched. The steps of the commit are in hpc_ds/checkpoint/commit.py.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.checkpoint import commit
from hpc_ds.checkpoint.agree import on_rank_0, own_rank, reason, together, world_size
from hpc_ds.checkpoint.blocks import DataFile
from hpc_ds.checkpoint.index import Index, header_of, write_index
from hpc_ds.checkpoint.layout import FORMAT, check_tag, data_file
from hpc_ds.checkpoint.plain import Encoder
from hpc_ds.checkpoint.shards import Shard, Staging, data_bytes, place
from hpc_ds.errors import CheckpointError
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from hpc_ds.checkpoint.blocks import Source
    from hpc_ds.checkpoint.index import Entry

CLIENT_STATE, RANK_STATE = "client_state", "rank_state"  # before the number of a tensor in them


@dataclass(frozen=True, slots=True)
class Content:
    """What goes into one checkpoint.

    Attributes:
        shards: what this rank writes. The shards of all ranks together cover each tensor exactly once.
        rank_state: plain types and tensors that belong to this rank.
        client_state: plain types and tensors of the user's; rank 0's is kept.
        state: the engine's own state, plain JSON.
        step: optimizer steps taken.
        stage: ZeRO stage, for the user's eyes.
        config_hash: of the training config, for the user's eyes.
        run: which run saves; what an earlier attempt of it left behind is dead.
    """

    shards: list[Shard]
    rank_state: Any
    client_state: Any
    state: dict[str, Any]
    step: int
    stage: int | None = None
    config_hash: str | None = None
    run: commit.Run = field(default_factory=commit.Run)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Content turned into what stands in files: nothing that follows can fail but memory and the disk.

    Attributes:
        rank: that writes it.
        placed: tensors by their place in the data file.
        header: what stands before them.
        rank_state: JSON.
        manifest: all that is known before the files are written.
    """

    rank: int
    placed: list[tuple[Entry, torch.Tensor]]
    header: bytes
    rank_state: Any
    manifest: dict[str, Any]

    def without_data(self) -> Prepared:
        """The same without the tensors, which need not be kept once they are copied."""
        return replace(self, placed=[(entry, torch.empty(0)) for entry, _ in self.placed])


def save(folder: Path, tag: str, content: Content, *, save_latest: bool = True) -> Path:
    """Write one checkpoint; it is durable on return. Collective: every rank calls it, with the same tag.

    Args:
        folder: where the run's checkpoints live.
        tag: name of this one.
        content: what goes into it.
        save_latest: whether ``latest`` shall name it.

    Raises:
        CheckpointError: the same on every rank; nothing of this save is visible, and all before it is untouched.
    """
    what = f"checkpoint {str(folder / tag)!r}: not saved"
    prepared, hidden = begin(folder, tag, content)
    try:

        def write() -> dict[str, dict[str, Any]]:
            data = open_data(hidden, prepared, Staging(prepared.placed))
            data.start()
            return finish(hidden, data, prepared)

        files = together(what, write)
        manifest = complete(prepared.manifest, hidden, files)
        on_rank_0(what, lambda: commit.publish(hidden, folder / tag, manifest, save_latest=save_latest))
    except BaseException:
        if own_rank() == 0:
            commit.give_up(hidden)
        raise
    return folder / tag


def save_in_turn(
    folder: Path, tag: str, contents: Iterable[Content], world_size: int, *, save_latest: bool = True
) -> Path:
    """Write one checkpoint for ``world_size`` ranks from a single process, one content after another.

    Memory need hold one content at a time. The first one's states and step are those of the checkpoint.

    Raises:
        CheckpointError: nothing of this save is visible, and all before it is untouched.
    """
    check_tag(tag)
    files: list[dict[str, dict[str, Any]]] = []
    made: list[Path] = []
    manifests: list[dict[str, Any]] = []
    try:
        for rank, content in enumerate(contents):
            prepared = prepare(content, rank, world_size)
            manifests.append(prepared.manifest)
            if not made:
                made.append(commit.begin(folder, tag, content.run))
            hidden = made[0]
            data = open_data(hidden, prepared, Staging(prepared.placed))
            data.start()
            files.append(finish(hidden, data, prepared))
        manifest = complete(manifests[0], made[0], files)
        commit.publish(made[0], folder / tag, manifest, save_latest=save_latest)
    except BaseException as error:
        for hidden in made:
            commit.give_up(hidden)
        if isinstance(error, OSError):
            raise CheckpointError(f"checkpoint {str(folder / tag)!r}: not saved: {reason(error)}") from error
        raise
    return folder / tag


def begin(
    folder: Path, tag: str, content: Content, also: Callable[[Prepared], None] = lambda _: None
) -> tuple[Prepared, Path]:
    """Check and arrange what is to be written, and make the hidden folder for it. Collective.

    Args:
        folder: as of ``save``.
        tag: as there.
        content: as there.
        also: what each rank does before any goes on; where it fails on one rank, nothing is begun.

    Raises:
        CheckpointError: the same on every rank; nothing was written.
    """
    check_tag(tag)
    found: list[Prepared] = []
    made: list[Path] = []

    def prepare_and_begin() -> Path | None:
        found.append(prepare(content, own_rank(), world_size()))
        if own_rank() == 0:
            made.append(commit.begin(folder, tag, content.run))
        also(found[0])
        return made[0] if made else None

    try:
        hidden = together(f"checkpoint {str(folder / tag)!r}: not saved", prepare_and_begin)[0]
    except BaseException:
        for path in made:
            commit.give_up(path)
        raise
    return found[0], hidden  # type: ignore[return-value]


def prepare(content: Content, rank: int, world_size: int) -> Prepared:
    """Turn content into what stands in the files of a rank.

    Raises:
        CheckpointError: something in it cannot be stored.
    """
    shards = list(content.shards)
    states, client = Encoder(), Encoder()
    rank_state = states.encode(content.rank_state, "rank_state")
    client_state = client.encode(content.client_state, "client_state")
    try:
        json.dumps(content.state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state: {error}; hand over plain JSON") from None
    extra = {f"{RANK_STATE}.{rank}.{number}": tensor for number, tensor in enumerate(states.tensors)}
    if rank == 0:
        extra |= {f"{CLIENT_STATE}.{number}": tensor for number, tensor in enumerate(client.tensors)}
    shards += [Shard(name, tuple(tensor.shape), 0, tensor.reshape(-1)) for name, tensor in extra.items()]
    manifest = {
        "format": FORMAT,
        "step": content.step,
        "world_size": world_size,
        "stage": content.stage,
        "created": time.time(),
        "versions": {"hpc_ds": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "config_hash": content.config_hash,
        "state": content.state,
        "client_state": client_state,
    }
    placed = place(shards)
    return Prepared(rank, placed, header_of(entry for entry, _ in placed), rank_state, manifest)


def open_data(hidden: Path, prepared: Prepared, source: Source) -> DataFile:
    """The data file of a rank, ready to be started."""
    return DataFile(hidden / data_file(prepared.rank), prepared.header, data_bytes(prepared.placed), source)


def finish(hidden: Path, data: DataFile, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Wait for the data file, then write its index; both and their names are durable on return.

    Returns:
        What the manifest says of them.
    """
    data.finish()
    index = Index(
        save=commit.id_of(hidden),
        rank=prepared.rank,
        data_start=len(prepared.header),
        data_bytes=data_bytes(prepared.placed),
        header=data.header,
        blocks=data.blocks,
        entries=[entry for entry, _ in prepared.placed],
        state=prepared.rank_state,
    )
    return write_index(hidden, index)


def complete(manifest: dict[str, Any], hidden: Path, files: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The manifest, from what every rank said of its files."""
    if len(files) != manifest["world_size"]:
        raise TypeError(f"{len(files)} ranks have written, not {manifest['world_size']}")
    listed = {name: entry for of_rank in files for name, entry in of_rank.items()}
    return {**manifest, "id": commit.id_of(hidden), "files": listed}
