"""A roll call before what all ranks must do together: who does not come is named, instead of a hang.

A script that saves under ``if rank == 0`` waits for ever otherwise, and nothing says for whom.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, default_pg_timeout

from hpc_ds.errors import RankError

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import Store  # type: ignore[attr-defined] # torch's stubs leave it out

_PREFIX = "hpc_ds/roll_call"
_calls = itertools.count()


def roll_call(what: str, timeout: timedelta | None = None) -> None:
    """Collective. Wait until every rank has called this with the same words.

    Args:
        what: the function that is about to communicate, in the user's words.
        timeout: default: that of the process group's collectives.

    Raises:
        RankError: some rank did not come in time, or came to call something else; they are named.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size == 1:
        return
    number = next(_calls)
    store, call = _get_default_store(), f"{_PREFIX}/{number}"
    store.set(f"{call}/{rank}", what)
    store.add(f"{call}/same/{what}", 1)
    if store.add(f"{call}/came", 1) == world_size:
        store.set(f"{call}/all", "")
    limit = timeout or _timeout_of_group()
    try:
        store.wait([f"{call}/all"], limit)
    except RuntimeError:
        absent = [other for other in range(world_size) if not store.check([f"{call}/{other}"])]
        raise RankError(
            f"{what}: {_names(absent)} did not call it within {limit.total_seconds():g} s; it is collective: call it on every "
            "rank, never under `if rank == 0`"
        ) from None
    if store.add(f"{call}/same/{what}", 0) < world_size:
        called = [store.get(f"{call}/{other}").decode() for other in range(world_size)]
        others = [other for other in range(world_size) if called[other] != what]
        raise RankError(f"{what}: {_names(others)} called {called[others[0]]} instead; call the same on every rank")
    _forget(store, rank, number - 1)


def _forget(store: Store, rank: int, number: int) -> None:
    """Drop what the call before left, which nobody reads now that all have come to the next one."""
    previous = f"{_PREFIX}/{number}"
    if number >= 0 and store.check([f"{previous}/{rank}"]):
        what = store.get(f"{previous}/{rank}").decode()
        store.delete_key(f"{previous}/{rank}")
        if rank == 0:
            for word in ("came", "all", f"same/{what}"):
                store.delete_key(f"{previous}/{word}")


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _timeout_of_group() -> timedelta:
    group = dist.group.WORLD
    options = getattr(getattr(group, "_get_backend", lambda _: None)(_any_device(group)), "options", None)
    return getattr(options, "_timeout", None) or default_pg_timeout


def _any_device(group: object) -> object:
    return next(iter(getattr(group, "_device_types", []) or []), None)
