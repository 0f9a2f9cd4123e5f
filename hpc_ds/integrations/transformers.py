"""Hugging Face's Trainer in a run of hpcds: it stops at a boundary when told to, and goes on by itself in the next attempt.

In a run this happens by itself (docs/huggingface.md). Elsewhere, give the Trainer the callback::

    from hpc_ds.integrations.transformers import PreemptionCallback

    Trainer(..., callbacks=[PreemptionCallback()])

Four things of transformers are changed, when its modules are loaded:

- ``Trainer.train`` brings the callback, and goes on from the newest whole checkpoint that this run has made
- ``Trainer._save_checkpoint`` marks a checkpoint as unfinished until every rank has written its part and it is durable;
  only then ``rotate_checkpoints`` removes old ones
- ``get_last_checkpoint`` passes over the unfinished ones
- ``Trainer.get_batch_samples`` gives none once training is to stop: a run that was stopped after its last step would take one more
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from hpc_ds.integrations import trainer_folders as folders

if TYPE_CHECKING:
    from types import ModuleType

    from hpc_ds.integrations.trainer_callback import PreemptionCallback as PreemptionCallback  # noqa: PLC0414 - public here

_MARK = "_hpc_ds_attached"


def attach(module: ModuleType) -> None:
    """Change ``transformers.trainer_utils`` or ``transformers.trainer``, once, as it is loaded."""
    if hasattr(module, _MARK):
        return
    setattr(module, _MARK, True)
    if hasattr(module, "get_last_checkpoint"):
        module.get_last_checkpoint = folders.last_whole  # type: ignore[attr-defined]
    if hasattr(module, "Trainer"):
        _change(module)


def __getattr__(name: str) -> Any:
    """The callback; transformers is loaded with it, and changed."""
    if name != "PreemptionCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for wanted in ("transformers.trainer_utils", "transformers.trainer"):
        attach(importlib.import_module(wanted))
    return importlib.import_module("hpc_ds.integrations.trainer_callback").PreemptionCallback


def _change(module: ModuleType) -> None:
    trainer: Any = module.Trainer
    own_train, own_save = trainer.train, trainer._save_checkpoint  # noqa: SLF001 - transformers has no other door
    own_batches = trainer.get_batch_samples
    # A function since 5, a method before.
    place: Any = module if hasattr(module, "rotate_checkpoints") else trainer
    rotating = "rotate_checkpoints" if place is module else "_rotate_checkpoints"
    own_rotate = getattr(place, rotating)

    @functools.wraps(own_train)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        from hpc_ds.integrations.trainer_callback import join

        own = join(self)
        return own_train(self, str(own) if own is not None else resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(own_save)
    def save(self: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        from hpc_ds.integrations.trainer_saving import save_whole

        save_whole(self, functools.partial(own_save, self, model, trial, *args, **kwargs), trial)

    @functools.wraps(own_batches)
    def batches(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ([], None) if self.control.should_training_stop else own_batches(self, *args, **kwargs)

    @functools.wraps(own_rotate)
    def rotate(*args: Any, **kwargs: Any) -> None:
        from hpc_ds.integrations import trainer_saving

        trainer_saving.rotate(functools.partial(own_rotate, *args, **kwargs))

    trainer.train, trainer._save_checkpoint, trainer.get_batch_samples = train, save, batches  # noqa: SLF001 - as above
    setattr(place, rotating, rotate)
