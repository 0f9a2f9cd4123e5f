"""What an engine saves, where, and how it comes back; at once, or behind the training."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint import reader, retention, writer
from hpc_ds.checkpoint.agree import together
from hpc_ds.checkpoint.background import Background
from hpc_ds.checkpoint.commit import Run
from hpc_ds.engine import state as train_state
from hpc_ds.engine.client_state import ClientState, counts
from hpc_ds.engine.recovery_script import leave_recovery_script
from hpc_ds.engine.save_cost import SaveCost
from hpc_ds.errors import CheckpointError
from hpc_ds.runtime.by_name import goes_by_deepspeed
from hpc_ds.runtime.progress import during, progress
from hpc_ds.runtime.roll_call import roll_call
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from hpc_ds.checkpoint.layout import Saved
    from hpc_ds.checkpoint.shards import Shard
    from hpc_ds.checkpoint.stored import Stored
    from hpc_ds.engine.engine import Engine
    from hpc_ds.engine.loss_scale import LossScale
    from hpc_ds.engine.sharding import Sharding
    from hpc_ds.engine.watching import Watch
    from hpc_ds.runtime.run import CurrentRun

log = logging.getLogger("hpc_ds")


class Checkpoints:
    """The checkpoints of one engine. Its methods are collective, but for ``settled``.

    Attributes:
        registered: what rides along, by name.
        cost: what saves cost so far.
        saved_at: when the last save began, by the monotonic clock.
        saved_step: of the last save that has ended well; None before the first.
        tells: whether the run is told of each save; not where it is only a part of what the caller saves.
        asked_to_load: whether the script has called ``load_checkpoint``, whatever came of it.
    """

    def __init__(
        self, engine: Engine, sharding: Sharding, loss_scale: LossScale, run: CurrentRun | None, watch: Watch
    ) -> None:
        self._engine = engine
        self._sharding = sharding
        self._loss_scale = loss_scale
        self._run = run
        self._watch = watch
        self._folder: Path | None = None  # of the last save or load
        self._loads_from: Path | None = None  # and so will the next start of the run
        self._client_state = ClientState(engine)
        self._background = Background()
        self._behind: int | None = None  # step of the save behind the training
        self.registered: dict[str, Any] = {}
        self.cost = SaveCost()
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.tells = True
        self.asked_to_load = False

    @during("saving")
    def save(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        *,
        save_latest: bool = True,
        frozen: bool = True,
    ) -> None:
        """Save everything that a resume needs, durable on return; see ``Engine.save_checkpoint``."""
        roll_call("save_checkpoint")
        self.settle()
        began = self.saved_at = time.monotonic()
        client = self._client_state.now() if client_state is None else client_state
        tag = self._agreed_tag(str(tag) if tag is not None else f"global_step{self._engine.global_steps}")
        content = self._agreed_content(client, frozen=frozen, by_itself=False)
        self._save_now(self._folder_for(save_dir), tag, content, began, save_latest=save_latest)
        if client_state is not None:
            self._client_state.saved(client_state)

    def _agreed_tag(self, tag: str) -> str:
        """Rank 0's, where ranks name different ones and the config does not make an error of it."""
        tags = together(f"checkpoint {tag!r}: not saved", lambda: tag)
        other = next((rank for rank, given in enumerate(tags) if given != tags[0]), None)
        validates = self._engine.config_value("checkpoint.tag_validation").lower()
        if other is not None and validates != "ignore":
            differ = f"checkpoint {tags[0]!r}: rank {other} gives it the tag {tags[other]!r}"
            if validates == "fail":
                raise CheckpointError(f"{differ}; give the same on every rank")
            if self._engine.global_rank == 0:
                log.warning("%s; that of rank 0 is used", differ)
        return tags[0]

    @during("saving")
    def save_by_itself(self, *, behind: bool) -> None:
        """Save for the run, where it saves; behind the training, it is under way on return.

        Raises:
            CheckpointError: the same on every rank: it failed, or the one before did.
        """
        began = self.saved_at = time.monotonic()
        folder, tag = self._own_folder(), f"global_step{self._engine.global_steps}"
        content = self._agreed_content(self._client_state.now(), frozen=True, by_itself=True)
        if not behind:
            self._save_now(folder, tag, content, began, save_latest=True)
            self.prune()
            return
        started = threading.Event()

        def committed() -> None:
            started.wait()
            self._saved(folder, content.step, tag, time.monotonic() - began)
            self.prune()

        try:
            self._background.start(folder, tag, content, committed=committed)
            self._behind = content.step
            self.cost.stall_s = time.monotonic() - began
        finally:
            started.set()

    def _save_now(self, folder: Path, tag: str, content: writer.Content, began: float, *, save_latest: bool) -> None:
        writer.save(folder, tag, content, save_latest=save_latest)
        self.cost.stall_s = time.monotonic() - began
        self.saved_step = content.step
        self._saved(folder, content.step, tag, self.cost.stall_s)

    def _saved(self, folder: Path, step: int, tag: str, seconds: float) -> None:
        if self._engine.global_rank == 0 and self._engine.zero_optimization():
            leave_recovery_script(folder)
        self.cost.durable_s = seconds
        stall_s = seconds if self.cost.stall_s is None else self.cost.stall_s
        if self.tells:
            self._engine.record("saved", step=step, tag=tag, seconds=round(seconds, 3), stall_s=round(stall_s, 3))

    def running(self) -> bool:
        """Whether a save is being written behind the training, as far as this rank knows."""
        return self._background.poll() == "running"

    def reserve(self) -> None:
        """Get memory for the copy that a save behind the training makes, so that the first is as short as the later ones."""
        self._background.reserve(train_state.shards_to_save(self._sharding, self._engine.optimizer))

    def settled(self) -> bool:
        """Whether the save behind the training has ended, well or not, as far as this rank knows."""
        return self._background.poll() in {"done", "failed"}

    def remaining_s(self) -> float:
        """Seconds until this rank's part of the save behind the training is written; 0 where there is none."""
        progress = self._background.progress()
        if progress is None:
            return 0.0
        rest = progress.remaining_s
        return rest if rest is not None else self.cost.durable_s or 0.0

    def save_s(self) -> float:
        """Seconds that a save takes: as many as the last one, else as the one that is being written; 0 while nobody knows."""
        if self.cost.durable_s is not None:
            return self.cost.durable_s
        progress = self._background.progress()
        return 0.0 if progress is None else progress.seconds + self.remaining_s()

    @during("saving")
    def wait(self) -> None:
        """Wait until the save behind the training is durable.

        Raises:
            CheckpointError: the same on every rank: it failed.
        """
        step, self._behind = self._behind, None
        if step is not None:
            self._background.wait()
            self.saved_step = step

    def settle(self) -> bool:
        """The same, but a failure is told, not raised: it must not keep the next save from being made.

        Returns:
            Whether it is durable, where there was one.
        """
        try:
            self.wait()
        except CheckpointError as error:
            self.failed(error)
            return False
        return True

    def failed(self, error: CheckpointError) -> None:
        """Tell of a save of the run's that failed: the checkpoints before are whole, and nothing is gained by ending here."""
        self.saved_at = time.monotonic()
        if self._engine.global_rank == 0:
            log.error("%s; training goes on, the next save is tried when it is due", error)
        self._engine.record("save_failed", step=self._engine.global_steps, error=str(error))

    def give_up(self) -> None:
        """Forget the save behind the training, because a newer one is more urgent."""
        self._behind = None
        self._background.give_up()

    def prune(self) -> None:
        """Remove what the run does not keep of the saves that it made by itself; nobody else's, and none with a name."""
        run = self._run
        if run is not None and run.keep is not None and self._engine.global_rank == 0:
            retention.prune(self._own_folder(), retention.Keep(run.keep, run.keep_every), made_by=str(run.files.root))

    def _agreed_content(self, client: dict[str, Any], *, frozen: bool, by_itself: bool) -> writer.Content:
        """What is saved; where a ``state_dict`` of the script's fails on one rank, no other waits for it."""
        made: list[writer.Content] = []
        together(
            "checkpoint: not saved", lambda: made.append(self._content(client, frozen=frozen, by_itself=by_itself))
        )
        return made[0]

    def _content(self, client: dict[str, Any], *, frozen: bool, by_itself: bool) -> writer.Content:
        engine, sharding, run = self._engine, self._sharding, self._run
        self._watch.flush()  # before: what stands beyond a checkpoint is taken back, what is missing before it is not
        sharding.adopt()
        sharding.reshard()
        return writer.Content(
            shards=train_state.shards_to_save(sharding, engine.optimizer, frozen=frozen),
            rank_state=train_state.random_states(),
            client_state={
                "client": client,
                "registered": {name: thing.state_dict() for name, thing in self.registered.items()},
                "optimizer": train_state.plain_optimizer_state(sharding, engine.optimizer),
                "lr_scheduler": train_state.schedule_state(engine.lr_scheduler, engine.optimizer),
            },
            state=self._plain_state(by_itself=by_itself),
            step=engine.global_steps,
            stage=engine.zero_optimization_stage(),
            config_hash=hashlib.sha256(json.dumps(engine.config, sort_keys=True).encode()).hexdigest()[:16],
            run=Run() if run is None else Run(str(run.files.root), run.attempt),
        )

    @during("loading")
    def load(
        self,
        load_dir: str | Path | None,
        tag: str | None,
        *,
        strict: bool,
        optimizer_states: bool,
        lr_scheduler_states: bool,
        module_only: bool,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load the newest whole checkpoint, or the one named; see ``Engine.load_checkpoint``."""
        roll_call("load_checkpoint")
        self.asked_to_load = True
        began = time.monotonic()
        self.settle()
        engine = self._engine
        folder = self._folder_to_load(load_dir, module_only=module_only)
        optimizer = engine.optimizer if optimizer_states and not module_only else None
        engine.zero_grad()
        self._sharding.adopt()  # what a script wrote to parameters that the checkpoint may not have

        def wanted(stored: Stored) -> list[Shard]:
            train_state.refuse_other_optimizer(stored.state.get("optimizer_type"), optimizer)
            shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
            return train_state.shards_to_load(shapes, self._sharding, optimizer, strict=strict)

        loaded = reader.load(folder, None if tag is None else str(tag), wanted)
        if loaded is None:
            if engine.global_rank == 0:
                log.info("checkpoint folder %s: empty; training starts fresh", folder)
            self._watch.resumed(engine.global_samples)
            return None, None if goes_by_deepspeed() else {}
        self._sharding.publish()
        client = loaded.client_state
        if optimizer is not None:
            train_state.load_plain_optimizer_state(self._sharding, optimizer, client["optimizer"])
        if not module_only:
            if lr_scheduler_states and engine.lr_scheduler is not None and client["lr_scheduler"] is not None:
                train_state.load_schedule_state(engine.lr_scheduler, engine.optimizer, client["lr_scheduler"])
            self._take_up(loaded.stored.saved.state, client, optimizer_states=optimizer_states)
            if loaded.rank_state is not None:
                train_state.restore_random_states(loaded.rank_state)
            self._watch.resumed(engine.global_samples)
        seconds = round(time.monotonic() - began, 3)
        engine.record("resumed", step=engine.global_steps, tag=loaded.stored.saved.tag, seconds=seconds)
        kept = client["client"]
        return str(loaded.stored.path), kept if module_only else self._for_the_script(loaded.stored.saved, kept)

    def _for_the_script(self, saved: Saved, client: dict[str, Any]) -> dict[str, Any]:
        """What ``load_checkpoint`` returns as the client state."""
        if client or saved.state.get("made_by") is None or not goes_by_deepspeed():
            return client
        found = counts(self._engine)
        if self._engine.global_rank == 0:
            log.info(
                "checkpoint %r: made by the run before the script's first save; client_state is %s", saved.tag, found
            )
        return found

    def _folder_to_load(self, given: str | Path | None, *, module_only: bool) -> Path:
        if module_only and given is not None:
            return Path(given)  # weights taken from elsewhere do not make that place the run's own
        folder = self._folder_for(given)
        self._loads_from = self._loads_from if module_only else folder
        return folder

    def _folder_for(self, given: str | Path | None) -> Path:
        """The folder given, else that of the last save or load, else the run's."""
        folder = Path(given) if given is not None else self._folder or (self._run.checkpoints if self._run else None)
        if folder is None:
            raise CheckpointError("checkpoint folder: none is known outside of a run; give save_dir or load_dir")
        self._folder = folder
        return folder

    def _own_folder(self) -> Path:
        """Where the run saves by itself: where it loads from, so that its next start finds it; else as ``_folder_for``."""
        return self._loads_from or self._folder_for(None)

    def _plain_state(self, *, by_itself: bool) -> dict[str, Any]:
        engine, loader = self._engine, self._engine.training_dataloader
        return {
            "hpc_ds": __version__,
            "made_by": str(self._run.files.root) if self._run is not None and by_itself else None,
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "micro_steps": engine.micro_steps,
            "zero_stage": engine.zero_optimization_stage(),
            "optimizer_type": None if engine.optimizer is None else type(engine.optimizer).__name__,
            "train_batch_size": engine.train_batch_size(),
            "loss_scale": self._loss_scale.state_dict(),
            "tied": train_state.tied_names(engine.module),
            "frozen": [kept.name for kept in self._sharding.kept() if kept.frozen],
            "data": None
            if loader is None
            else loader.state_dict(engine.micro_steps % engine.gradient_accumulation_steps()),
        }

    def _take_up(self, plain: dict[str, Any], client: dict[str, Any], *, optimizer_states: bool) -> None:
        engine, loader = self._engine, self._engine.training_dataloader
        engine.global_steps = progress.step = plain["global_steps"]
        engine.global_samples = plain["global_samples"]
        engine.skipped_steps = plain["skipped_steps"]
        # The accumulation may be another at this world size; a step is whole whenever one is saved by the engine.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        if optimizer_states:
            self._loss_scale.load_state_dict(plain["loss_scale"])
            engine.tell_optimizer()
        if loader is not None and plain["data"] is not None:
            loader.load_state_dict(plain["data"])
        for name, thing in self.registered.items():
            if name in client["registered"]:
                thing.load_state_dict(client["registered"][name])
        self._client_state.loaded(client["client"])
