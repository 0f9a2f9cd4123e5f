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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.engine.agreement import Agreed, agree
from hpc_ds.engine.checkpoints import Checkpoints
from hpc_ds.engine.loss_scale import LossScale
from hpc_ds.engine.outputs import Outputs
from hpc_ds.engine.passes import Passes
from hpc_ds.engine.saving import Saving
from hpc_ds.engine.storing import Storing
from hpc_ds.engine.surface import Surface, explain_buffers, refuse_not_scalar, scaled_by
from hpc_ds.engine.watching import Watch
from hpc_ds.engine.zero import forget
from hpc_ds.errors import ConfigError, DivergedError
from hpc_ds.runtime import preemption
from hpc_ds.runtime.progress import during, mark, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.config.batch import BatchSizes
    from hpc_ds.config.training import TrainingConfig
    from hpc_ds.engine.data import TrainingLoader
    from hpc_ds.engine.sharding import Sharding
    from hpc_ds.runtime.rank import Rank
    from hpc_ds.runtime.run import CurrentRun

log = logging.getLogger("hpc_ds")


class Engine(Surface, Storing):
    """A module in training. Made by ``hpc_ds.initialize``; call it like the module.

    Attributes:
        module: the user's module, sharded in place. Call the engine, not ``module.forward``: its hooks gather parameters.
        optimizer, lr_scheduler, training_dataloader: what ``initialize`` returned; None where there is none.
        global_steps: optimizer steps tried, those skipped included.
        global_samples: samples seen by all ranks.
        skipped_steps: steps without an update, because gradients overflowed.
        micro_steps: micro-batches of this rank.
        sharding: the module's pieces; for code of ours.
    """

    def __init__(
        self,
        sharding: Sharding,
        optimizer: torch.optim.Optimizer | None,
        config: TrainingConfig,
        sizes: BatchSizes,
        rank: Rank,
        run: CurrentRun | None,
    ) -> None:
        super().__init__()
        # As torch would, and reachable without its detour; what listens to new submodules has seen this one already.
        self._modules["module"] = vars(self)["module"] = sharding.module
        self.optimizer = optimizer
        self.lr_scheduler: Any = None
        self.training_dataloader: TrainingLoader | None = None
        self.global_steps = self.global_samples = self.skipped_steps = self.micro_steps = 0
        self.local_rank, self.global_rank, self.world_size = rank.local_rank, rank.rank, rank.world_size
        self.sharding = sharding
        self._loss_scale = LossScale(scaled_by(config))
        self._config = config
        self._sizes = sizes
        self._run = run
        self._device = sharding.device
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._agreed: Agreed | None = None
        self._applied = False
        self._synchronizes = True
        self._boundary_is: bool | None = None
        self._passes = Passes()
        self._last_step = time.monotonic()
        self._outputs = Outputs(
            sharding.watch_output, self._begin_plain_backward, self._end_backward, self._count_plain
        )
        self._watch = Watch(config, sharding.module, self._device, rank.rank, sizes.train)
        self._checkpoints = Checkpoints(self, sharding, self._loss_scale, run, self._watch)
        self._saving = Saving(self, self._checkpoints, run)
        self.equip_optimizer()
        self.tell_optimizer()
        if config.compile.enabled:
            self.compile()
        mark("idle")

    # forward, backward, step

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's output."""
        mark("forward")
        with self._watch.forward(self.global_steps):
            try:
                output = self.module(*inputs, **kwargs)
            except RuntimeError as error:
                self.sharding.explain(error)
                explain_buffers(error, self.module, self._config)
                raise
        if self.optimizer is not None and torch.is_grad_enabled():
            self.sharding.begin_backward(boundary=self._completes())
            self._outputs.watch(output)
        mark("idle")
        return output

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Accumulate the gradients of one micro-batch. Collective, where the ZeRO stage reduces now.

        Args:
            loss: scalar, of this rank's micro-batch.
            retain_graph: as in ``torch.Tensor.backward``.
            scale_wrt_gas: divide by ``gradient_accumulation_steps``; False where the script has divided already.

        Returns:
            The loss, divided as it was.

        Raises:
            ConfigError: there is no optimizer, or the loss is not a scalar.
        """
        if self.optimizer is None:
            raise ConfigError("backward: the engine has no optimizer; give initialize one, or name one in the config")
        refuse_not_scalar(loss)
        share = loss / self._sizes.accumulation if scale_wrt_gas else loss
        self._passes.begin(too_large=1)
        self._begin_backward()
        self._loss_sum += share.detach().double().reshape(())
        self._outputs.expected = True
        try:
            with self._watch.measure("bwd"):
                # In fp32: as a factor of an fp16 loss, 2**16 would be infinite.
                (share.float() * self._loss_scale.value).backward(retain_graph=retain_graph)
                self._end_backward()
        finally:
            self._outputs.expected = False
        return share

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for ``engine.scale(loss).backward()``."""
        self._passes.loss_is_scaled()
        return loss.float() * self._loss_scale.value

    def _begin_backward(self) -> None:
        mark("backward")
        if self._loss_scale.exhausted:
            self.sharding.inspect()
        self.sharding.begin_backward(boundary=self._completes())

    def _begin_plain_backward(self) -> float:
        self._passes.begin_plain(self._sizes.accumulation, self._loss_scale.value)
        self._begin_backward()
        return self._loss_scale.value

    def _end_backward(self) -> None:
        self._passes.end()
        self.sharding.end_backward()
        mark("idle")

    def _count_plain(self, loss: torch.Tensor) -> None:
        self._loss_sum += loss.detach().double().reshape(()) / self._sizes.accumulation

    @property
    def gradient_scale(self) -> float:
        """The factor that the gradients of this step are too large by, until ``step`` undoes it."""
        return self._loss_scale.value * self._passes.too_large

    def _completes(self) -> bool:
        """Whether a backward pass now completes the gradients of a step."""
        return self._synchronizes and self.is_gradient_accumulation_boundary()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the present micro-batch is the last of its step."""
        if self._boundary_is is not None:
            return self._boundary_is
        return (self.micro_steps + 1) % self._sizes.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the present micro-batch is the last of its step, from now on instead of the count.

        Every rank must say the same.
        """
        self._boundary_is = is_boundary

    @during("step")
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count one micro-batch; at the boundary, take an optimizer step. Collective at the boundary.

        Args:
            lr_kwargs: for the schedule's ``step``.

        Raises:
            Preempted: some rank was told to stop; the run is saved.
            DivergedError: gradients overflow at the smallest loss scale.
            CheckpointError: the save on a stop failed; the checkpoints before it are untouched.
        """
        if not self._synchronizes:
            raise ConfigError(
                "step: inside no_sync or coalesce_grad_reduction gradients are not complete; leave it first"
            )
        boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        self._applied = False
        if not boundary or self.optimizer is None:
            return
        with self._watch.measure("step"):
            agreed = self._agree()
            self._update(agreed, lr_kwargs or {})
        self._count(agreed)
        self.tell_optimizer()
        self._saving.after_step(agreed)

    def _agree(self) -> Agreed:
        """Complete the gradients, and ask all ranks at once. Collective."""
        sharding = self.sharding
        sharding.adopt()
        sharding.complete_gradients()
        told = [preemption.told_to_stop(), False, False]
        if self.global_rank == 0:
            told[1:] = self._saving.due_by_the_clock(), self._checkpoints.settled()
        self._agreed = agree(sharding.squared_norm(), self._loss_sum, told, sharding.used(), self.gradient_scale)
        sharding.refuse_different_use(self._agreed.users)
        return self._agreed

    def _update(self, agreed: Agreed, lr_kwargs: dict[str, Any]) -> None:
        optimizer = self.optimizer
        if optimizer is None:
            return
        self._applied = not agreed.overflowed or (
            self._config.bf16.enabled and not self._config.bf16.check_grad_overflow
        )
        if self._applied:
            self.sharding.hand_over([users > 0 for users in agreed.users], self._factor(agreed.grad_norm))
            optimizer.step()
            self.sharding.publish()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        else:
            self.skipped_steps += 1
        last = agreed.overflowed and self._loss_scale.exhausted
        culprit = self._who_diverged() if last else None
        self.sharding.drop_gradients()
        self._passes.forget()
        scale = self._loss_scale.value
        try:
            self._loss_scale.update(agreed.overflowed, culprit)
        except DivergedError:
            self.record("diverged", step=self.global_steps + 1)
            raise
        if not self._applied and self.global_rank == 0:
            log.warning(
                "step %d skipped: gradient norm %s; loss scale %g -> %g",
                self.global_steps + 1, agreed.grad_norm, scale, self._loss_scale.value,
            )  # fmt: skip

    def _factor(self, grad_norm: float) -> float:
        """What unscales and clips a gradient in one multiplication."""
        factor = 1.0 / self.gradient_scale
        clip_norm = self._config.gradient_clipping
        return factor * min(1.0, clip_norm / (grad_norm + 1e-6)) if clip_norm > 0 else factor

    def _who_diverged(self) -> str | None:
        """Collective. The first parameter whose gradient was not finite, and the rank that computed it."""
        told: list[str | None] = [None] * self.world_size
        dist.all_gather_object(told, self.sharding.culprit)
        first = next(((rank, name) for rank, name in enumerate(told) if name is not None), None)
        return None if first is None else f"gradient of {first[1]!r} on rank {first[0]} is not finite"

    def _count(self, agreed: Agreed) -> None:
        self.global_steps += 1
        progress.step = self.global_steps
        self.global_samples += self._sizes.train
        self._loss_sum.zero_()
        now = time.monotonic()
        self.record(
            "step",
            step=self.global_steps,
            loss=agreed.loss if math.isfinite(agreed.loss) else None,
            lr=self.get_lr()[0],
            grad_norm=None if agreed.overflowed else agreed.grad_norm,
            loss_scale=self._loss_scale.value,
            overflowed=agreed.overflowed,
            seconds=round(now - self._last_step, 6),
        )
        self._last_step = now
        self._watch.step_done(self, agreed)

    def record(self, event: str, **fields: Any) -> None:
        """Add one event to the run's, from rank 0; outside of a run, nothing."""
        if self._run is not None and self.global_rank == 0:
            self._run.record(event, **fields)

    # what scripts change

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication; for ZeRO stages 0 and 1, which wait for the boundary anyway.

        Raises:
            ConfigError: at stages 2 and 3, which shard gradients at once, or inside another.
        """
        stage = self._config.zero_optimization.stage
        if stage > 1:
            raise ConfigError(f"no_sync: ZeRO stage {stage} shards gradients at every micro-batch; use stage 0 or 1")
        with self._not_completing("no_sync"):
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Let several backward passes make one step: inside, none of them is its last. Stages 0 and 1 then sum once.

        Stages 2 and 3 shard gradients at every pass all the same: the step is as it should be, and nothing is saved.

        Raises:
            ConfigError: inside another, or inside ``no_sync``.
        """
        with self._not_completing("coalesce_grad_reduction"):
            yield

    @contextmanager
    def _not_completing(self, what: str) -> Iterator[None]:
        if not self._synchronizes:
            raise ConfigError(f"{what}: it is entered already; leave it first")
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 - torch's signature
        """Drop all gradients, also those of a step that is not complete."""
        self.sharding.drop_gradients()
        self._passes.forget()
        self._loss_sum.zero_()

    def destroy(self) -> None:
        """Write monitors out, and below ZeRO stage 3 let go of the module: ``initialize`` takes it again.

        Its parameters keep their values, in the type that they computed in. This engine trains no more. A save behind the
        training goes on; ``wait_for_checkpoint`` waits for it.
        """
        self._watch.close()
        if self.sharding.release():
            forget(self.module)
