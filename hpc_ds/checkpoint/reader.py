"""Loading: agree on a checkpoint whose files fit together, then fill ranges from it while checking every block.

Any wanted range is put together from whatever ranges the ranks of the save wrote, so world size and stage may differ;
types are converted on the way. What is damaged is passed over for the newest whole one before it, by all ranks alike.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.checkpoint import layout
from hpc_ds.checkpoint.agree import on_rank_0, own_rank, together, world_size
from hpc_ds.checkpoint.fill import check_range, fill
from hpc_ds.checkpoint.index import read_index
from hpc_ds.checkpoint.layout import candidates, read_manifest
from hpc_ds.checkpoint.plain import decode
from hpc_ds.checkpoint.shards import DTYPES, Shard
from hpc_ds.checkpoint.stored import Stored, read_stored
from hpc_ds.checkpoint.writer import CLIENT_STATE, RANK_STATE
from hpc_ds.errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("hpc_ds")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came out of a checkpoint beside the ranges that were asked for.

    Attributes:
        stored: the checkpoint.
        client_state: what the user and the engine left.
        rank_state: what this rank left; None when the world has another size now.
    """

    stored: Stored
    client_state: Any
    rank_state: Any


def find(folder: Path, tag: str | None = None) -> Stored | None:
    """The checkpoint to load: the one named, else the newest whose files are all there. Collective.

    Its manifest and indexes are checked in full, of its data files the sizes; their bytes are checked when they are read.

    Returns:
        None when no tag is asked for and there is no checkpoint at all.

    Raises:
        CheckpointError: the same on every rank: the named one is missing or damaged, or there are some and none is whole.
    """
    for path in _paths(folder, tag):
        stored = _open(path, pass_over=tag is None)
        if stored is not None:
            return stored
    _refuse_none_whole(folder, tag)
    return None


def load(
    folder: Path,
    tag: str | None,
    wanted_of: Callable[[Stored], list[Shard]],
    *,
    everything: bool = True,
) -> Loaded | None:
    """Fill ranges from the checkpoint named, else from the newest whole one. Collective.

    Values are filled in place while the bytes are checked: where this raises because of damage, they are undefined.

    Args:
        folder: of the checkpoints.
        tag: which one.
        wanted_of: says what to fill; it may look into the checkpoint, and refuse it with a CheckpointError.
        everything: whether to check also the bytes that nobody wants.

    Returns:
        None when no tag is asked for and there is no checkpoint at all.

    Raises:
        CheckpointError: the same on every rank: see ``find``; or what is wanted is not in the checkpoint.
    """
    touched: set[str] = set()
    for path in _paths(folder, tag):
        stored = _open(path, pass_over=tag is None)
        if stored is None:
            continue
        what = f"checkpoint {str(path)!r}: not loaded"
        wanted: list[Shard] = []
        together(what, partial(_ask, wanted_of, stored, touched, wanted))
        loaded, damage = _read_all(stored, wanted, everything=everything)
        if loaded is not None:
            return loaded
        _pass_over(path, damage, pass_over=tag is None)
        touched |= {shard.name for shard in wanted}
    _refuse_none_whole(folder, tag)
    return None


def read_into(stored: Stored, wanted: list[Shard], *, everything: bool = False) -> str | None:
    """Fill ranges in place. Collective.

    Returns:
        The first damage that any rank found; what was to be filled is then undefined.

    Raises:
        CheckpointError: the same on every rank: a range is not in the checkpoint.
    """
    found = together(
        f"checkpoint {str(stored.path)!r}: not loaded", lambda: fill(stored, wanted, everything=everything)
    )
    return next((damage for damage in found if damage is not None), None)


def _paths(folder: Path, tag: str | None) -> list[Path]:
    def look() -> list[Path]:
        if tag is not None:
            layout.check_tag(tag)
            return [folder / tag]
        paths = candidates(folder)
        if not paths:
            layout.check_foreign(folder)
        return paths

    return on_rank_0(f"checkpoint folder {str(folder)!r}: not loaded", look)


def _open(path: Path, *, pass_over: bool) -> Stored | None:
    """The checkpoint in a folder; None where it is passed over."""

    def look() -> tuple[Stored | None, str | None]:
        try:
            return read_stored(read_manifest(path)), None
        except DamagedError as error:
            return None, error.damage
        except CheckpointError as error:
            if not pass_over:
                raise
            return None, str(error)

    stored, damage = on_rank_0(f"checkpoint {str(path)!r}: not loaded", look)
    if stored is None:
        _pass_over(path, damage, pass_over=pass_over)
    return stored


def _pass_over(path: Path, damage: str | None, *, pass_over: bool) -> None:
    if not pass_over:
        raise layout.damaged(path, damage or "")
    if own_rank() == 0:
        log.warning("checkpoint %s: damaged: %s; trying the one before", path, damage)


def _refuse_none_whole(folder: Path, tag: str | None) -> None:
    """Raise where there are checkpoints, and all of them are damaged. Collective."""
    count = len(_paths(folder, tag))
    if count:
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r}: none of its {count} checkpoints is whole; "
            "load another folder, or start fresh in an empty one",
            str(folder),
        )


def _ask(wanted_of: Callable[[Stored], list[Shard]], stored: Stored, touched: set[str], wanted: list[Shard]) -> None:
    wanted += wanted_of(stored)
    mixed = touched - {shard.name for shard in wanted}
    if mixed:
        raise CheckpointError(
            f"{min(mixed)!r} was filled from a newer checkpoint that turned out to be damaged, and is not in this one; "
            "name the tag to load"
        )
    for shard in wanted:
        check_range(stored, shard)


def _read_all(stored: Stored, wanted: list[Shard], *, everything: bool) -> tuple[Loaded | None, str | None]:
    """Fill what is wanted, and the tensors in the two states; what came out, or the damage found. Collective."""
    rank = own_rank() if stored.saved.world_size == world_size() else None
    client = _tensors_of(stored, f"{CLIENT_STATE}.")
    own = [] if rank is None else _tensors_of(stored, f"{RANK_STATE}.{rank}.")
    damage = read_into(stored, [*wanted, *client, *own], everything=everything)
    if damage is not None:
        return None, damage

    def decode_both() -> tuple[Any, Any]:
        client_state = decode(stored.saved.client_state, _shaped(client))
        return client_state, None if rank is None else decode(read_index(stored.saved, rank).state, _shaped(own))

    states: list[tuple[Any, Any]] = []

    def decode_here() -> str | None:
        try:
            states.append(decode_both())
        except DamagedError as error:
            return error.damage
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"its client or rank state is not in a form that is read: {error!r}") from None
        return None

    found = together(f"checkpoint {str(stored.path)!r}: not loaded", decode_here)
    damage = next((text for text in found if text is not None), None)
    return (None, damage) if damage is not None else (Loaded(stored, *states[0]), None)


def _tensors_of(stored: Stored, prefix: str) -> list[Shard]:
    """Room for the tensors of a state, in the order of their numbers."""
    names = [name for name in stored.tensors if name.startswith(prefix) and name.removeprefix(prefix).isdigit()]
    found = []
    for name in sorted(names, key=lambda name: int(name.removeprefix(prefix))):
        entry = stored.tensors[name]
        count = sum(piece.length for piece in entry.pieces)
        found.append(Shard(name, entry.shape, 0, torch.empty(count, dtype=DTYPES[entry.dtype])))
    return found


def _shaped(shards: list[Shard]) -> list[torch.Tensor]:
    return [shard.data.reshape(shard.shape) for shard in shards]
