"""The attempts of a run as a person asks for them: what each cost and how many of its steps had to be taken again."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.supervise.ledger import Attempt


def lost_after(attempts: Sequence[Attempt]) -> list[int]:
    """Of each attempt the steps that lie beyond what the next one went on from: those that were taken again.

    The next one is the next that took a step, so far as the ledger knows. Of one that still runs it does not, and what
    it went on from is the newest checkpoint that its predecessor left. After the last attempt nothing was taken again.
    """
    lost = [0] * len(attempts)
    reached: int | None = None
    holder = 0
    for place, attempt in enumerate(attempts):
        first = attempt.first_step
        if first is None and attempt.cause is None and reached is not None and place == len(attempts) - 1:
            saved = attempts[place - 1].saved_step
            first = None if saved is None else saved + 1
        if first is not None and reached is not None:
            lost[holder] = max(reached - first + 1, 0)
        if attempt.last_step is not None:
            reached, holder = attempt.last_step, place
    return lost


def history(attempts: Sequence[Attempt], now: float, *, over: bool) -> list[dict[str, Any]]:
    """Plain data of every attempt: its ledger, and besides its seconds, whether it still runs, and steps lost after it."""
    return [
        {
            **asdict(attempt),
            "seconds": _seconds(attempt, None if over else now),
            "running": attempt.cause is None and not over,
            "lost_steps": lost,
        }
        for attempt, lost in zip(attempts, lost_after(attempts), strict=True)
    ]


def _seconds(attempt: Attempt, now: float | None) -> float | None:
    end = now if attempt.closed is None else attempt.closed
    return None if end is None else round(max(end - attempt.opened, 0.0), 3)
