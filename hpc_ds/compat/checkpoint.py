"""``deepspeed.checkpoint.utils``: copies for ``torch.save``, and DeepSpeed's names of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """The same lists, tuples and dicts, with a copy of every tensor: of its own elements, not of the storage it lies in.

    Args:
        item: a tensor, or what holds tensors; anything else comes back as it is.
        device: of the copies.
    """
    if isinstance(item, torch.Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(value, device) for key, value in item.items()})
    if isinstance(item, list | tuple):
        copies = [clone_tensors_for_torch_save(value, device) for value in item]
        return copies if isinstance(item, list) else tuple(copies)
    return item


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Where DeepSpeed puts a module's state below stage 3; hpc_ds's own files are in docs/checkpoints.md."""
    return str(Path(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt"))


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Where DeepSpeed puts a rank's optimizer state."""
    return str(Path(base_folder, f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"))


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str, tp_rank: int) -> str:
    """Where DeepSpeed puts a layer of a pipeline."""
    return str(Path(base_folder, f"{layer_id}-model_{tp_rank:02d}_model_states.pt"))
