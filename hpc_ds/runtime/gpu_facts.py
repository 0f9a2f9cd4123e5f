"""What the doctor finds out about GPUs: which this rank sees, whether its own one computes, and what the driver says.

NVML, where it is there, is asked by ctypes: for errors of memory that were not corrected, and for clocks that are held
down. Source: https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_MIB = 1 << 20
_UNCORRECTED, _SINCE_REBOOT = 1, 0
_HELD_DOWN = {  # of nvmlClocksThrottleReasons: those that a healthy GPU under load does not show
    0x08: "hardware slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x20: "software thermal slowdown",
}
_SIZE = 1024


def versions() -> dict[str, str]:
    """Of torch and of what it was built with and uses."""
    told = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found = {name: str(value) for name, value in told.items() if value}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def gpus() -> list[dict[str, Any]]:
    """The GPUs that this process sees."""
    if not torch.cuda.is_available():
        return []
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    number = str(getattr(properties, "uuid", index))
    found: dict[str, Any] = {"index": index, "id": number, "name": properties.name}
    found["total_mib"] = round(properties.total_memory / _MIB)
    found |= _told_by_driver(f"GPU-{number}")
    return found


def own_gpu(local_rank: int) -> dict[str, Any]:
    """The GPU that this rank will use: its free memory, and whether it computes what it should."""
    index = local_rank if torch.cuda.device_count() > 1 else 0
    found: dict[str, Any] = {"index": index}
    try:
        with torch.cuda.device(index):
            free, total = torch.cuda.mem_get_info()
            found |= {"free_mib": round(free / _MIB), "total_mib": round(total / _MIB)}
            found["right"] = computes(torch.device("cuda", index))
    except (RuntimeError, AssertionError, ValueError) as error:
        found["error"] = str(error).strip().partition("\n")[0]
    return found


def computes(device: torch.device) -> bool:
    """Whether a product of two matrices of whole numbers is exactly what it must be."""
    rows = torch.arange(_SIZE, device=device) % 7
    columns = torch.arange(_SIZE, device=device) % 5
    left = rows[:, None].float().expand(_SIZE, _SIZE).contiguous()
    right = columns[None, :].float().expand(_SIZE, _SIZE).contiguous()
    expected = (rows[:, None] * columns[None, :] * _SIZE).float()  # below 2**24: exact in fp32, and in tf32 pieces too
    return bool(torch.equal(left @ right, expected))


class _Nvml:
    """The driver's library, opened once; every question may go unanswered."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            self._library = library if library.nvmlInit_v2() == 0 else None
        except (OSError, AttributeError):
            return

    def ask(self, function: str, *arguments: Any) -> bool:
        """Whether the library has such a function, and it succeeded."""
        try:
            return self._library is not None and getattr(self._library, function)(*arguments) == 0
        except AttributeError:
            return False

    def handle(self, gpu: str) -> ctypes.c_void_p | None:
        """Of the GPU with this UUID."""
        found = ctypes.c_void_p()
        return found if self.ask("nvmlDeviceGetHandleByUUID", gpu.encode(), ctypes.byref(found)) else None


_nvml: list[_Nvml] = []


def _told_by_driver(gpu: str) -> dict[str, Any]:
    if not _nvml:
        _nvml.append(_Nvml())
    nvml = _nvml[0]
    found: dict[str, Any] = {}
    handle = nvml.handle(gpu)
    if handle is None:
        return {}
    count, reasons = ctypes.c_ulonglong(), ctypes.c_ulonglong()
    if nvml.ask("nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_REBOOT, ctypes.byref(count)):
        found["uncorrected_errors"] = count.value
    if nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle, ctypes.byref(reasons)):
        found["held_down"] = [words for bit, words in _HELD_DOWN.items() if reasons.value & bit]
    return found
