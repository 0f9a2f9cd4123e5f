"""A Trainer's save in a run: whole or not at all, and older ones go when it is whole."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.agree import on_rank_0, own_rank, together
from hpc_ds.errors import CheckpointError
from hpc_ds.integrations import trainer_folders as folders
from hpc_ds.integrations.trainer_callback import PreemptionCallback, batch_of, callback_of
from hpc_ds.run_dir import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger("hpc_ds")

_postponed: list[Callable[[], None]] | None = None
"""Removals of older checkpoints that wait for the end of a save; None while none is going on."""


def rotate(remove_old: Callable[[], None]) -> None:
    """Let transformers remove older checkpoints; during a save, after it."""
    if _postponed is None:
        remove_old()
    else:
        _postponed.append(remove_old)


def save_whole(trainer: Any, save: Callable[[], None], trial: Any) -> None:
    """Collective. Let a Trainer save, so that what is killed half-way is never taken for a checkpoint.

    Raises:
        CheckpointError: the same on every rank: it failed. Not for a save that only the run has asked for, while it goes on.
    """
    callback = callback_of(trainer)
    if callback is None:
        save()
        return
    root = Path(trainer._get_output_dir(trial=trial))  # noqa: SLF001 - no other door
    folder = root / f"checkpoint-{trainer.state.global_step}"
    began = time.monotonic()
    try:
        if not on_rank_0("checkpoint", partial(_is_there, folder, callback)):
            _save(trainer, save, folder, callback)
        elif trainer.args.should_save:
            _renew_state(trainer, folder)
    except CheckpointError as error:
        if own_rank() == 0:
            folders.remove(folder)  # room for the next
        if callback.stopping or not callback.by_itself:
            raise
        if own_rank() == 0:
            log.error("%s; training goes on, the next save is tried when it is due", error)  # noqa: TRY400 - one sentence
        callback.record("save_failed", step=trainer.state.global_step, error=str(error))
        return
    seconds = round(time.monotonic() - began, 3)
    callback.record("saved", step=trainer.state.global_step, tag=folder.name, seconds=seconds, stall_s=seconds)


def _save(trainer: Any, save: Callable[[], None], folder: Path, callback: PreemptionCallback) -> None:
    """Collective."""
    global _postponed  # noqa: PLW0603 - one save at a time in a process
    args, what = trainer.args, f"checkpoint {str(folder)!r}: not saved"
    together(what, partial(folders.begin, folder) if args.should_save else _nothing)
    _postponed = []
    try:
        with _with_its_state(args, wanted=callback.for_resume):
            together(what, save)
            complete = not args.save_only_model
        removals = _postponed
    finally:
        _postponed = None
    together(what, partial(folders.flush, folder, everything=bool(args.should_save), rank=args.process_index))
    run = callback.run
    of_run = ("", 0) if run is None else (str(run.files.root), run.attempt)
    made = folders.Made(
        *of_run, callback.call, trainer.state.global_step, batch_of(trainer), bool(complete), callback.by_itself
    )
    together(what, partial(folders.finish, folder, made) if args.should_save else _nothing)
    for remove_old in removals:
        remove_old()
    if args.should_save and run is not None and run.keep is not None:
        folders.prune(folder.parent, str(run.files.root), run.keep, run.keep_every, trainer.state.best_model_checkpoint)


def _is_there(folder: Path, callback: PreemptionCallback) -> bool:
    """Whether this step is saved already: saving it again in the same place would destroy it first."""
    run = callback.run
    made = None if folders.mark_of(folder).exists() else folders.Made.read(folder)
    if run is None or made is None or made.run != str(run.files.root) or made.call != callback.call:
        return False
    return made.complete and (made.attempt == run.attempt or folder == callback.resumed_from)


def _renew_state(trainer: Any, folder: Path) -> None:
    """Write what the Trainer knows now, as the metrics of an evaluation, into the checkpoint of the step. For one process."""
    state = trainer.state
    best = folder.with_name(f"checkpoint-{state.best_global_step}")
    if state.best_global_step and best.exists():
        state.best_model_checkpoint = str(best)
    new = folder / f".{folders.STATE}.part"
    state.save_to_json(str(new))
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(folder / folders.STATE)
    fsync_folder(folder)


@contextmanager
def _with_its_state(args: Any, *, wanted: bool) -> Iterator[None]:
    """What the run asks for must be good for a resume, though the script saves its weights alone."""
    before = args.save_only_model
    args.save_only_model = before and not wanted
    try:
        yield
    finally:
        args.save_only_model = before


def _nothing() -> None:
    pass
