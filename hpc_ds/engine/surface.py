"""What scripts ask a DeepSpeed engine beside forward, backward and step."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from hpc_ds.engine.answers import Answers
from hpc_ds.engine.autocast import autocast_dtype
from hpc_ds.engine.compiling import compile_blocks
from hpc_ds.engine.data import Position, TrainingLoader, refuse_iterable
from hpc_ds.engine.lacking import LACKING
from hpc_ds.engine.parameter_offload import ParameterOffload
from hpc_ds.engine.sharding import find_blocks
from hpc_ds.errors import ConfigError
from hpc_ds.runtime.preemption import ignore_in_worker

if TYPE_CHECKING:
    from hpc_ds.config.batch import BatchSizes
    from hpc_ds.config.training import Fp16Config, TrainingConfig
    from hpc_ds.engine.agreement import Agreed
    from hpc_ds.engine.loss_scale import LossScale
    from hpc_ds.engine.sharding import Sharding
    from hpc_ds.engine.watching import ScriptMonitor, Watch


class Surface(Answers, nn.Module):
    """Questions with short answers, and settings; ``Engine`` is made of this and of the training itself."""

    sharding: Sharding
    lr_scheduler: Any
    training_dataloader: TrainingLoader | None
    _sizes: BatchSizes
    _watch: Watch
    _loss_scale: LossScale
    _agreed: Agreed | None
    _applied: bool
    global_steps: int
    micro_steps: int

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples of a step through the number of its micro-batches, from the next step on.

        Raises:
            ConfigError: it is not a multiple of micro-batch and world size.
        """
        together = self._sizes.micro * self._sizes.world_size
        if train_batch_size < 1 or train_batch_size % together:
            raise ConfigError(
                f"train_batch_size {train_batch_size}: not a multiple of {together} = train_micro_batch_size_per_gpu "
                f"{self._sizes.micro} x world size {self._sizes.world_size}; use one"
            )
        self._sizes = replace(self._sizes, train=train_batch_size, accumulation=train_batch_size // together)
        self.micro_steps = self.global_steps * self._sizes.accumulation

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a micro-batch, and so those of a step. A loader that is made already keeps its own.

        Raises:
            ConfigError: it is less than 1.
        """
        if micro_batch_size < 1:
            raise ConfigError(f"train_micro_batch_size_per_gpu {micro_batch_size}: less than one sample; use 1 or more")
        sizes = self._sizes
        self._sizes = replace(
            sizes, micro=micro_batch_size, train=micro_batch_size * sizes.accumulation * sizes.world_size
        )

    def get_batch_info(self) -> tuple[int, int, int]:
        """Samples of a step, samples of a micro-batch, and micro-batches of a step."""
        return self._sizes.train, self._sizes.micro, self._sizes.accumulation

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader of this rank's micro-batches.

        Args:
            dataset: a map-style dataset.
            batch_size: samples of one micro-batch; default: the config's.
            route: "train" for batches in random order, with a position that ``register_state`` lets ride along in checkpoints;
                "eval" or "predict" for the samples in order.
            pin_memory: page-locked host memory, where there is a GPU.
            data_sampler: says which samples, instead.
            collate_fn: default: the one given to ``initialize``.
            num_local_io_workers: processes that read; default: none.

        Raises:
            ConfigError: an IterableDataset, or fewer samples than a batch needs.
        """
        refuse_iterable(dataset)
        collate, workers = collate_fn or self.collate_fn, num_local_io_workers or 0
        micro = batch_size or self._sizes.micro
        if route == "train" and data_sampler is None:
            sizes = replace(self._sizes, micro=micro, train=micro * self._sizes.accumulation * self.world_size)
            config = self._config
            position = Position(
                len(dataset), config.seed, sizes, self.global_rank, drop_last=config.dataloader_drop_last
            )
            return TrainingLoader(dataset, position, collate, self._device, workers)
        sampler = data_sampler or DistributedSampler(dataset, self.world_size, self.global_rank, shuffle=False)
        return DataLoader(
            dataset,
            micro,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory and self._device.type == "cuda",
            drop_last=self._config.dataloader_drop_last,
            worker_init_fn=ignore_in_worker,
        )

    def empty_partition_cache(self) -> None:
        """Drop parameters that a forward without a backward has gathered, and give free memory back to the device."""
        self.sharding.reshard()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def compile(self, backend: str | None = None, compile_kwargs: dict[str, Any] | None = None) -> None:
        """Compile every block of the module with torch.compile."""
        section, zero = self._config.compile, self._config.zero_optimization
        blocks = find_blocks(self.module, zero.blocks) or [self.module]
        compile_blocks(blocks, backend or section.backend, compile_kwargs or section.kwargs)

    def train(self, mode: bool = True) -> None:  # type: ignore[override] # as DeepSpeed's, it returns nothing
        """Put the module in training mode."""
        self.training = mode
        self.module.train(mode)

    def eval(self) -> None:  # type: ignore[override]
        """Put the module in evaluation mode."""
        self.train(mode=False)

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, unscaled, before clipping; None before the first."""
        return None if self._agreed is None else self._agreed.grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of every parameter group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum, or the betas, of every parameter group."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get("betas", group.get("momentum")) for group in groups]

    def equip_optimizer(self) -> None:
        """Let the optimizer have what DeepSpeed's has for scripts; it must not keep itself alive by that."""
        if self.optimizer is not None:
            weak = weakref.ref(self.optimizer)
            vars(self.optimizer).update(get_lr=partial(_first_rate, weak), set_lr=partial(_set_rates, weak))
            if self.zero_optimization_partition_weights():
                vars(self.optimizer).update(parameter_offload=ParameterOffload(self.sharding.leave_whole))

    def tell_optimizer(self) -> None:
        """Let the optimizer have ``overflow`` of the last step, and ``cur_scale`` and ``loss_scale`` in use, as DeepSpeed's."""
        if self.optimizer is not None:
            overflowed, scale = self._agreed is not None and self._agreed.overflowed, self._loss_scale.value
            vars(self.optimizer).update(overflow=overflowed, cur_scale=scale, loss_scale=scale)

    def was_step_applied(self) -> bool:
        """Whether the last call of ``step`` moved parameters."""
        return self._applied

    def train_batch_size(self) -> int:
        """Samples of one step."""
        return self._sizes.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one micro-batch of one rank."""
        return self._sizes.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one step."""
        return self._sizes.accumulation

    @property
    def monitor(self) -> ScriptMonitor:
        """Monitors that a script may write values of its own to."""
        return self._watch.for_the_script

    @property
    def cur_scale(self) -> float:
        """The factor on the next loss."""
        return self._loss_scale.value

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return self._device

    _device: torch.device

    @property
    def config(self) -> dict[str, Any]:
        """The training config as it took effect, plain JSON."""
        return self._config.model_dump(mode="json")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse a copy or a pickle: its parameters would not be the optimizer's.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "engine: it can be neither copied nor pickled, because module, optimizer and ranks belong together; copy "
            "engine.module below ZeRO stage 3, or use engine.save_checkpoint() and engine.module_state_dict()"
        )

    def __getattr__(self, name: str) -> Any:
        """Whatever the engine does not have is the module's."""
        module = self.__dict__.get("module")
        if module is None or name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(module, name)
        except AttributeError:
            if name in LACKING:
                raise AttributeError(f"engine.{name}: hpc_ds does not have it: {LACKING[name]}") from None
            raise


