"""When an engine saves by itself: periodically, and once more when it is told to stop."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hpc_ds.checkpoint.layout import LATEST
from hpc_ds.engine.save_cost import FINISH, SAVE, best_interval_s, choice
from hpc_ds.errors import CheckpointError
from hpc_ds.runtime import preemption
from hpc_ds.runtime.progress import progress

if TYPE_CHECKING:
    from hpc_ds.engine.agreement import Agreed
    from hpc_ds.engine.checkpoints import Checkpoints
    from hpc_ds.engine.engine import Engine
    from hpc_ds.runtime.run import CurrentRun

log = logging.getLogger("hpc_ds")

_ASSUMED_FAILURES_EVERY_S = 24 * 3600.0  # of a run that has not failed yet
_MINUTE_S = 60.0


class Saving:
    """The saves that a run's job asks of one engine. Outside of a run there are none but the one on a stop.

    Attributes:
        left_to_the_caller: whether somebody else saves and stops, by the two that follow.
        stop_agreed: at the last boundary, some rank had been told to stop.
        save_due: at the last boundary, the run asked for a save.
    """

    def __init__(self, engine: Engine, checkpoints: Checkpoints, run: CurrentRun | None) -> None:
        self._engine = engine
        self._checkpoints = checkpoints
        self._run = run
        self._reserved, self._first_step = False, True
        self.left_to_the_caller = self.stop_agreed = self.save_due = False
        self._failures_every_s = (run.failures_every_s() if run is not None else None) or _ASSUMED_FAILURES_EVERY_S

    def due_by_the_clock(self) -> bool:
        """Whether this rank's clock says that a save is due; ranks must agree before they act on it.

        While one is being written none is: training would wait for it.
        """
        interval = self._interval_s()
        if interval is None or time.monotonic() - self._checkpoints.saved_at <= interval:
            return False
        return not self._checkpoints.running()

    def _interval_s(self) -> float | None:
        run = self._run
        if run is None or run.every_minutes is None:
            return None
        if not isinstance(run.every_minutes, str):
            return run.every_minutes * _MINUTE_S
        shortest, longest = run.bounds_minutes
        stall = self._checkpoints.cost.stall_s
        if stall is None:
            return float(shortest * _MINUTE_S)  # the first save tells what one costs
        best = best_interval_s(stall, self._failures_every_s)
        return float(min(max(best, shortest * _MINUTE_S), longest * _MINUTE_S))

    def after_step(self, agreed: Agreed) -> None:
        """Collective. Stop if told to; take note of a save that has ended, and begin one that is due. One that fails is told.

        Raises:
            Preempted: some rank was told to stop, and it is not left to the caller.
        """
        run, step = self._run, self._engine.global_steps
        if run is not None and self._first_step:
            self._warn_of_a_fresh_start(run)
        by_steps = run is not None and run.every_steps is not None and step % run.every_steps == 0
        self.stop_agreed, self.save_due = agreed.stop, run is not None and (agreed.save or by_steps)
        if agreed.stop and not self.left_to_the_caller:
            self._save_and_stop()
        if agreed.settled:
            self._checkpoints.settle()
        if run is not None and not self.left_to_the_caller:
            self._save_for(run)

    def _warn_of_a_fresh_start(self, run: CurrentRun) -> None:
        """Say so if a run that was started again trains from the beginning, for want of one call in the script."""
        self._first_step = False
        latest = run.checkpoints / LATEST
        if run.attempt < 2 or self._checkpoints.asked_to_load or self._engine.global_rank != 0 or not latest.exists():
            return
        log.warning(
            "attempt %d of this run trains from the beginning, and the checkpoints of %s are not used; call "
            "engine.load_checkpoint() before the first step",
            run.attempt, run.checkpoints,
        )  # fmt: skip

    def _save_for(self, run: CurrentRun) -> None:
        if run.saves_behind and (run.every_steps or run.every_minutes) and not self._reserved:
            self._reserved = True  # now that the optimizer has its state
            self._checkpoints.reserve()
        if not self.save_due:
            return
        self._checkpoints.settle()
        try:
            self._checkpoints.save_by_itself(behind=run.saves_behind)
        except CheckpointError as error:
            self._checkpoints.failed(error)

    def _save_and_stop(self) -> None:
        """Collective. Make the newest step durable that can be before the end, and leave with exit code 75.

        Raises:
            Preempted: always, once everything is durable.
        """
        progress.stop()
        told_by = preemption.told_by()
        what = self._agreed_choice()
        if what == SAVE:
            self._checkpoints.give_up()
        whole = self._checkpoints.settle()
        if what != FINISH or not whole:
            self._checkpoints.save_by_itself(behind=False)
        saved = self._checkpoints.saved_step
        self._engine.record("stopped", step=saved, told_by=told_by)
        raise preemption.Preempted(f"checkpointed step {saved} on {told_by}")

    def _agreed_choice(self) -> str:
        """Collective. What to do about a save that is being written: by the slowest rank, and the first that may be killed."""
        checkpoints = self._checkpoints
        numbers = [checkpoints.running(), checkpoints.remaining_s(), checkpoints.save_s(), -preemption.seconds_left()]
        agreed = torch.tensor(numbers, dtype=torch.float64, device=self._engine.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        running, slowest, save, minus_left = agreed.tolist()
        return choice(slowest if running else None, save, -minus_left)
