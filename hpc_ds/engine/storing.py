"""What an engine gives out and takes up: its checkpoints, whole weights, and when the run asks for a save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.engine.surface import compute_dtype
from hpc_ds.engine.weights import load_whole, save_whole, whole_state
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from hpc_ds.config.training import TrainingConfig
    from hpc_ds.engine.checkpoints import Checkpoints
    from hpc_ds.engine.saving import Saving
    from hpc_ds.engine.sharding import Sharding


class Storing:
    """``Engine`` is made of this, of the short questions and of the training itself."""

    sharding: Sharding
    _config: TrainingConfig
    _checkpoints: Checkpoints
    _saving: Saving

    def save_checkpoint(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        client_sd: dict[str, Any] | None = None,
    ) -> bool:
        """Save everything a resume needs, whole or not at all. Collective: call it on every rank.

        Args:
            save_dir: default: where it saved or loaded last, else the run's checkpoints.
            tag: default: ``global_step<N>``.
            client_state: anything made of tensors, numbers, text, lists and dicts; kept for the saves that follow.
            save_latest: whether a later load without a tag shall find it first.
            exclude_frozen_parameters: leave out parameters that need no gradient.
            client_sd: another name of client_state, as in DeepSpeed's guide.

        Returns:
            True.

        Raises:
            ConfigError: client_state and client_sd are both given.
            CheckpointError: the same on every rank; nothing of this save is visible, and training can go on.
            RankError: some rank did not call it.
        """
        if client_state is not None and client_sd is not None:
            raise ConfigError(
                "save_checkpoint: client_state and client_sd are two names of one thing; give one of them"
            )
        frozen, client = not exclude_frozen_parameters, client_sd if client_state is None else client_state
        self._checkpoints.save(save_dir, tag, client, save_latest=save_latest, frozen=frozen)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path | None = None,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint made at any ZeRO stage and world size. Collective.

        Args:
            load_dir: default: the run's checkpoints. Saves of the run's own go here from now on.
            tag: default: the newest whole one.
            load_module_strict: whether model and checkpoint must have the same names.
            load_optimizer_states: whether the optimizer's state and the loss scale come back.
            load_lr_scheduler_states: whether the schedule comes back.
            load_module_only: weights only: no optimizer, schedule, counters or data position.
            custom_load_fn: must be None: each rank reads the parts that it needs, and no whole state dict is made.

        Returns:
            The checkpoint's folder and the client state; ``(None, {})`` when there is none and no tag was asked for;
            under DeepSpeed's name ``(None, None)``, as there.

        Raises:
            ConfigError: custom_load_fn is given.
            CheckpointError: the same on every rank; see ``checkpoint.reader.find``.
            RankError: some rank did not call it.
        """
        if custom_load_fn is not None:
            raise ConfigError(
                "load_checkpoint: custom_load_fn needs a whole state dict, and each rank reads its own parts; take up what fits "
                "by load_module_strict=False, or give engine.load_module_state_dict a state dict of your own"
            )
        return self._checkpoints.load(
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states,
            lr_scheduler_states=load_lr_scheduler_states,
            module_only=load_module_only,
        )

    def wait_for_checkpoint(self) -> None:
        """Wait until the save that is being written behind the training is durable. Collective.

        Raises:
            CheckpointError: the same on every rank: it failed; the checkpoints before it are untouched.
        """
        self._checkpoints.wait()

    def register_state(self, name: str, thing: Any) -> None:
        """Let anything with ``state_dict`` and ``load_state_dict`` ride along in every checkpoint.

        Register before ``load_checkpoint``.
        """
        self._checkpoints.registered[name] = thing

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole weights in the compute type as one file that the plain module loads. Collective."""
        dtype = compute_dtype(self._config) or torch.float32
        save_whole(self.sharding, Path(save_dir) / save_filename, dtype, frozen=not exclude_frozen_parameters)
        return True

    save_fp16_model = save_16bit_model

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        """The whole weights in the types of their masters, on the CPU of rank 0; None on other ranks. Collective."""
        return whole_state(self.sharding, None, frozen=not exclude_frozen_parameters)

    def load_module_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True) -> None:
        """Take up whole weights; every rank gives the same. Collective.

        Raises:
            ConfigError: names or shapes differ from the module's.
        """
        load_whole(self.sharding, state_dict, strict=strict)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        """The whole weights in the compute type, on the CPU of rank 0; None on other ranks. Collective."""
        return whole_state(self.sharding, compute_dtype(self._config), frozen=not exclude_frozen_parameters)

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict

    # stops

    def leave_stops_to_the_caller(self) -> None:
        """From now on, the caller saves and stops: ``step`` neither saves by itself nor raises ``Preempted``.

        After each boundary ask ``stop_agreed`` and ``save_due``; every rank gets the same answers.
        """
        self._saving.left_to_the_caller = True
        self._checkpoints.tells = False

    @property
    def stop_agreed(self) -> bool:
        """Whether some rank had been told to stop at the last boundary: save, and ``raise hpc_ds.Preempted``."""
        return self._saving.stop_agreed

    @property
    def save_due(self) -> bool:
        """Whether the run asked for a save at the last boundary; outside of a run, never."""
        return self._saving.save_due
