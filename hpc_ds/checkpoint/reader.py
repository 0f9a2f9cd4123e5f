"""Loading: verify, agree, and only then touch the model. What is damaged is passed over for the newest whole one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

from hpc_ds.checkpoint.agree import on_rank_0, reason, together
from hpc_ds.checkpoint.layout import CLIENT_STATE, LATEST, Saved, candidates, damage_in, rank_file, read_manifest
from hpc_ds.checkpoint.metadata import PlainReader
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("hpc_ds")


def find(folder: Path, tag: str | None = None) -> Saved | None:
    """The checkpoint to load: the one named, else the newest that is whole. Collective.

    Every file is checked against size and checksum, each rank taking its share of them, and all ranks take the same
    decision.

    Returns:
        None when no tag is asked for and there is no checkpoint at all.

    Raises:
        CheckpointError: the named one is missing or damaged, or there are some and none is whole.
    """
    what = f"checkpoint folder {str(folder)!r}: not loaded"
    if tag is not None:
        named = on_rank_0(what, lambda: read_manifest(folder / tag))
        damage = _agreed_damage(named)
        if damage is not None:
            raise CheckpointError(
                f"checkpoint {str(folder / tag)!r}: damaged: {damage}; load another tag", str(folder / tag)
            )
        return named
    paths = on_rank_0(what, lambda: _all_candidates(folder))
    for path in paths:
        saved, damage = _try(path)
        if saved is not None and damage is None:
            return saved
        if dist.get_rank() == 0:
            log.warning("checkpoint %s: damaged: %s; trying the one before", path, damage)
    if paths:
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r}: none of its {len(paths)} checkpoints is whole", str(folder)
        )
    return None


def load_tensors(saved: Saved, tensors_of: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Fill tensors in place, each rank reading what its shards need. Collective.

    Args:
        saved: the checkpoint.
        tensors_of: says which, by name; it may look into the checkpoint, and fail on any rank.

    Raises:
        CheckpointError: a tensor is not in the checkpoint, or has another shape.
    """
    what = f"checkpoint {str(saved.path)!r}: not loaded"
    tensors: dict[str, torch.Tensor] = {}
    together(what, lambda: tensors.update(tensors_of()))

    def load() -> None:
        try:
            load_sharded(tensors, storage_reader=PlainReader(saved.path))
        except CheckpointException as error:
            failure = error.failures.get(dist.get_rank())
            if failure is not None:  # else another rank says why
                raise CheckpointError(reason(failure[0])) from None

    together(what, load)


def read_rank_state(saved: Saved) -> dict[str, Any] | None:
    """What this rank left; None when the world has another size now. Collective.

    Raises:
        CheckpointError: it cannot be read without running code, on some rank.
    """
    if saved.world_size != dist.get_world_size():
        return None
    return _load_plain(saved, "state of its ranks", rank_file(dist.get_rank()))


def read_client_state(saved: Saved) -> dict[str, Any]:
    """What the user left. Collective.

    Raises:
        CheckpointError: it cannot be read without running code, on some rank.
    """
    return _load_plain(saved, "client state", CLIENT_STATE)


def _load_plain(saved: Saved, what: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def load() -> None:
        found.update(torch.load(saved.path / name, weights_only=True, map_location="cpu"))

    together(f"checkpoint {str(saved.path)!r}: {what} not loaded", load)
    return found


def _all_candidates(folder: Path) -> list[Path]:
    paths = candidates(folder)
    if not paths and (folder / LATEST).exists():
        raise CheckpointError(f"it has a file {LATEST!r} but no checkpoint of ours; is it another program's?")
    return paths


def _try(path: Path) -> tuple[Saved | None, str | None]:
    try:
        saved = on_rank_0("manifest", lambda: read_manifest(path))
    except CheckpointError as error:
        return None, str(error)
    return saved, _agreed_damage(saved)


def _agreed_damage(saved: Saved) -> str | None:
    """Collective. The first damage that any rank found in its share of the files."""
    mine = sorted(saved.files)[dist.get_rank() :: dist.get_world_size()]
    found = together("verify", lambda: damage_in(saved, mine))
    return next((damage for damage in found if damage is not None), None)
