"""glibc's allocator, told to keep what a step frees: every step needs the same memory again.

By default a large tensor is mapped anew from the kernel each time, and every page of it faults once: a quarter of the
time of a step on the CPU.

Source: mallopt(3)
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_LARGE = 2**31 - 1  # bytes, the largest that mallopt takes


def keep_freed_memory(device: torch.device) -> None:
    """For training on the CPU; where the C library is another one, nothing changes."""
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)
