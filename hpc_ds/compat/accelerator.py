"""``deepspeed.accelerator``: the device of this process, ``torch.cuda`` where it has one, else the CPU.

What DeepSpeed's objects answer, from torch. On the CPU there are no streams and events, and memory is what the process has
resident, as DeepSpeed counts it.

Source: https://www.deepspeed.ai/tutorials/accelerator-abstraction-interface, release 0.19.8
"""

from __future__ import annotations

import functools
import os
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from hpc_ds.compat.comm import get_local_rank
from hpc_ds.errors import ConfigError

_TYPES = {
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.double,
    "FloatTensor": torch.float,
    "HalfTensor": torch.half,
    "IntTensor": torch.int,
    "LongTensor": torch.long,
}
_NEWER = {
    "memory_cached": "memory_reserved",
    "max_memory_cached": "max_memory_reserved",
    "reset_max_memory_cached": "reset_peak_memory_stats",
    "reset_max_memory_allocated": "reset_peak_memory_stats",
}
"""Names that torch has given others."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Accelerator:
    """What scripts ask of their device, whichever it is: what ``torch`` itself answers."""

    _name = "cpu"
    _communication_backend_name = "gloo"

    def device_name(self, device_index: int | None = None) -> str:
        """``cuda``, ``cuda:1``, ``cpu``."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def communication_backend_name(self) -> str:
        """``nccl`` or ``gloo``."""
        return self._communication_backend_name

    def communication_backend_version(self) -> Any:
        """Of nccl; None for gloo, which has none."""
        return torch.cuda.nccl.version() if self._name == "cuda" else None

    def is_synchronized_device(self) -> bool:
        """Whether its work is done when a call returns."""
        return self._name == "cpu"

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def random(self) -> Any:
        """The module ``torch.random``."""
        return torch.random

    def supported_dtypes(self) -> list[torch.dtype]:
        """The types to train in."""
        half = [torch.half] if self.is_fp16_supported() else []
        return [torch.float, *half, *([torch.bfloat16] if self.is_bf16_supported() else [])]

    def is_fp16_supported(self) -> bool:
        """Whether fp16 may be enabled: hpc_ds computes in it on every device."""
        return True

    def is_bf16_supported(self) -> bool:
        """Whether bf16 may be enabled."""
        return True

    def is_triton_supported(self) -> bool:
        """Whether there are kernels of Triton's: hpc_ds has none."""
        return False

    def pin_memory(self, tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """A copy in pinned host memory, where there is a device that it is for."""
        return tensor.pin_memory() if self._name == "cuda" else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in pinned host memory."""
        return bool(tensor.is_pinned())

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on this kind of device."""
        return tensor.device.type == self._name

    def visible_devices_envs(self) -> list[str]:
        """The variables that choose devices."""
        return ["CUDA_VISIBLE_DEVICES"]

    def export_envs(self) -> list[str]:
        """Beginnings of the variables that a launcher hands on for it."""
        return ["NCCL"] if self._name == "cuda" else []

    def get_compile_backend(self) -> str:
        """What ``engine.compile`` uses unless told otherwise."""
        return "inductor"

    def create_op_builder(self, class_name: str) -> None:
        """None: there are no operators to build."""

    get_op_builder = create_op_builder

    def __getattr__(self, name: str) -> Any:
        if name in _TYPES:
            return functools.partial(torch.tensor, dtype=_TYPES[name], device=self._name)
        raise AttributeError(
            f"accelerator.{name}: hpc_ds has no such name; use torch.cuda, or see docs/migrating-from-deepspeed.md"
        )


class CudaAccelerator(Accelerator):
    """The CUDA device of this process."""

    _name = "cuda"
    _communication_backend_name = "nccl"

    def __getattr__(self, name: str) -> Any:
        # memory_allocated, empty_cache, set_device, synchronize, manual_seed, Stream, Event, ...: torch.cuda's own
        found = None if name.startswith("_") else getattr(torch.cuda, _NEWER.get(name, name), None)
        return super().__getattr__(name) if found is None else found

    def device(self, device_index: int | None = None) -> torch.device:
        """Of torch's."""
        return torch.device(self.device_name(device_index))

    def current_device_name(self) -> str:
        """``cuda:0``."""
        return f"cuda:{torch.cuda.current_device()}"

    def is_bf16_supported(self) -> bool:
        """Whether bf16 may be enabled."""
        return bool(torch.cuda.is_bf16_supported())

    def default_generator(self, device_index: int) -> torch.Generator:
        """Of a device."""
        generator: torch.Generator = torch.cuda.default_generators[device_index]
        return generator

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of a device."""
        return int(torch.cuda.mem_get_info(device_index)[1])

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes of a device that nobody has."""
        return int(torch.cuda.mem_get_info(device_index)[0])

    def range_push(self, msg: str, *_args: Any, **_kwargs: Any) -> Any:
        """Begin a range of a profile."""
        return torch.cuda.nvtx.range_push(msg)

    def range_pop(self, *_args: Any) -> Any:
        """End a range of a profile."""
        return torch.cuda.nvtx.range_pop()


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """There is nothing to do on a CPU."""


class CpuAccelerator(Accelerator):
    """The CPU: one device, whose work is done when a call returns."""

    Stream = Event = None
    stream = capture_to_graph = staticmethod(lambda *_args, **_kwargs: nullcontext())
    set_device = synchronize = empty_cache = current_stream = default_stream = device = staticmethod(_nothing)
    range_push = range_pop = create_graph = replay_graph = staticmethod(_nothing)
    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats = staticmethod(_nothing)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    initial_seed = staticmethod(torch.initial_seed)

    def is_available(self) -> bool:
        """Always."""
        return True

    def current_device(self) -> int:
        """The number of this process on its node, as DeepSpeed counts CPUs."""
        return get_local_rank()

    def current_device_name(self) -> str:
        """``cpu``."""
        return "cpu"

    def device_count(self) -> int:
        """One for each process on this node."""
        return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:  # noqa: ARG002 - DeepSpeed's
        """Of the one generator."""
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:  # noqa: ARG002 - DeepSpeed's
        """Of the one generator."""
        torch.set_rng_state(new_state)

    def default_generator(self, device_index: int = 0) -> torch.Generator:  # noqa: ARG002 - DeepSpeed's
        """The one generator."""
        return torch.default_generator

    def lazy_call(self, callback: Any) -> Any:
        """Call it now."""
        return callback()

    def memory_allocated(self, device_index: int | None = None) -> int:  # noqa: ARG002 - DeepSpeed's
        """Bytes of this process that are resident."""
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE

    memory_cached = memory_reserved = memory_allocated

    def max_memory_allocated(self, device_index: int | None = None) -> int:  # noqa: ARG002 - DeepSpeed's
        """The most that were, since the process began."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_cached = max_memory_reserved = max_memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:  # noqa: ARG002 - DeepSpeed's
        """Both, under the names of ``torch.cuda.memory_stats``."""
        peak = self.max_memory_allocated()
        return {"allocated_bytes.all.current": self.memory_allocated(), "allocated_bytes.all.peak": peak}

    def total_memory(self, device_index: int | None = None) -> int:  # noqa: ARG002 - DeepSpeed's
        """Bytes of the node."""
        return os.sysconf("SC_PHYS_PAGES") * _PAGE

    def available_memory(self, device_index: int | None = None) -> int:  # noqa: ARG002 - DeepSpeed's
        """Bytes of the node that are free."""
        return os.sysconf("SC_AVPHYS_PAGES") * _PAGE


@functools.cache
def get_accelerator() -> Accelerator:
    """The one of this process."""
    return CudaAccelerator() if torch.cuda.is_available() else CpuAccelerator()


def set_accelerator(accel_obj: Accelerator) -> None:
    """Accepted where it is this process's own.

    Raises:
        ConfigError: it is another, which hpc_ds does not train on.
    """
    if accel_obj is not get_accelerator():
        raise ConfigError(
            f"set_accelerator: {type(accel_obj).__name__} is another device than hpc_ds trains on, "
            f"{get_accelerator().device_name()!r}; choose devices with CUDA_VISIBLE_DEVICES"
        )


def is_current_accelerator_supported() -> bool:
    """Whether training runs on it: always."""
    return True
