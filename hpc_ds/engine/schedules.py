"""DeepSpeed's learning-rate schedules as laws: from the step index to a learning rate.

``i`` is the 0-based index that ``step()`` sets: 0 after the first step that was applied. The rate before it is that of
``i = 0``, so it is valid from construction.

| type           | law                                                                                        |
|----------------|--------------------------------------------------------------------------------------------|
| WarmupLR       | min + g (max - min); g = ln(i + 1) / ln N or i / N for i < N, then 1; N = max(2, warmup)    |
| WarmupDecayLR  | the same until N, then g = max(0, (T - i) / max(1, T - N))                                 |
| WarmupCosineLR | the group's own rate times a ratio: from warmup_min_ratio to 1, then half a cosine         |

Source: https://deepspeed.readthedocs.io/en/latest/schedulers.html
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.config.model import nearest
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from hpc_ds.config.training import SchedulerConfig


class Schedule:
    """A learning rate for every parameter group as a function of the steps taken."""

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._own_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._apply()

    def rate(self, i: int, own_rate: float) -> float:
        """The learning rate at index ``i`` of a group whose optimizer asked for ``own_rate``."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        """The rate of every group at the present index."""
        return [self.rate(max(self.last_batch_iteration, 0), own_rate) for own_rate in self._own_rates]

    def get_last_lr(self) -> list[float]:
        """The rates that the optimizer has now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next index, or to a given one."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The index: all else comes from the config, so a changed config takes effect on resume."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


class WarmupLR(Schedule):
    """From one rate to another, each group's own unless given, then constant."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: float = 0.0,
        warmup_max_lr: float | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        _check_warmup(warmup_num_steps, warmup_type)
        self._min, self._max = warmup_min_lr, warmup_max_lr
        self._steps = max(2, warmup_num_steps)
        self._log = warmup_type == "log"
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, i: int, own_rate: float) -> float:
        """See the table."""
        largest = own_rate if self._max is None else self._max
        return self._min + self.share(i) * (largest - self._min)

    def share(self, i: int) -> float:
        """How far from the smallest rate (0) to the largest (1)."""
        if i >= self._steps:
            return self.share_after_warmup(i)
        return math.log(i + 1) / math.log(self._steps) if self._log else i / self._steps

    def share_after_warmup(self, i: int) -> float:  # noqa: ARG002 - constant here, not in WarmupDecayLR
        """The same, after the warmup."""
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Warm up, then down to nothing at ``total_num_steps``; the largest rate is 0.001 unless given."""

    def __init__(self, optimizer: torch.optim.Optimizer, total_num_steps: int, **params: Any) -> None:
        self._total = total_num_steps
        super().__init__(optimizer, **{"warmup_max_lr": 0.001, **params})

    def share_after_warmup(self, i: int) -> float:
        """See the table."""
        return max(0.0, (self._total - i) / max(1.0, self._total - self._steps))


class WarmupCosineLR(Schedule):
    """Warm up, then half a cosine down to ``cos_min_ratio`` of each group's own rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        _check_warmup(warmup_num_steps, warmup_type)
        self._total, self._smallest, self._cos_min = total_num_steps, warmup_min_ratio, cos_min_ratio
        self._steps = max(2, warmup_num_steps)
        self._log = warmup_type == "log"
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, i: int, own_rate: float) -> float:
        """See the table."""
        if i < self._steps:
            share = math.log(i + 1) / math.log(self._steps) if self._log else i / self._steps
            return own_rate * (self._smallest + share * (1 - self._smallest))
        progress = min(1.0, (i - self._steps + 1) / max(1, self._total - self._steps))
        return own_rate * (self._cos_min + (1 - self._cos_min) * (1 + math.cos(math.pi * progress)) / 2)


def _check_warmup(steps: object, kind: str) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"warmup_num_steps {steps!r} is not a whole number above 0")
    if kind not in {"log", "linear"}:
        raise ValueError(f"warmup_type {kind!r} is neither 'log' nor 'linear'")


_OURS: dict[str, type[Schedule]] = {
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}


def make_schedule(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that the config names: one of ours, else one of ``torch.optim.lr_scheduler``.

    Raises:
        ConfigError: there is no such schedule, or it does not take these parameters.
    """
    kind: Any = _OURS.get(config.type) or getattr(torch.optim.lr_scheduler, config.type, None)
    if not isinstance(kind, type):
        raise ConfigError(
            f"scheduler.type {config.type!r}: unknown; {nearest(config.type, list(_OURS))}",
            key="scheduler.type",
            value=config.type,
        )
    try:
        return kind(optimizer, **config.params)
    except (TypeError, ValueError) as error:
        known = [name for name in inspect.signature(kind).parameters if name != "optimizer"]
        raise ConfigError(
            f"scheduler.params: refused by {config.type}: {error}; it takes {', '.join(known)}", key="scheduler.params"
        ) from None
