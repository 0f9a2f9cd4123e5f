"""What an engine saves, when, where, and how it comes back."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.checkpoint import reader, retention, writer
from hpc_ds.checkpoint.agree import on_rank_0
from hpc_ds.checkpoint.commit import Run
from hpc_ds.engine import state as train_state
from hpc_ds.errors import CheckpointError
from hpc_ds.runtime import preemption
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from hpc_ds.config.training import BatchSizes
    from hpc_ds.engine.engine import Engine
    from hpc_ds.engine.loss_scale import LossScale
    from hpc_ds.engine.sharding import Sharded
    from hpc_ds.runtime.run import CurrentRun

log = logging.getLogger("hpc_ds")


class Checkpoints:
    """The checkpoints of one engine. Its methods are collective, but for ``minutes_are_over``.

    Attributes:
        registered: what rides along, by name.
    """

    def __init__(
        self, engine: Engine, sharded: Sharded, loss_scale: LossScale, sizes: BatchSizes, run: CurrentRun | None
    ) -> None:
        self._engine = engine
        self._sharded = sharded
        self._loss_scale = loss_scale
        self._sizes = sizes
        self._run = run
        self._folder: Path | None = None
        self._client_state: dict[str, Any] = {}
        self.registered: dict[str, Any] = {}
        self._last_save = time.monotonic()

    def save(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        *,
        save_latest: bool = True,
        frozen: bool = True,
        by_itself: bool = False,
    ) -> None:
        """Save everything that a resume needs; see ``Engine.save_checkpoint``."""
        engine, folder = self._engine, self._folder_for(save_dir)
        client = self._client_state if client_state is None else client_state
        began = time.monotonic()
        self._sharded.reshard()
        tag = str(tag) if tag is not None else f"global_step{engine.global_steps}"
        content = writer.Content(
            shards=train_state.shards_to_save(engine.module, engine.optimizer, frozen=frozen),
            rank_state=train_state.random_states(),
            client_state={
                "client": client,
                "registered": {name: thing.state_dict() for name, thing in self.registered.items()},
                "optimizer": train_state.plain_optimizer_state(engine.module, engine.optimizer),
                "lr_scheduler": train_state.schedule_state(engine.lr_scheduler, engine.optimizer),
            },
            state=self._plain_state(by_itself=by_itself),
            step=engine.global_steps,
            stage=engine.zero_optimization_stage(),
            run=self._this_run(),
        )
        writer.save(folder, tag, content, save_latest=save_latest)
        self._client_state = client
        self._last_save = time.monotonic()
        engine.record("saved", step=engine.global_steps, tag=tag, seconds=round(time.monotonic() - began, 3))

    def load(
        self,
        load_dir: str | Path | None,
        tag: str | None,
        *,
        strict: bool,
        optimizer_states: bool,
        lr_scheduler_states: bool,
        module_only: bool,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load the newest whole checkpoint, or the one named; see ``Engine.load_checkpoint``."""
        engine = self._engine
        # Weights taken from elsewhere do not make that place the run's own.
        folder = Path(load_dir) if module_only and load_dir is not None else self._folder_for(load_dir)
        optimizer = engine.optimizer if optimizer_states and not module_only else None
        self._sharded.reshard()
        loaded = reader.load(
            folder,
            None if tag is None else str(tag),
            lambda stored: train_state.shards_to_load(stored, engine.module, optimizer, strict=strict),
        )
        if loaded is None:
            if engine.global_rank == 0:
                log.info("checkpoint folder %s: empty; training starts fresh", folder)
            return None, {}
        engine.zero_grad()
        saved, client, random_states = loaded.stored, loaded.client_state, loaded.rank_state
        if optimizer is not None:
            train_state.load_plain_optimizer_state(engine.module, optimizer, client["optimizer"])
        if not module_only:
            if lr_scheduler_states and engine.lr_scheduler is not None and client["lr_scheduler"] is not None:
                train_state.load_schedule_state(engine.lr_scheduler, engine.optimizer, client["lr_scheduler"])
            self._take_up(saved.state, client, optimizer_states=optimizer_states)
            if random_states is not None:
                train_state.restore_random_states(random_states)
        engine.record("resumed", step=engine.global_steps, tag=saved.tag)
        return str(saved.path), client["client"]

    def save_weights(self, path: Path, dtype: torch.dtype) -> None:
        """Write the whole weights as one file that the plain module loads."""
        self._sharded.reshard()
        whole = {}
        for name, tensor in self._engine.module.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self._engine.global_rank == 0:
                whole[name] = full.to("cpu", dtype) if full.is_floating_point() else full.cpu()

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.part")
            torch.save(whole, temporary)
            temporary.replace(path)

        on_rank_0(f"weights {str(path)!r}: not saved", write)

    def minutes_are_over(self) -> bool:
        """Whether this rank's clock says that a save is due; ranks must agree before they act on it."""
        minutes = self._run.every_minutes if self._run is not None else None
        return minutes is not None and time.monotonic() - self._last_save > minutes * 60

    def save_if_due(self, *, minutes_are_over: bool) -> None:
        """Save when the run's job says so, and remove what it does not keep. A save that fails is told, not raised."""
        run, step = self._run, self._engine.global_steps
        if run is None or not (minutes_are_over or (run.every_steps is not None and step % run.every_steps == 0)):
            return
        try:
            self.save(by_itself=True)
        except CheckpointError as error:
            # The same on every rank, and the checkpoints before are whole: nothing is gained by ending here.
            self._last_save = time.monotonic()
            log.error("%s; training goes on, the next save is tried when it is due", error)  # noqa: TRY400 - its cause is in the words
            self._engine.record("save_failed", step=step, error=str(error))
            return
        self._prune()

    def save_and_stop(self) -> None:
        """Save, and leave with exit code 75.

        Raises:
            Preempted: always, once everything is durable.
        """
        told_by, step = preemption.told_by(), self._engine.global_steps
        self.save(by_itself=True)
        self._engine.record("stopped", step=step, told_by=told_by)
        self._prune()
        raise preemption.Preempted(f"checkpointed step {step} on {told_by}")

    def _prune(self) -> None:
        """Remove what the run does not keep of the saves that it made by itself; nobody else's, and none with a name."""
        run = self._run
        if run is not None and run.keep is not None and self._engine.global_rank == 0 and self._folder is not None:
            retention.prune(self._folder, retention.Keep(run.keep), made_by=str(run.files.root))

    def _this_run(self) -> Run:
        return Run() if self._run is None else Run(str(self._run.files.root), self._run.attempt)

    def _folder_for(self, given: str | Path | None) -> Path:
        """The folder given, else that of the last save or load, else the run's."""
        folder = Path(given) if given is not None else self._folder or (self._run.checkpoints if self._run else None)
        if folder is None:
            raise CheckpointError("checkpoint folder: none is known outside of a run; give save_dir or load_dir")
        self._folder = folder
        return folder

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
            "train_batch_size": self._sizes.train,
            "loss_scale": self._loss_scale.state_dict(),
            "data": None if loader is None else loader.state_dict(engine.micro_steps % self._sizes.accumulation),
        }

    def _take_up(self, plain: dict[str, Any], client: dict[str, Any], *, optimizer_states: bool) -> None:
        engine, loader = self._engine, self._engine.training_dataloader
        engine.global_steps = plain["global_steps"]
        engine.global_samples = plain["global_samples"]
        engine.skipped_steps = plain["skipped_steps"]
        # The accumulation may be another at this world size; a step is whole whenever one is saved by the engine.
        engine.micro_steps = engine.global_steps * self._sizes.accumulation
        if optimizer_states:
            self._loss_scale.load_state_dict(plain["loss_scale"])
        if loader is not None and plain["data"] is not None:
            loader.load_state_dict(plain["data"])
        for name, thing in self.registered.items():
            if name in client["registered"]:
                thing.load_state_dict(client["registered"][name])
        self._client_state = client["client"]
