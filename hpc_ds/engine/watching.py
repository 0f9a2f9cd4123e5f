"""What is shown of a training run while it runs: lines in the log, timers, a flops profile, monitors."""

from __future__ import annotations

import logging
import math
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hpc_ds.engine.autocast import autocast_context
from hpc_ds.engine.flops import FlopsProfiler
from hpc_ds.engine.monitors import monitor_for
from hpc_ds.engine.timers import StepTimers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    import torch
    from torch import nn

    from hpc_ds.config.training import TrainingConfig
    from hpc_ds.engine.agreement import Agreed
    from hpc_ds.engine.engine import Engine
    from hpc_ds.engine.monitors import Monitor

log = logging.getLogger("hpc_ds")


class ScriptMonitor:
    """The engine's monitors, for a script that has values of its own: ``engine.monitor`` of DeepSpeed.

    Attributes:
        enabled: whether the config enables any.
    """

    def __init__(self, monitor: Monitor | None, *, enabled: bool) -> None:
        self._monitor = monitor
        self.enabled = enabled

    def write_events(self, event_list: Iterable[tuple[str, float, int]]) -> None:
        """Write values, from rank 0; other ranks may call it too.

        Args:
            event_list: of (name, value, samples so far).
        """
        if self._monitor is not None:
            self._monitor.write_events(event_list)


class Watch:
    """Everything that looks on, of one engine; all of it on rank 0, but autocast.

    Attributes:
        for_the_script: what it may write to.
    """

    def __init__(self, config: TrainingConfig, module: nn.Module, device: torch.device, rank: int, train: int) -> None:
        self._config = config
        self._device = device
        self._rank = rank
        timed = config.wall_clock_breakdown and rank == 0
        self._timers = StepTimers(timed, device, train, config.steps_per_print)
        self._profiler = FlopsProfiler(config.flops_profiler, module, rank)
        self._monitor = monitor_for(config, rank)
        sections = (config.tensorboard, config.csv_monitor, config.wandb)
        self.for_the_script = ScriptMonitor(self._monitor, enabled=any(section.enabled for section in sections))
        # A script need not destroy its engine: then the monitors end with it, or with the process.
        self._end = weakref.finalize(self, self._monitor.close) if self._monitor is not None else None

    def forward(self, steps: int) -> AbstractContextManager[object]:
        """What a forward runs in.

        Args:
            steps: taken so far.
        """
        # At stage 3 parameters are dropped after use; a cached copy of one would stay.
        cache = self._config.zero_optimization.stage < 3
        with ExitStack() as stack:  # what was entered is left again if the next cannot be
            stack.enter_context(autocast_context(self._config.torch_autocast, self._device.type, cache))
            stack.enter_context(self._profiler.around_forward(steps))
            stack.enter_context(self.measure("fwd"))
            return stack.pop_all()

    def measure(self, part: str) -> AbstractContextManager[None]:
        """Add the time inside to a part of the step."""
        return self._timers.measure(part)

    def step_done(self, engine: Engine, agreed: Agreed) -> None:
        """Tell about one step."""
        self._timers.step_done(engine.global_steps)
        lr = engine.get_lr()[0]
        # A loss that the script kept to itself is no number; one that is none overflows the gradients too.
        known = agreed.overflowed or not math.isnan(agreed.loss)
        if self._monitor is not None:
            norm = None if agreed.overflowed else agreed.grad_norm
            scale = engine.cur_scale if self._config.fp16.enabled else None
            self._monitor.write_step(engine.global_samples, agreed.loss if known else None, lr, norm, scale)
        every = self._config.steps_per_print
        if every is not None and engine.global_steps % every == 0 and self._rank == 0:
            loss = f"loss {agreed.loss:.4f}, " if known else ""
            log.info("step %d: %slr %.3g, %d skipped so far", engine.global_steps, loss, lr, engine.skipped_steps)

    def resumed(self, samples: int) -> None:
        """Training goes on from a checkpoint, or begins: monitors take back what is beyond it."""
        if self._monitor is not None:
            self._monitor.resumed(samples)

    def flush(self) -> None:
        """Write what monitors keep in memory."""
        if self._monitor is not None:
            self._monitor.flush()

    def close(self) -> None:
        """Write what monitors keep in memory, and end them."""
        if self._end is not None:
            self._end()
