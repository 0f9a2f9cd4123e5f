"""What a save costs, and what follows from it: how often to save, and what to do when the end is near."""

from __future__ import annotations

import math
from dataclasses import dataclass

FINISH_AND_SAVE, SAVE, FINISH = "finish and save", "save", "finish"


@dataclass(slots=True)
class SaveCost:
    """The latest measurements of one engine.

    Attributes:
        stall_s: seconds for which training stood still; None before the first save.
        durable_s: seconds from the beginning of a save to its commit.
    """

    stall_s: float | None = None
    durable_s: float | None = None


def best_interval_s(stall_s: float, failures_every_s: float) -> float:
    """Seconds between saves that lose the least time to saving and to repeating steps together.

    sqrt(2 * stall * mean time between failures), the first order of the optimum, for saves that take much less time than
    passes between failures.

    Source: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974; J. T. Daly, A
    higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006, equation 13.
    """
    return math.sqrt(2 * stall_s * failures_every_s)


def choice(remaining_s: float | None, save_s: float, left_s: float) -> str:
    """What makes the newest step durable before the end.

    Args:
        remaining_s: seconds until an older save is durable that is being written; None where there is none.
        save_s: seconds that a new one takes.
        left_s: seconds until the end; infinite where it is not known.
    """
    if remaining_s is None or remaining_s + save_s <= left_s:
        return FINISH_AND_SAVE
    # Where neither fits, the one that lacks less: kill times and estimates are not exact.
    return SAVE if save_s <= left_s or save_s < remaining_s else FINISH
