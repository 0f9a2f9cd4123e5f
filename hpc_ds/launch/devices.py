"""Which devices of this machine a launch may use, without torch.

The first of these that says something:

    CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES   their ids, which are opaque: numbers, UUIDs, MIG instances
    ROCR_VISIBLE_DEVICES                        hides devices below HIP, which counts the others from 0
    NVML                                        NVIDIA's library, which comes with the driver
    KFD                                         AMD's kernel driver

A variable that is empty, ``-1`` or ``NoDevFiles`` (Slurm, where a job asked for no GPU) says that there is none; as in
CUDA a list ends before its first ``-1``. What is picked is always picked out of the visible set.

Source: CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES; https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CUDA, _HIP, _ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
_NONE = ("-1", "NoDevFiles")
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_NVML = "libnvidia-ml.so.1"


class Visible(NamedTuple):
    """The devices that ranks on this machine may use.

    Attributes:
        ids: what CUDA_VISIBLE_DEVICES would be set to, to use them all.
        source: what said so: a variable, ``NVML``, ``KFD``; empty where nothing did.
    """

    ids: tuple[str, ...]
    source: str

    def pick(self, places: Sequence[int]) -> tuple[str, ...]:
        """The ids at these places of the visible set."""
        return tuple(self.ids[place] for place in places)


def visible_devices(environ: Mapping[str, str]) -> Visible:
    """The devices of this machine that the environment leaves.

    Raises:
        ConfigError: a variable names a device twice, which CUDA takes for no devices at all.
    """
    for name in (_CUDA, _HIP):
        if name in environ:
            return Visible(_listed(name, environ[name]), name)
    if _ROCR in environ:
        return Visible(_numbered(len(_listed(_ROCR, environ[_ROCR]))), _ROCR)
    if number := _count_nvml():
        return Visible(_numbered(number), "NVML")
    if number := _count_kfd():
        return Visible(_numbered(number), "KFD")
    return Visible((), "")


def other_variables(environ: Mapping[str, str], places: Sequence[int]) -> dict[str, str]:
    """What besides CUDA_VISIBLE_DEVICES must be set to pick these places: HIP's own variable wins over CUDA's."""
    if _HIP not in environ:
        return {}
    ids = _listed(_HIP, environ[_HIP])
    return {_HIP: ",".join(ids[place] for place in places)} if max(places, default=0) < len(ids) else {}


def _listed(name: str, value: str) -> tuple[str, ...]:
    ids: list[str] = []
    for word in value.split(","):
        device = word.strip()
        if device in _NONE or not device:
            break
        if device in ids:
            raise ConfigError(f"{name} {value!r}: device {device!r} twice; name it once", key=name, value=value)
        ids.append(device)
    return tuple(ids)


def _numbered(number: int) -> tuple[str, ...]:
    return tuple(map(str, range(number)))


def _count_nvml(library: str = _NVML) -> int:
    """NVIDIA's devices, as its driver counts them; 0 where there is no driver."""
    import ctypes

    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return 0
        number = ctypes.c_uint(0)
        found = nvml.nvmlDeviceGetCount_v2(ctypes.byref(number)) == 0
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or one without these functions
        return 0
    return number.value if found else 0


def _count_kfd(folder: Path = _KFD) -> int:
    """AMD's devices: the nodes of its topology that have SIMD units; processors have none."""
    number = 0
    for properties in folder.glob("*/properties"):
        try:
            words = [line.split() for line in properties.read_text(encoding="ascii").splitlines()]
        except (OSError, ValueError):  # a device of another container
            continue
        number += any(len(pair) == 2 and pair[0] == "simd_count" and pair[1] != "0" for pair in words)
    return number