def _groups(weak: weakref.ref[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    optimizer = weak()
    return [] if optimizer is None else optimizer.param_groups


def _first_rate(weak: weakref.ref[torch.optim.Optimizer]) -> float:
    return float(_groups(weak)[0]["lr"])


def _set_rates(weak: weakref.ref[torch.optim.Optimizer], lr: float) -> None:
    for group in _groups(weak):
        group["lr"] = lr


def compute_dtype(config: TrainingConfig) -> torch.dtype | None:
    """The type of forward and backward; None leaves the module's own."""
    if config.fp16.enabled:
        return torch.float16
    return torch.bfloat16 if config.bf16.enabled else None


def scaled_by(config: TrainingConfig) -> Fp16Config:
    """The settings of the loss scale: autocast to fp16 needs one as well as fp16 itself."""
    autocast = config.torch_autocast
    scaled = autocast.enabled and autocast_dtype(autocast) == torch.float16
    return config.fp16.model_copy(update={"enabled": True}) if scaled else config.fp16


def explain_buffers(error: RuntimeError, module: nn.Module, config: TrainingConfig) -> None:
    """Say why types met in a forward that do not go together, if it is because buffers keep theirs.

    Raises:
        ConfigError: it is.
    """
    compute = compute_dtype(config)
    if compute is None or config.data_types.buffer_dtype is not None or "dtype" not in str(error):
        return
    own = [name for name, value in module.named_buffers() if value.is_floating_point() and value.dtype != compute]
    if own:
        raise ConfigError(
            f"forward: {str(error).splitlines()[0]}: parameters compute in {config.compute}, and buffers, as {own[0]!r}, keep "
            f'their type; set data_types.buffer_dtype to "{config.compute}", or cast in the module'
        ) from error


def refuse_not_scalar(loss: object) -> None:
    """A loss is one number that came from the module.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(
            f"loss of type {type(loss).__name__}: not a tensor; pass what the model computed, as outputs.loss"
        )
    if loss.numel() != 1:
        raise ConfigError(f"loss of shape {tuple(loss.shape)}: not a scalar; reduce it, for example with .mean()")
    if not loss.requires_grad:
        raise ConfigError(
            "loss: it has no gradient; compute it from the engine's output, outside of torch.no_grad(), and do not detach it"
        )
