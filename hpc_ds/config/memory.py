"""Bytes that a rank holds for parameters, gradients and optimizer state, by stage: arithmetic without torch.

For W ranks, with c, g and s bytes a parameter for the compute type, the type of accumulated gradients and the state of
the optimizer. fp32 compute has no masters beside the parameters.

| stage | parameters | masters (fp32; 16-bit compute only) | gradients       | optimizer state |
|-------|------------|-------------------------------------|-----------------|-----------------|
| 0     | c          | 4                                   | g               | s               |
| 1     | c          | 4 / W                               | g               | s / W           |
| 2     | c          | 4 / W                               | g / W           | s / W           |
| 3     | 4 / W      | the parameters are the masters      | 4 / W           | s / W           |

The paper's 2 + 2 + 12 bytes for mixed-precision Adam are c + g + (4 + s). Stage 3 keeps fp32 shards instead of a 16-bit
shard and an fp32 one, and fp32 gradients: the same 16 / W. Not counted: activations, buckets in flight, the one block
that stage 3 has gathered, buffers, and what the device's own libraries take.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019, sections 3.1, 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_ds.config.sections import OptimizerConfig
    from hpc_ds.config.training import TrainingConfig

STAGES = (0, 1, 2, 3)
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_FP32 = 4

# Tensors of a parameter's own size in the state of an optimizer.
_STATE_TENSORS = {
    "adam": 2, "adamw": 2, "adamax": 2, "nadam": 2, "radam": 2, "lamb": 2, "sparseadam": 2, "adadelta": 2, "rprop": 2,
    "lion": 1, "adagrad": 1, "muon": 1, "rmsprop": 1, "asgd": 1, "sgd": 0, "adafactor": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: what forward and backward compute with, as far as it stays.
        masters: fp32 copies of them, which the optimizer moves.
        gradients: accumulated ones.
        optimizer: the optimizer's state.
        on_host: those of the bytes above that are in host memory.
    """

    parameters: float
    masters: float
    gradients: float
    optimizer: float
    on_host: float

    @property
    def total(self) -> float:
        """All of them, wherever they are."""
        return self.parameters + self.masters + self.gradients + self.optimizer


def bytes_per_rank(
    parameters: int,
    stage: int,
    world_size: int,
    *,
    compute: str = "fp32",
    grad_accum: str | None = None,
    state: int = 8,
    offload: frozenset[str] = frozenset(),
) -> Memory:
    """What one rank holds between two steps: the table above.

    Args:
        parameters: trainable ones, in all.
        stage: of ZeRO.
        world_size: ranks.
        compute: ``fp32``, ``fp16`` or ``bf16``.
        grad_accum: the type of accumulated gradients; None: the compute type. Stage 3 always has fp32.
        state: bytes of optimizer state for a parameter; see ``state_bytes``.
        offload: ``"optimizer"``, ``"param"``, both or none.
    """
    shard = parameters / world_size
    if stage == 3:
        held = Memory(_FP32 * shard, 0.0, _FP32 * shard, state * shard, 0.0)
    else:
        masters = 0 if compute == "fp32" else _FP32 * (parameters if stage == 0 else shard)
        gradients = _BYTES[grad_accum or compute] * (shard if stage == 2 else parameters)
        optimizer = state * (parameters if stage == 0 else shard)
        held = Memory(float(_BYTES[compute] * parameters), float(masters), float(gradients), float(optimizer), 0.0)
    return Memory(held.parameters, held.masters, held.gradients, held.optimizer, _on_host(held, stage, offload))


def _on_host(held: Memory, stage: int, offload: frozenset[str]) -> float:
    """An offload asked of a stage that cannot do it moves nothing."""
    if stage == 3 and "param" in offload:
        return held.total  # shards, their gradients and the optimizer go together
    if stage > 0 and "optimizer" in offload:
        return held.masters + held.optimizer
    return 0.0


def state_bytes(optimizer: OptimizerConfig | None) -> int:
    """Bytes of fp32 optimizer state for one parameter; where it is not known, those of Adam.

    Muon is counted as if every parameter were a matrix (its others have 8), Adafactor as nothing.
    """
    if optimizer is None:
        return 2 * _FP32
    name, params = optimizer.type.lower(), optimizer.params
    tensors = _STATE_TENSORS.get(name, 2)
    if name in {"sgd", "rmsprop"} and params.get("momentum"):
        tensors += 1
    if name == "rmsprop" and params.get("centered"):
        tensors += 1
    if name in {"adam", "adamw"} and params.get("amsgrad"):
        tensors += 1
    return tensors * _FP32


def memory_of(config: TrainingConfig, stage: int, world_size: int, parameters: int = 1) -> Memory:
    """What a rank would hold at ``stage`` with all else as in the config; by default for one parameter."""
    zero = config.zero_optimization
    asked = {"optimizer": zero.offload_optimizer.device, "param": zero.offload_param.device}
    return bytes_per_rank(
        parameters,
        stage,
        world_size,
        compute=config.compute,
        grad_accum=config.data_types.grad_accum_dtype,
        state=state_bytes(config.optimizer),
        offload=frozenset(name for name, device in asked.items() if device == "cpu"),
    )
