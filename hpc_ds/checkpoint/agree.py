"""Ranks do a thing together or not at all: a failure of one is told to all.

A process outside of any process group is rank 0 of 1.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")


def own_rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(what: str, do: Callable[[], Value]) -> list[Value]:
    """Collective. Run ``do`` on every rank; returns the values of all, by rank.

    Raises:
        CheckpointError: the same on every rank, when ``do`` failed on any of them.
    """
    outcome, failure = _tried(do)
    everyone: list[Any] = [outcome]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, outcome)
    for rank, (text, _) in enumerate(everyone):
        if text is not None:
            raise CheckpointError(f"{what}: rank {rank}: {text}") from failure
    return [value for _, value in everyone]


def on_rank_0(what: str, do: Callable[[], Value]) -> Value:
    """Collective. Run ``do`` on rank 0 and give its value to all.

    Raises:
        CheckpointError: the same on every rank, when it failed.
    """
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if own_rank() == 0:
        outcome[0], failure = _tried(do)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    text, value = outcome[0]
    if text is not None:
        raise CheckpointError(f"{what}: rank 0: {text}") from failure
    return value  # type: ignore[no-any-return]


def reason(error: BaseException) -> str:
    """What went wrong in a few words: what the operating system said, where that is beneath it."""
    beneath: BaseException | None = error
    while beneath is not None:
        if isinstance(beneath, OSError) and beneath.strerror:
            return beneath.strerror
        beneath = beneath.__cause__ or (None if beneath.__suppress_context__ else beneath.__context__)
    return str(error) or type(error).__name__


def _tried(do: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What went wrong in words or None, with the value; and the error itself."""
    try:
        value = do()
        if world_size() > 1:
            pickle.dumps(value)  # what cannot travel must fail here, where the others are told
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are waiting to be told
        return (reason(error), None), error
    return (None, value), None
