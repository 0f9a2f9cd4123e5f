"""Ranks do a thing together or not at all: a failure of one is told to all."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")


def together(what: str, do: Callable[[], Value]) -> list[Value]:
    """Collective. Run ``do`` on every rank; returns the values of all, by rank.

    Raises:
        CheckpointError: the same on every rank, when ``do`` failed on any of them.
    """
    mine: tuple[str | None, Any]
    failure: Exception | None = None
    try:
        mine = None, do()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are waiting to be told
        failure, mine = error, (reason(error), None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, (error_text, _) in enumerate(everyone):
        if error_text is not None:
            raise CheckpointError(f"{what}: rank {rank}: {error_text}") from failure
    return [value for _, value in everyone]


def reason(error: BaseException) -> str:
    """What went wrong in a few words: what the operating system said, where that is beneath it.

    torch's zip writer hides a full disk behind a complaint of its own, and its unpickler a class behind advice.
    """
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
        return f"{found[1]} is not among the types that are read"
    beneath: BaseException | None = error
    while beneath is not None:
        if isinstance(beneath, OSError) and beneath.strerror:
            return beneath.strerror
        beneath = beneath.__cause__ or (None if beneath.__suppress_context__ else beneath.__context__)
    return str(error) or type(error).__name__


def on_rank_0(what: str, do: Callable[[], Value]) -> Value:
    """Collective. Run ``do`` on rank 0 and give its value to all.

    Raises:
        CheckpointError: the same on every rank, when it failed.
    """
    return together(what, lambda: do() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]
