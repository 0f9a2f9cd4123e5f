"""What scripts ask a DeepSpeed engine beside forward, backward and step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.engine.autocast import autocast_dtype
from hpc_ds.engine.compiling import compile_blocks
from hpc_ds.engine.sharding import find_blocks
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from hpc_ds.config.batch import BatchSizes
    from hpc_ds.config.training import Fp16Config, TrainingConfig
    from hpc_ds.engine.agreement import Agreed
    from hpc_ds.engine.loss_scale import LossScale
    from hpc_ds.engine.sharding import Sharding


class Surface:
    """Questions with short answers, and settings; ``Engine`` is made of this and of the training itself."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    sharding: Sharding
    _config: TrainingConfig
    _sizes: BatchSizes
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

    def compile(self, backend: str | None = None, compile_kwargs: dict[str, Any] | None = None) -> None:
        """Compile every block of the module with torch.compile."""
        section, zero = self._config.compile, self._config.zero_optimization
        blocks = find_blocks(self.module, zero.blocks) or [self.module]
        compile_blocks(blocks, backend or section.backend, compile_kwargs or section.kwargs)

    def train(self, mode: bool = True) -> None:
        """Put the module in training mode."""
        self.module.train(mode)

    def eval(self) -> None:
        """Put the module in evaluation mode."""
        self.module.eval()

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

    def tell_optimizer(self) -> None:
        """Let the optimizer have what scripts read there: ``overflow`` of the last step, ``cur_scale`` and ``loss_scale``."""
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

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self._config.zero_optimization.stage

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self._config.zero_optimization.stage > 0

    def fp16_enabled(self) -> bool:
        """Whether compute is fp16."""
        return self._config.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        """Whether compute is bf16."""
        return self._config.bf16.enabled

    def gradient_clipping(self) -> float:
        """The largest norm that gradients may have; 0 for any."""
        return self._config.gradient_clipping

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale moves."""
        return self._config.fp16.enabled and self._config.fp16.loss_scale == 0

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whole weights can always be gathered."""
        return True

    def loss_scale(self) -> float:
        """The loss scale of the config: 0 for one that moves, 1 without fp16. The one in use is ``cur_scale``."""
        return self._config.fp16.loss_scale if self._config.fp16.enabled else 1.0

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

    def __getattr__(self, name: str) -> Any:
        """Whatever the engine does not have is the module's."""
        if name in {"module", "sharding"} or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)


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
