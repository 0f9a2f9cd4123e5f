"""DeepSpeed's schedules for finding a rate and for training in one cycle; i is the index, as in schedule.py.

| type        | law                                                                                                  |
|-------------|------------------------------------------------------------------------------------------------------|
| LRRangeTest | min (1 + rate n), n = (i + 1) / step_size, rounded down if staircase                                 |
| OneCycle    | up from min to max in the first half, down in the second, with h as the height from 0 to 1:          |
|             | rate = min + h (max - min), momentum = max_mom - h (max_mom - min_mom). From i = first + second on:   |
|             | rate = min / (1 + decay_lr_rate d), momentum = max_mom (1 + decay_mom_rate d), d = (i + 1 - first -  |
|             | second) / decay_step_size; constant where decay_step_size or the decay's own rate is 0               |

h rises by (i + 1) / first and falls by 1 / second; a number of stairs rounds it down to as many steps. ``momentum`` is the first
of an Adam's betas, the second is then 0.99; before the first step the first is min_mom, as in DeepSpeed. An optimizer without
betas keeps its momentum.

Source: Smith, A disciplined approach to neural network hyper-parameters: part 1, 2018;
https://deepspeed.readthedocs.io/en/latest/schedulers.html, and release 0.19.8.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.engine.schedule import PerGroup, Schedule, check_steps, of_group, per_group

if TYPE_CHECKING:
    import torch

log = logging.getLogger("hpc_ds")

_SECOND_BETA = 0.99


class LRRangeTest(Schedule):
    """From a small rate up in a line, to see where training diverges."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        check_steps("lr_range_test_step_size", lr_range_test_step_size)
        self._min = per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self._size, self._staircase = lr_range_test_step_size, lr_range_test_staircase
        self._growth = lr_range_test_step_rate
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, i: int, group: int) -> float:
        """See the table."""
        interval = (i + 1) / self._size
        return of_group(self._min, group) * (1 + self._growth * (math.floor(interval) if self._staircase else interval))


@dataclass(frozen=True, slots=True)
class _Cycle:
    """The two halves of a cycle, in steps, and the stairs of each; no stairs is a line."""

    first: float
    second: float
    first_stairs: int
    second_stairs: int

    @property
    def length(self) -> float:
        return self.first + self.second

    def height(self, i: int) -> float:
        """0 at the lower bound, 1 at the upper one."""
        at = (i + 1) % self.length
        if at <= self.first:
            share, stairs = at / self.first, self.first_stairs
            on_stairs = at * stairs / self.first
        else:
            share, stairs = (self.length - at) / self.second, self.second_stairs
            on_stairs = (self.length - at) * stairs / self.second
        return math.floor(on_stairs) / stairs if stairs > 0 else share


class OneCycle(Schedule):
    """Up and down once, momentum the other way, then decay."""

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        first = cycle_first_step_size
        second = first if cycle_second_step_size is None else cycle_second_step_size
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        if first <= 0 or second < 0:
            raise ValueError(f"cycle_first_step_size {first!r} and cycle_second_step_size {second!r} are no cycle")
        self._cycle = _Cycle(float(first), float(second), cycle_first_stair_count, second_stairs)
        self._min = per_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self._max = per_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self._min_momentum = per_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self._max_momentum = per_group(optimizer, "cycle_max_mom", cycle_max_mom)
        self._decay_size = decay_step_size
        self._decay_rate, self._decay_momentum_rate = decay_lr_rate, decay_mom_rate
        self._moves_momentum = cycle_momentum and "betas" in optimizer.defaults
        if cycle_momentum and not self._moves_momentum:
            log.warning("scheduler.params.cycle_momentum: has no effect, %s has no betas", type(optimizer).__name__)
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, i: int, group: int) -> float:
        """See the table."""
        smallest, largest = of_group(self._min, group), of_group(self._max, group)
        if i < self._cycle.length:
            return smallest + self._cycle.height(i) * (largest - smallest)
        return smallest / (1 + self._decay_rate * self._decays(i))

    def momentum(self, i: int, group: int) -> float:
        """See the table."""
        smallest, largest = of_group(self._min_momentum, group), of_group(self._max_momentum, group)
        if i < 0:
            return smallest
        if i < self._cycle.length:
            return largest - self._cycle.height(i) * (largest - smallest)
        return largest * (1 + self._decay_momentum_rate * self._decays(i))

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of every group at the present index; None where they are left alone."""
        if not self._moves_momentum:
            return None
        groups = range(len(self.optimizer.param_groups))
        return [(self.momentum(self.last_batch_iteration, number), _SECOND_BETA) for number in groups]

    def _decays(self, i: int) -> float:
        return (i + 1 - self._cycle.length) / self._decay_size if self._decay_size else 0.0

    def _apply(self) -> None:
        super()._apply()
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or [], strict=False):
            group["betas"] = betas
