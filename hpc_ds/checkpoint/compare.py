"""What differs between two checkpoints, tensor by tensor and a few MB at a time. Needs no torch.

Compared are weights and optimizer state; not random states, client state and counters. Not-a-number equals itself.
"""

from __future__ import annotations

import math
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.convert import as_numbers
from hpc_ds.checkpoint.index import ITEM_BYTES
from hpc_ds.checkpoint.whole import WholeTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from hpc_ds.checkpoint.stored import Stored

_COMPARED = ("model.", "optimizer.")


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same in both.

    Attributes:
        problem: in words.
        max_abs: largest difference of two elements; None where these were not compared, infinite or not a number where
            one of them is.
    """

    name: str
    problem: str
    max_abs: float | None = None


def names_in(stored: Stored) -> set[str]:
    """The tensors of a checkpoint that are compared."""
    return {name for name in stored.tensors if name.startswith(_COMPARED)}


def bytes_to_compare(a: Stored, b: Stored) -> int:
    """How much of the first is read."""
    tensors = [a.tensors[name] for name in names_in(a) & names_in(b)]
    return sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in tensors)


def differences(a: Stored, b: Stored, progress: Callable[[int], None] | None = None) -> Iterator[Difference]:
    """The tensors that differ, by name.

    Args:
        a: one checkpoint.
        b: the other.
        progress: called with the number of bytes of ``a`` compared.

    Raises:
        DamagedError: one of them does not hold what was written.
    """
    with closing(WholeTensors(a)) as of_a, closing(WholeTensors(b)) as of_b:
        for name in sorted(names_in(a) | names_in(b)):
            if name not in a.tensors or name not in b.tensors:
                yield Difference(name, f"only in {'the first' if name in a.tensors else 'the second'}")
                continue
            one, other = a.tensors[name], b.tensors[name]
            if one.shape != other.shape:
                yield Difference(name, f"shape {list(one.shape)} and {list(other.shape)}")
                continue
            pairs = _pairs(of_a.chunks(name), one.dtype, of_b.chunks(name), other.dtype, progress)
            largest = max((_largest(x, y) for x, y in pairs), key=_rank, default=0.0)
            if one.dtype != other.dtype:
                yield Difference(name, f"type {one.dtype} and {other.dtype}", largest)
            elif largest != 0:
                yield Difference(name, "values", largest)


def _pairs(
    of_a: Iterator[memoryview],
    type_a: str,
    of_b: Iterator[memoryview],
    type_b: str,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The same elements of both: their chunks end in different places."""
    left = right = as_numbers(b"", "F32")
    while True:
        if not len(left):
            chunk = next(of_a, None)
            if chunk is None:
                return
            left = as_numbers(bytes(chunk), type_a)
            if progress is not None:
                progress(len(chunk))
        if not len(right):
            right = as_numbers(bytes(next(of_b)), type_b)
        count = min(len(left), len(right))
        yield left[:count], right[:count]
        left, right = left[count:], right[count:]


def _largest(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """The largest difference; not a number where only one of two elements is one."""
    import numpy as np

    if x.dtype == y.dtype and x.tobytes() == y.tobytes():
        return 0.0
    different = ~((x == y) | ((x != x) & (y != y)))  # noqa: PLR0124 - only not-a-number differs from itself
    if not different.any():
        return 0.0
    wide = complex if "c" in {x.dtype.kind, y.dtype.kind} else float
    with np.errstate(all="ignore"):
        found = np.abs(x[different].astype(wide) - y[different].astype(wide))
    # Large integers that differ may be the same number as floats.
    return math.nan if np.isnan(found).any() else max(float(found.max()), sys.float_info.min)


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value
