"""``wall_clock_breakdown``: how long forward, backward and step take, without slowing them down.

On CUDA a measurement is two events in the stream, read when the device has passed them; the host waits for the device
only where a line is printed. On CPU it is two readings of a clock.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

log = logging.getLogger("hpc_ds")

DEFAULT_STEPS_PER_PRINT = 10


class _Pending(NamedTuple):
    part: str
    start: torch.cuda.Event
    end: torch.cuda.Event


class StepTimers:
    """The times of one rank's steps; switched off, it does nothing.

    Use: ``with timers.measure("fwd"): ...``, the same for ``bwd`` and ``step``, and ``timers.step_done(n)`` after each step.
    """

    def __init__(
        self,
        enabled: bool,
        device: torch.device,
        train_batch_size: int,
        steps_per_print: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._enabled = enabled
        self._device = device
        self._train_batch_size = train_batch_size
        self._every = steps_per_print or DEFAULT_STEPS_PER_PRINT
        self._clock = clock
        self._ms: dict[str, float] = {}
        self._pending: list[_Pending] = []
        self._idle: list[torch.cuda.Event] = []
        self._steps = 0
        self._since = clock()

    def measure(self, part: str) -> AbstractContextManager[None]:
        """Add the time inside to a part of the step."""
        if not self._enabled:
            return nullcontext()
        return self._between_events(part) if self._device.type == "cuda" else self._between_readings(part)

    def step_done(self, step: int) -> None:
        """Count a step; when a line is due, tell the mean of the steps since the last one.

        Args:
            step: its number, from 1.
        """
        if not self._enabled:
            return
        self._steps += 1
        due = step % self._every == 0
        self._read_events(wait=due)
        if due:
            log.info("step %d: %s", step, self._line())
            self._ms = dict.fromkeys(self._ms, 0.0)
            self._steps = 0
            self._since = self._clock()

    def _line(self) -> str:
        parts = [f"{part}: {ms / self._steps:.2f}" for part, ms in self._ms.items()]
        seconds = self._clock() - self._since
        rate = f"{self._steps * self._train_batch_size / seconds:.1f}" if seconds > 0 else "?"
        return " | ".join(["time (ms)", *parts, f"samples/s: {rate}"])

    @contextmanager
    def _between_readings(self, part: str) -> Iterator[None]:
        start = self._clock()
        yield
        self._add(part, (self._clock() - start) * 1000)

    @contextmanager
    def _between_events(self, part: str) -> Iterator[None]:
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._pending.append(_Pending(part, start, end))

    def _event(self) -> torch.cuda.Event:
        return self._idle.pop() if self._idle else torch.cuda.Event(enable_timing=True)

    def _read_events(self, wait: bool) -> None:
        """Read the events that the device has passed, or all."""
        left = []
        for pending in self._pending:
            if wait:
                pending.end.synchronize()
            if pending.end.query():
                self._add(pending.part, pending.start.elapsed_time(pending.end))
                self._idle += [pending.start, pending.end]
            else:
                left.append(pending)
        self._pending = left

    def _add(self, part: str, ms: float) -> None:
        self._ms[part] = self._ms.get(part, 0.0) + ms
