"""Numbers from one type to another on raw bytes, as torch rounds them. Needs no torch.

bfloat16 is the upper half of float32: to it is rounding to nearest, ties to even; from it is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# safetensors' names -> numpy's; bfloat16 and 8-bit floats have none there
NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?",
}  # fmt: skip
FLOATS = {"F64", "F32", "F16", "BF16"}


def converted(data: bytes | memoryview, dtype: str, wanted: str) -> bytes | memoryview:
    """Elements of one type as elements of another; only floats of 16 bits and more are converted, others stay."""
    import numpy as np

    if dtype == wanted or dtype not in FLOATS:
        return data
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float16 is infinite, as in torch
        numbers = as_numbers(data, dtype)
        if wanted == "BF16":
            return _bfloat16(numbers.astype("<f4")).tobytes()
        return numbers.astype(NUMPY_TYPES[wanted]).tobytes()


def target_type(dtype: str, wanted: str | None) -> str:
    """The type that ``converted`` gives; None: keep."""
    return wanted if wanted is not None and dtype in FLOATS else dtype


def as_numbers(data: bytes | memoryview, dtype: str) -> np.ndarray[Any, Any]:
    """Elements as numpy knows them: bfloat16 as float32, 8-bit floats as the bytes they are."""
    import numpy as np

    if dtype == "BF16":
        bits: np.ndarray[Any, Any] = np.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4")
    return np.frombuffer(data, NUMPY_TYPES.get(dtype, "u1"))


def _bfloat16(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    bits = numbers.view("<u4")
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2")
    halves: np.ndarray[Any, Any] = np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded).astype("<u2")
    return halves
