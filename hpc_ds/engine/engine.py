"""The engine: DeepSpeed's forward, backward and step over a sharded module, which saves itself when told to stop.

One optimizer step is ``gradient_accumulation_steps`` micro-batches; the last one is the *boundary*. There, ``step()``

1. completes the gradients and asks all ranks once, in one collective, for the gradient norm, the loss, whether any
   rank was told to stop, and whether a save is due
2. unscales and clips in one multiplication, or skips the update if the norm is not finite
3. updates parameters, learning rate, loss scale and counters
4. saves if due; if told to stop, saves and raises ``Preempted`` (exit code 75)
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.engine.checkpoints import Checkpoints
from hpc_ds.errors import ConfigError, DivergedError
from hpc_ds.runtime import preemption

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.config.training import BatchSizes, TrainingConfig
    from hpc_ds.engine.data import TrainingLoader
    from hpc_ds.engine.loss_scale import LossScale
    from hpc_ds.engine.sharding import Sharded
    from hpc_ds.runtime.rank import Rank
    from hpc_ds.runtime.run import CurrentRun

log = logging.getLogger("hpc_ds")


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What all ranks know after the one collective of a step.

    Attributes:
        grad_norm: global L2 norm, unscaled, before clipping; not finite after an overflow.
        loss: mean over ranks and micro-batches.
        stop: some rank was told to stop.
        save: rank 0's clock says that a save is due.
    """

    grad_norm: float
    loss: float
    stop: bool
    save: bool

    @property
    def overflowed(self) -> bool:
        return not math.isfinite(self.grad_norm)


