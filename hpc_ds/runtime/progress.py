"""What this rank is doing: marks that the training leaves and the watcher reads.

A mark is two plain stores into one object, without a lock: it is left several times in a step. Only the main thread
writes, and a reader that sees one store without the other is wrong by one mark.
"""

from __future__ import annotations

import functools
import os
import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hpc_ds.cluster.process import start_time

if TYPE_CHECKING:
    from collections.abc import Callable

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")


class Progress:
    """The marks of one process.

    Attributes:
        step: optimizer steps taken; None before anyone has said so.
        phase: starting, loading, forward, backward, step, saving, stopping, idle, finished, or a word of a script's own.
        at: when the last mark was left, by the monotonic clock.
        stopping: all ranks have agreed to stop, and this one knows.
    """

    __slots__ = ("at", "phase", "step", "stopping")

    def __init__(self) -> None:
        self.step: int | None = None
        self.phase = "starting"
        self.at = time.monotonic()
        self.stopping = False

    def mark(self, phase: str) -> None:
        """Say what begins now."""
        self.phase = phase
        self.at = time.monotonic()

    def stop(self) -> None:
        """Say that this rank is at the boundary at which all of them stop."""
        self.stopping = True
        self.mark("stopping")


progress = Progress()
mark = progress.mark


def during(phase: str) -> Callable[[Callable[_Arguments, _Value]], Callable[_Arguments, _Value]]:
    """Decorator: mark where a function begins, and afterwards return to the phase before; an error leaves the mark."""

    def around(function: Callable[_Arguments, _Value]) -> Callable[_Arguments, _Value]:
        @functools.wraps(function)
        def marked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Value:
            before = progress.phase
            mark(phase)
            value = function(*args, **kwargs)
            mark(before)
            return value

        return marked

    return around


def process_age_s() -> float | None:
    """Seconds since this process was started, imports and all; None where /proc does not say."""
    ticks = start_time(os.getpid())
    if ticks is None:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
