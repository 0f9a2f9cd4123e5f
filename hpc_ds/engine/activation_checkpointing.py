"""``hpc_ds.checkpointing``: DeepSpeed's activation checkpointing on torch's.

``checkpoint(function, *args)`` keeps only the function's inputs and computes it again in the backward, with the same random
numbers; with ``cpu_checkpointing`` it keeps them in host memory. It works without ``configure``, and with an engine or
without one. What is configured holds for the process, as in DeepSpeed: checkpoints stand in models, which know no engine.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016;
https://deepspeed.readthedocs.io/en/latest/activation-checkpointing.html
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from hpc_ds.config.load import read_json
from hpc_ds.config.model import check
from hpc_ds.config.sections import ActivationCheckpointingConfig
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_configured: list[ActivationCheckpointingConfig] = []


def configure(  # noqa: PLR0913 - DeepSpeed's signature
    mpu_: Any = None,
    deepspeed_config: dict[str, Any] | str | Path | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say how checkpoints keep their inputs, for this process; a script's own call, as an engine configures by itself.

    Args:
        mpu_: must be None: there is no model parallelism.
        deepspeed_config: the DeepSpeed config, as a dict or a file.
        partition_activations: accepted; there are no model-parallel ranks to share them.
        contiguous_checkpointing: accepted; torch's allocator keeps its memory in one piece.
        num_checkpoints: accepted; it is for contiguous_checkpointing.
        checkpoint_in_cpu: keep inputs in host memory; wins over the config's cpu_checkpointing.
        synchronize: accepted; streams order what has to wait.
        profile: accepted; see wall_clock_breakdown.

    Raises:
        ConfigError: there is an mpu, or the config is not usable.
    """
    if mpu_ is not None:
        raise ConfigError("checkpointing.configure: an mpu is for model parallelism, which is not supported; pass None")
    del partition_activations, contiguous_checkpointing, num_checkpoints, synchronize, profile
    cpu = _cpu_checkpointing(deepspeed_config) if checkpoint_in_cpu is None else checkpoint_in_cpu
    use(ActivationCheckpointingConfig(cpu_checkpointing=cpu))


def use(config: ActivationCheckpointingConfig) -> None:
    """Configure from the section of a training config that has been checked."""
    _configured[:] = [config]


def is_configured() -> bool:
    """Whether an engine or a script has configured checkpointing."""
    return bool(_configured)


def reset() -> None:
    """Free what forwards without a backward left behind: nothing, as a checkpoint goes with its output.

    Scripts written for DeepSpeed call it before an evaluation.
    """


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns; it runs again in the backward, instead of keeping what it computes on its way.

    Args:
        function: a module or any function of tensors; called twice.
        args: its inputs, tensors or anything else; tensors among them go to host memory with ``cpu_checkpointing``.
    """
    in_cpu = bool(_configured) and _configured[-1].cpu_checkpointing
    # torch saves the inputs under the hooks around the checkpoint, and nothing else: what is inside is not kept at all
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if in_cpu else nullcontext():
        return torch_checkpoint(function, *args, use_reentrant=False)


def _cpu_checkpointing(config: dict[str, Any] | str | Path | None) -> bool:
    """The one key of the section that has an effect."""
    if config is None:
        return False
    named = "training config" if isinstance(config, dict) else str(config)
    data = config if isinstance(config, dict) else read_json(Path(os.fspath(config)), "training config")
    section = data.get("activation_checkpointing", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{named}: activation_checkpointing {section!r}: not a section; give a section in {{ }}")
    ours = {key: value for key, value in section.items() if key in ActivationCheckpointingConfig.model_fields}
    checked: ActivationCheckpointingConfig = check(ActivationCheckpointingConfig, ours, named)
    return checked.cpu_checkpointing
