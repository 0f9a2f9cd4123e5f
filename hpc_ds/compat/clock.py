"""``deepspeed.utils.timer``: timers for scripts, on the host's clock, after the device has done its work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.compat.accelerator import get_accelerator
from hpc_ds.compat.logs import print_dist
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_TRIM = 0.1


def trim_mean(data: Iterable[float], trim_percent: float) -> float:
    """The mean of what is left when a share of the lowest numbers is taken away, and of the highest; 0 of none.

    Args:
        data: the numbers.
        trim_percent: the share, from 0 to 1.
    """
    ordered = sorted(data)
    cut = round(len(ordered) * trim_percent)
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept) if kept else 0.0


class _Timer:
    """One timer, of any number of intervals."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self._start_s = 0.0
        self._intervals_ms: list[float] = []

    def start(self) -> None:
        """Begin an interval.

        Raises:
            ConfigError: one has begun already.
        """
        if self.started_:
            raise ConfigError(f"timer {self.name_!r}: it is running already; stop it first")
        self._start_s, self.started_ = _now(), True

    def stop(self, reset: bool = False, record: bool = False) -> None:  # noqa: ARG002 - DeepSpeed's
        """End the interval.

        Raises:
            ConfigError: none has begun.
        """
        if not self.started_:
            raise ConfigError(f"timer {self.name_!r}: it is not running; start it first")
        self._intervals_ms.append((_now() - self._start_s) * 1000)
        self.started_ = False

    def reset(self) -> None:
        """Forget all intervals."""
        self.started_ = False
        self._intervals_ms.clear()

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds of all intervals together, that which is running included."""
        running = self.started_
        if running:
            self.stop()
        total = sum(self._intervals_ms)
        if reset:
            self.reset()
        if running:
            self.start()
        return total

    def mean(self) -> float:
        """Mean milliseconds of an interval, without the outliers."""
        return trim_mean(self._intervals_ms, _TRIM)


class SynchronizedWallClockTimer:
    """Timers by name."""

    Timer = _Timer

    def __init__(self) -> None:
        self.timers: dict[str, _Timer] = {}

    def __call__(self, name: str) -> _Timer:
        """The timer of a name, made when it is first asked for."""
        return self.timers.setdefault(name, _Timer(name))

    def get_timers(self) -> dict[str, _Timer]:
        """All of them."""
        return self.timers

    @staticmethod
    def memory_usage() -> str:
        """A line on the device's memory."""
        device: Any = get_accelerator()
        gb = {
            "mem_allocated": device.memory_allocated(),
            "max_mem_allocated": device.max_memory_allocated(),
            "cache_allocated": device.memory_reserved(),
            "max_cache_allocated": device.max_memory_reserved(),
        }
        return "".join(f" | {name}: {size_bytes / 2**30:.4f} GB" for name, size_bytes in gb.items())

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,  # noqa: ARG002 - DeepSpeed's signature
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Print the timers of these names, on rank 0 or on ``ranks``."""
        told = [
            f" | {name}: {self.timers[name].elapsed(reset) / normalizer:.2f}" for name in names if name in self.timers
        ]
        print_dist("time (ms)" + "".join(told), ranks or [0])

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:  # noqa: ARG002
        """Mean microseconds of an interval, by name, as DeepSpeed scales them."""
        return {name: self.timers[name].mean() * 1000 / normalizer for name in names if name in self.timers}


class NoopTimer:
    """A timer of any name that does nothing."""

    class Timer:
        """Does nothing."""

        def start(self) -> None:
            """Nothing."""

        def reset(self) -> None:
            """Nothing."""

        def stop(self, **_kwargs: Any) -> None:
            """Nothing."""

        def elapsed(self, **_kwargs: Any) -> float:
            """0."""
            return 0

        def mean(self) -> float:
            """0."""
            return 0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> NoopTimer.Timer:  # noqa: ARG002 - DeepSpeed's
        """The one timer."""
        return self.timer

    def get_timers(self) -> dict[str, Any]:
        """None of them."""
        return {}

    def log(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing."""

    def get_mean(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing."""


def _now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