class Engine:
    """A module in training. Made by ``hpc_ds.initialize``; call it like the module.

    Attributes:
        module: the user's module, sharded in place. Call the engine, not ``module.forward``: its hooks gather parameters.
        optimizer, lr_scheduler, training_dataloader: what ``initialize`` returned; None where there is none.
        global_steps: optimizer steps tried, those skipped included.
        global_samples: samples seen by all ranks.
        skipped_steps: steps without an update, because gradients overflowed.
        micro_steps: micro-batches of this rank.
    """

    def __init__(
        self,
        sharded: Sharded,
        optimizer: torch.optim.Optimizer | None,
        loss_scale: LossScale,
        config: TrainingConfig,
        sizes: BatchSizes,
        rank: Rank,
        run: CurrentRun | None,
    ) -> None:
        self.module = sharded.module
        self.optimizer = optimizer
        self.lr_scheduler: Any = None
        self.training_dataloader: TrainingLoader | None = None
        self.global_steps = 0
        self.global_samples = 0
        self.skipped_steps = 0
        self.micro_steps = 0
        self.local_rank = rank.local_rank
        self.global_rank = rank.rank
        self.world_size = rank.world_size
        self._sharded = sharded
        self._loss_scale = loss_scale
        self._config = config
        self._sizes = sizes
        self._run = run
        self._device = next(self.module.parameters()).device
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._agreed: _Agreed | None = None
        self._synchronizes = True
        self._last_step = time.monotonic()
        self._checkpoints = Checkpoints(self, sharded, loss_scale, sizes, run)

    # forward, backward, step

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return self.module(*inputs, **kwargs)

    forward = __call__

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Accumulate the gradients of one micro-batch. Collective, where the ZeRO stage reduces now.

        Args:
            loss: scalar, of this rank's micro-batch.
            retain_graph: as in ``torch.Tensor.backward``.
            scale_wrt_gas: divide by ``gradient_accumulation_steps``, so that a step has the mean of its micro-batches.

        Returns:
            The loss, divided as it was.

        Raises:
            ConfigError: there is no optimizer, or the loss is not a scalar.
        """
        if self.optimizer is None:
            raise ConfigError("backward: the engine has no optimizer; give initialize one, or name one in the config")
        if loss.numel() != 1:
            raise ConfigError(f"loss of shape {tuple(loss.shape)}: not a scalar; reduce it, for example with .mean()")
        self._sharded.begin_backward(boundary=self._synchronizes and self.is_gradient_accumulation_boundary())
        share = loss / self._sizes.accumulation if scale_wrt_gas else loss
        self._loss_sum += share.detach().double() * (1 if scale_wrt_gas else 1 / self._sizes.accumulation)
        (share * self._loss_scale.value).backward(retain_graph=retain_graph)
        return share

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the present micro-batch is the last of its step."""
        return (self.micro_steps + 1) % self._sizes.accumulation == 0

    def step(self) -> None:
        """Count one micro-batch; at the boundary, take an optimizer step. Collective at the boundary.

        Raises:
            Preempted: some rank was told to stop; the run is saved.
            DivergedError: gradients overflow at the smallest loss scale.
            CheckpointError: the save on a stop failed; the checkpoints before it are untouched.
        """
        if not self._synchronizes:
            raise ConfigError("step: inside no_sync the gradients are not complete; leave it first")
        boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        if not boundary or self.optimizer is None:
            return
        agreed = self._agree()
        self._update(agreed)
        self._count(agreed)
        if agreed.stop:
            self._checkpoints.save_and_stop()
        self._checkpoints.save_if_due(minutes_are_over=agreed.save)

    def _agree(self) -> _Agreed:
        """Ask all ranks at once. Collective."""
        self._sharded.reshard()  # a forward since the last backward, as in an evaluation, left whole parameters behind
        self._sharded.reduce_whole()
        gradients = self._sharded.local_gradients()
        told = [float(preemption.told_to_stop()), float(self.global_rank == 0 and self._checkpoints.minutes_are_over())]
        told += [used := float(self._sharded.used()), used * used]
        numbers = torch.stack([self._sharded.squared_norm(gradients), self._loss_sum / self.world_size])
        numbers = torch.cat([numbers, torch.tensor(told, dtype=torch.float64, device=self._device)])
        dist.all_reduce(numbers)
        squared_norm, loss, stop, save, used, used_squared = numbers.tolist()
        if int(used) ** 2 != self.world_size * int(used_squared):  # equal only where all ranks have the same number
            raise ConfigError(
                "gradients: the ranks used different parameters in this step, and their gradients were mixed up; use the same "
                "on every rank, for example by adding 0 * parameter.sum() to the loss"
            )
        norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        self._agreed = _Agreed(norm / self._loss_scale.value, loss, stop > 0, save > 0)
        return self._agreed

    def _update(self, agreed: _Agreed) -> None:
        optimizer = self.optimizer
        if optimizer is None:
            return
        if agreed.overflowed:
            self.skipped_steps += 1
        else:
            self._unscale_and_clip(agreed.grad_norm)
            optimizer.step()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        self.module.zero_grad(set_to_none=True)  # also of parameters that the optimizer does not have
        scale = self._loss_scale.value
        try:
            self._loss_scale.update(agreed.overflowed)
        except DivergedError:
            self.record("diverged", step=self.global_steps + 1)
            raise
        if agreed.overflowed and self.global_rank == 0:
            log.warning(
                "step %d skipped: gradient norm %s; loss scale %g -> %g",
                self.global_steps + 1, agreed.grad_norm, scale, self._loss_scale.value,
            )  # fmt: skip

    def _unscale_and_clip(self, grad_norm: float) -> None:
        factor = 1.0 / self._loss_scale.value
        if self._config.gradient_clipping > 0:
            factor *= min(1.0, self._config.gradient_clipping / (grad_norm + 1e-6))
        gradients = self._sharded.local_gradients()
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def _count(self, agreed: _Agreed) -> None:
        self.global_steps += 1
        self.global_samples += self._sizes.train
        self._loss_sum.zero_()
        now = time.monotonic()
        self.record(
            "step",
            step=self.global_steps,
            loss=agreed.loss,
            lr=self.get_lr()[0],
            grad_norm=None if agreed.overflowed else agreed.grad_norm,
            loss_scale=self._loss_scale.value,
            overflowed=agreed.overflowed,
            seconds=round(now - self._last_step, 6),
        )
        self._last_step = now
        every = self._config.steps_per_print
        if every is not None and self.global_steps % every == 0 and self.global_rank == 0:
            log.info("step %d: loss %.4f, lr %.3g", self.global_steps, agreed.loss, self.get_lr()[0])

    def record(self, event: str, **fields: Any) -> None:
        """Add one event to the run's, from rank 0; outside of a run, nothing."""
        if self._run is not None and self.global_rank == 0:
            self._run.record(event, **fields)

    # saving and loading

    def save_checkpoint(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything a resume needs, whole or not at all. Collective: call it on every rank.

        Args:
            save_dir: default: where it saved or loaded last, else the run's checkpoints.
            tag: default: ``global_step<N>``.
            client_state: anything made of tensors, numbers, text, lists and dicts; kept for the saves that follow.
            save_latest: whether a later load without a tag shall find it first.
            exclude_frozen_parameters: leave out parameters that need no gradient.

        Raises:
            CheckpointError: the same on every rank; nothing of this save is visible, and training can go on.
        """
        frozen = not exclude_frozen_parameters
        self._checkpoints.save(save_dir, tag, client_state, save_latest=save_latest, frozen=frozen)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path | None = None,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load a checkpoint made at any ZeRO stage and world size. Collective.

        Args:
            load_dir: default: the run's checkpoints. Later saves without a folder go here.
            tag: default: the newest whole one.
            load_module_strict: whether model and checkpoint must have the same names.
            load_optimizer_states: whether the optimizer's state and the loss scale come back.
            load_lr_scheduler_states: whether the schedule comes back.
            load_module_only: weights only: no optimizer, schedule, counters or data position.

        Returns:
            The checkpoint's folder and the client state; ``(None, {})`` when there is none and no tag was asked for.

        Raises:
            CheckpointError: the same on every rank; see ``checkpoint.reader.find``.
        """
        return self._checkpoints.load(
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states,
            lr_scheduler_states=load_lr_scheduler_states,
            module_only=load_module_only,
        )

    def register_state(self, name: str, thing: Any) -> None:
        """Let anything with ``state_dict`` and ``load_state_dict`` ride along in every checkpoint.

        Register before ``load_checkpoint``.
        """
        self._checkpoints.registered[name] = thing

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> bool:
        """Write the whole weights in the compute type as one file that the plain module loads. Collective."""
        self._checkpoints.save_weights(Path(save_dir) / save_filename, compute_dtype(self._config) or torch.float32)
        return True

    # what scripts ask

    def train(self, mode: bool = True) -> None:
        """Put the module in training mode."""
        self.module.train(mode)

    def eval(self) -> None:
        """Put the module in evaluation mode."""
        self.module.eval()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication; for ZeRO stages 0 and 1, which wait for the boundary anyway.

        Raises:
            ConfigError: at stages 2 and 3, which shard gradients at once.
        """
        stage = self._config.zero_optimization.stage
        if stage > 1:
            raise ConfigError(f"no_sync: ZeRO stage {stage} shards gradients at every micro-batch; use stage 0 or 1")
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def zero_grad(self) -> None:
        """Drop all gradients, also those of a step that is not complete."""
        self._sharded.drop_gradients()
        self._loss_sum.zero_()

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, unscaled, before clipping; None before the first."""
        return None if self._agreed is None else self._agreed.grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of every parameter group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """Whether the last call of ``step`` moved parameters."""
        at_boundary = self.micro_steps > 0 and self.micro_steps % self._sizes.accumulation == 0
        return at_boundary and self._agreed is not None and not self._agreed.overflowed

    def train_batch_size(self) -> int:
        """Samples of one step."""
        return self._sizes.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one micro-batch of one rank."""
        return self._sizes.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one step."""
        return self._sizes.accumulation

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self._config.zero_optimization.stage

    @property
    def loss_scale(self) -> float:
        """The factor on the next loss."""
        return self._loss_scale.value

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self._device

    def __getattr__(self, name: str) -> Any:
        """Whatever the engine does not have is the module's."""
        if name == "module" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)


def compute_dtype(config: TrainingConfig) -> torch.dtype | None:
    """The type of forward and backward; None leaves the module's own."""
    if config.fp16.enabled:
        return torch.float16
    return torch.bfloat16 if config.bf16.enabled else None
