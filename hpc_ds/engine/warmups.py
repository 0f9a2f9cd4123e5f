"""DeepSpeed's schedules that begin with a warmup; i is the index, as in schedule.py.

| type           | law                                                                                        |
|----------------|--------------------------------------------------------------------------------------------|
| WarmupLR       | min + g (max - min); g = ln(i + 1) / ln N or i / N for i < N, then 1; N = max(2, warmup)    |
| WarmupDecayLR  | the same until N, then g = max(0, (T - i) / max(1, T - N))                                 |
| WarmupCosineLR | the group's own rate times a ratio: from warmup_min_ratio to 1, then half a cosine         |

Before the first step the rate is that of i = 0, but 0 with WarmupCosineLR, whatever warmup_min_ratio is.

Source: https://deepspeed.readthedocs.io/en/latest/schedulers.html, and release 0.19.8.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from hpc_ds.engine.schedule import PerGroup, Schedule, check_steps, of_group, per_group

if TYPE_CHECKING:
    import torch

log = logging.getLogger("hpc_ds")


class Warmup:
    """How far a warmup has come: from 0 to 1, along a logarithm or a line."""

    def __init__(self, steps: int, kind: str) -> None:
        check_steps("warmup_num_steps", steps)
        if kind not in {"log", "linear"}:
            log.warning("scheduler.params.warmup_type %r: unknown, read as 'log'; use 'log' or 'linear'", kind)
        self.steps = max(2, steps)
        self._linear = kind == "linear"

    def share(self, i: int) -> float:
        """At an index below ``steps``."""
        return i / self.steps if self._linear else math.log(i + 1) / math.log(self.steps)


class WarmupLR(Schedule):
    """From one rate to another, each group's own unless given, then constant."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._min = per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self._max = None if warmup_max_lr is None else per_group(optimizer, "warmup_max_lr", warmup_max_lr)
        self._warmup = Warmup(warmup_num_steps, warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, i: int, group: int) -> float:
        """See the table."""
        smallest = of_group(self._min, group)
        largest = self.own_rate(group) if self._max is None else of_group(self._max, group)
        i = max(i, 0)
        share = self._warmup.share(i) if i < self._warmup.steps else self.share_after_warmup(i)
        return smallest + share * (largest - smallest)

    def share_after_warmup(self, i: int) -> float:  # noqa: ARG002 - constant here, not in WarmupDecayLR
        """How far from the smallest rate (0) to the largest (1), after the warmup."""
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Warm up, then down to the smallest rate at ``total_num_steps``; the largest rate is 0.001 unless given."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: float,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._total = _total(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def share_after_warmup(self, i: int) -> float:
        """See the table."""
        return max(0.0, (self._total - i) / max(1.0, self._total - self._warmup.steps))


class WarmupCosineLR(Schedule):
    """Warm up, then half a cosine down to ``cos_min_ratio`` of each group's own rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: float,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._warmup = Warmup(warmup_num_steps, warmup_type)
        self._total = _total(total_num_steps, warmup_num_steps)
        self._smallest, self._cos_min = warmup_min_ratio, cos_min_ratio
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, i: int, group: int) -> float:
        """See the table."""
        return self.own_rate(group) * self._ratio(i)

    def _ratio(self, i: int) -> float:
        steps = self._warmup.steps
        if i < 0:
            return 0.0
        if i < steps:
            return self._smallest + self._warmup.share(i) * (1 - self._smallest)
        progress = min(1.0, (i - steps + 1) / max(1, self._total - steps))
        return self._cos_min + (1 - self._cos_min) * (1 + math.cos(math.pi * progress)) / 2


def _total(total: Any, warmup: int) -> float:
    if isinstance(total, bool) or not isinstance(total, int | float) or total <= 0:
        raise ValueError(f"total_num_steps {total!r} is not a number above 0")
    if isinstance(warmup, int) and total < warmup:
        log.warning(
            "scheduler.params.total_num_steps %g: fewer than warmup_num_steps %d; the warmup is all", total, warmup
        )
    return float(total)
