"""The callback by which a Trainer stops when its run is told to, and from where its ``train()`` goes on."""

from __future__ import annotations

import logging
import time
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from hpc_ds.checkpoint.agree import on_rank_0, own_rank
from hpc_ds.engine.engine import Engine
from hpc_ds.integrations import trainer_folders as folders
from hpc_ds.runtime import preemption
from hpc_ds.runtime.run import CurrentRun
from hpc_ds.runtime.show_log import show_log

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("hpc_ds")

_calls = 0
"""How often this process has called ``train()``: what one has saved is not what the next goes on from."""


class PreemptionCallback(TrainerCallback):
    """Stop a Trainer at the end of a step when any rank was told to: it saves, and ends with exit code 75.

    In a run of hpcds the Trainer saves besides as often as the job says (``checkpoint.every_minutes``, ``every_steps``), and
    the run hears of its steps. With ``--deepspeed`` the question travels in the collective of the engine's step; without, it
    is one small collective of its own. Outside of a run it listens to SIGTERM and SIGUSR2.

    Attributes:
        run: that of this process; None outside of one.
        trainer: gives the Trainer that it belongs to, or None.
        call: which call of ``train()`` of this process goes on, from 1.
        resumed_from: the checkpoint that this call went on from; None where it began.
        for_resume: the save that comes was asked for by the run, to go on from it.
        by_itself: the script has not asked for it too.
        stopping: that save is the last thing.
    """

    def __init__(self) -> None:
        self.trainer: Callable[[], Any] = _no_trainer
        self.call = 0
        self.resumed_from: Path | None = None
        self.for_resume = self.by_itself = self.stopping = False
        self.run = CurrentRun.from_environment()
        self._engine: Engine | None = None
        self._saved_at = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: Trainers are copied, and sent to others."""
        return {**vars(self), "trainer": _no_trainer, "_engine": None}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - transformers' signature
        """Take stops and saves over from the Trainer's engine, if that is ours; the clock of the saves begins."""
        preemption.listen(anywhere=True)
        self._saved_at = time.monotonic()
        engine = getattr(self.trainer(), "model_wrapped", None)
        self._engine = engine if isinstance(engine, Engine) else None
        if self._engine is not None:
            self._engine.leave_stops_to_the_caller()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Take no step after the last: the Trainer asks only behind a step whether there shall be another."""
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Collective. Ask whether to stop or to save, and let the Trainer do it."""
        told, due = self._agreed(state.global_step)
        self.for_resume = told or due
        self.by_itself = self.for_resume and not control.should_save
        control.should_save = control.should_save or told or due
        if told:
            self.stopping = True
            control.should_evaluate = False  # there may be no time, and nothing of it would be kept
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """What was saved for a stop is whole now: leave.

        Raises:
            Preempted: the Trainer was stopping.
        """
        self._saved_at = time.monotonic()
        self.for_resume = self.by_itself = False
        if self.stopping:
            told_by = preemption.told_by()
            self.record("stopped", step=state.global_step, told_by=told_by)
            raise preemption.Preempted(f"checkpointed step {state.global_step} on {told_by}")

    def _agreed(self, step: int) -> tuple[bool, bool]:
        """Collective. Whether any rank was told to stop, and whether a save is due."""
        if self._engine is not None:
            return self._engine.stop_agreed, self._engine.save_due
        preemption.step(step)
        every = self.run.every_steps if self.run is not None else None
        by_steps = every is not None and step % every == 0
        return preemption.requested(), by_steps or self._due_by_the_clock()

    def _due_by_the_clock(self) -> bool:
        """Collective. Rank 0's clock counts."""
        minutes = self.run.every_minutes if self.run is not None else None
        if self.run is None or minutes is None:
            return False
        if isinstance(minutes, str):
            minutes = self.run.bounds_minutes[1]  # what a Trainer's save costs is not measured
        due = time.monotonic() - self._saved_at > minutes * 60
        return on_rank_0("save", partial(bool, due))

    def record(self, event: str, **fields: Any) -> None:
        """Add one event to the run's, from rank 0; outside of a run, nothing."""
        if self.run is not None and own_rank() == 0:
            self.run.record(event, **fields)


def callback_of(trainer: Any) -> PreemptionCallback | None:
    """The callback of a Trainer; None where it has none."""
    callbacks = trainer.callback_handler.callbacks
    return next((one for one in callbacks if isinstance(one, PreemptionCallback)), None)


def batch_of(trainer: Any) -> int:
    """Samples of a step, of all ranks."""
    args = trainer.args
    return int(args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps)


def join(trainer: Any) -> Path | None:
    """Collective. Bring the callback to a Trainer in a run; the checkpoint that this attempt goes on from, if there is one."""
    global _calls  # noqa: PLW0603 - one count a process
    _calls += 1
    callback = callback_of(trainer)
    if callback is None:
        callback = PreemptionCallback()
        if callback.run is None:
            return None
        trainer.add_callback(callback)
    run = callback.run
    callback.trainer, callback.call, callback.resumed_from = weakref.ref(trainer), _calls, None
    if run is None or trainer.hp_search_backend is not None:
        return None
    preemption.listen()
    preemption.attend(own_rank(), trainer.args.world_size)
    folder, root, call = Path(trainer.args.output_dir), str(run.files.root), _calls
    found = on_rank_0(
        f"checkpoints in {str(folder)!r}: not found", lambda: folders.newest_of_run(folder, root, run.attempt, call)
    )
    if found is None:
        return None
    _tell(found, batch_of(trainer))
    callback.resumed_from = found.path
    return found.path


def _tell(found: folders.Found, batch: int) -> None:
    show_log(own_rank())
    if own_rank() != 0:
        return
    made = found.made
    log.info("Trainer goes on from %s: step %d, of attempt %d", found.path, made.step, made.attempt)
    if made.batch != batch:
        log.warning(
            "samples of a step: %d, where %s had %d; Trainer finds its place in the data by steps, so samples will be skipped or "
            "repeated: choose gradient_accumulation_steps so that a step has as many",
            batch, found.path.name, made.batch,
        )  # fmt: skip


def _no_trainer() -> None:
    return None
