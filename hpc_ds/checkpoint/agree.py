"""Ranks do a thing together or not at all: a failure of one is told to all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from hpc_ds.errors import CheckpointError, HpcdsError

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")


def together(what: str, do: Callable[[], Value]) -> list[Value]:
    """Collective. Run ``do`` on every rank; returns the values of all, by rank.

    Raises:
        CheckpointError: the same on every rank, when ``do`` failed on any of them.
    """
    mine: tuple[str | None, Any]
    try:
        mine = None, do()
    except (OSError, HpcdsError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        mine = f"{text or type(error).__name__}", None
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, (error_text, _) in enumerate(everyone):
        if error_text is not None:
            raise CheckpointError(f"{what}: rank {rank}: {error_text}")
    return [value for _, value in everyone]


def on_rank_0(what: str, do: Callable[[], Value]) -> Value:
    """Collective. Run ``do`` on rank 0 and give its value to all.

    Raises:
        CheckpointError: the same on every rank, when it failed.
    """
    return together(what, lambda: do() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]
