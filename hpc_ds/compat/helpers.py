"""What scripts take from ``deepspeed.runtime.utils`` and ``deepspeed.utils``: devices, seeds, memory, gradients."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.compat.accelerator import get_accelerator
from hpc_ds.compat.logs import show
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_GB = 2**30


class DummyOptim:
    """Parameters as the one group of an optimizer that does nothing."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": params}]


class OnDevice(contextlib.ContextDecorator):
    """What is made inside is made on a device, floats in a type.

    Args:
        dtype: of floats that are given none.
        device: of tensors that are given none; "meta" keeps no numbers.
        enabled: False does nothing.
    """

    def __init__(self, dtype: torch.dtype, device: str = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self.enabled:
            self._inside.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            self._inside.enter_context(torch.device(self.device))

    def __exit__(self, *_error: object) -> None:
        self._inside.close()


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """The same lists, tuples and dicts with their tensors on a device.

    Args:
        item: a tensor, or what holds tensors; anything else comes back as it is.
        device: where to.
        criterion_func: says which tensors; default: all.
    """
    if isinstance(item, torch.Tensor):
        return item.to(device) if criterion_func is None or criterion_func(item) else item
    if isinstance(item, dict):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    if isinstance(item, list | tuple):
        moved = [move_to_device(value, device, criterion_func) for value in item]
        return moved if isinstance(item, list) else tuple(moved)
    return item


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one, which scripts draw from
    torch.manual_seed(seed % 2**63)


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None) -> torch.Tensor:
    """Clip gradients of a plain module, as torch does; an engine clips its own (``gradient_clipping``).

    Raises:
        ConfigError: there is an mpu.
    """
    if mpu is not None:
        raise ConfigError("clip_grad_norm_: an mpu is for model parallelism, which is not supported; pass None")
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Print the memory of rank 0's device, if forced, and begin to count its peak anew."""
    if not force or _is_other_rank():
        return
    gc.collect()
    device: Any = get_accelerator()
    now, most = device.memory_allocated() / _GB, device.max_memory_allocated() / _GB
    held, most_held = device.memory_reserved() / _GB, device.max_memory_reserved() / _GB
    show(f"{message}\nMA {now:.2f} GB  Max_MA {most:.2f} GB  CA {held:.2f} GB  Max_CA {most_held:.0f} GB")
    device.reset_peak_memory_stats()


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Print the memory of this rank's device, or of one rank's only."""
    rank = dist.get_rank()
    if print_rank in {-1, rank}:
        device: Any = get_accelerator()
        if reset_max:
            device.reset_peak_memory_stats()
        now, most = device.memory_allocated() / _GB, device.max_memory_allocated() / _GB
        show(f"RANK={rank} MEMSTATS {msg} device={device.current_device_name()} {now:.4f}GB (max={most:.4f}GB)")


def get_ma_status() -> int:
    """Bytes allocated on rank 0's device; 0 on other ranks."""
    device: Any = get_accelerator()
    return 0 if _is_other_rank() else int(device.memory_allocated())


def empty_cache() -> None:
    """Free what torch keeps of the device's memory, and begin to count its peak anew."""
    device: Any = get_accelerator()
    device.empty_cache()
    device.reset_peak_memory_stats()


def ensure_directory_exists(filename: str) -> None:
    """Make the folder of a file."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)


def noop_decorator(func: Any) -> Any:
    """The function itself."""
    return func


def instrument_w_nvtx(func: Any) -> Any:
    """The function, as a range of a profile where there is a GPU."""

    @functools.wraps(func)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if not torch.cuda.is_available():
            return func(*args, **kwargs)
        with torch.cuda.nvtx.range(func.__qualname__):
            return func(*args, **kwargs)

    return ranged


def safe_update_full_grad_vectorized(param_list: Iterable[Any], update_func: Callable[[Any, Any], Any]) -> None:
    """Collective. Replace whole gradients, one after the other: by ``update_func(gradient, parameter)``, where it has one."""
    from hpc_ds.zero import safe_get_full_grad, safe_set_full_grad

    for parameter in param_list:
        gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            safe_set_full_grad(parameter, update_func(gradient, parameter))


def recursive_getattr(model: Any, module_name: str) -> Any:
    """What a dotted name means."""
    return functools.reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Put something where a dotted name means."""
    above, _, last = module_name.rpartition(".")
    setattr(recursive_getattr(model, above) if above else model, last, module)


def _is_other_rank() -> bool:
    return dist.is_initialized() and dist.get_rank() != 0
