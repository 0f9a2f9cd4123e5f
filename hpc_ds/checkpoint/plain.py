"""Client state and rank state as plain JSON: nothing that comes out of a file can be code.

JSON has no tuples, sets, bytes, NaN, or keys but text; those are written as ``{"<kind>": ...}`` and only the kinds below
come back. Tensors are not written here: they go among the rank's tensors, and their number stands in their place.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

_DEEPEST = 100
_MAPPINGS: dict[str, type[Any]] = {"<dict>": dict, "<OrderedDict>": OrderedDict, "<Counter>": Counter}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "<tuple>": tuple, "<set>": set, "<frozenset>": frozenset, "<torch.Size>": torch.Size,
}  # fmt: skip
_KIND_OF: dict[Any, str] = {
    tuple: "<tuple>", set: "<set>", frozenset: "<frozenset>", torch.Size: "<torch.Size>",
    dict: "<dict>", OrderedDict: "<OrderedDict>", Counter: "<Counter>",
}  # fmt: skip


class Encoder:
    """Turns a value into JSON, and collects its tensors.

    Attributes:
        tensors: in the order of their numbers.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def encode(self, value: Any, where: str, depth: int = 0) -> Any:
        """The value as JSON.

        Args:
            value: what a user handed over.
            where: how a message names it, as ``client_state``.
            depth: of ``value`` in the whole.

        Raises:
            CheckpointError: something in it cannot be stored; the message says where.
        """
        if depth > _DEEPEST:
            raise CheckpointError(f"{where[:60]}...: nested more than {_DEEPEST} deep; does it contain itself?")
        kind = type(value)
        if value is None or kind in {bool, int, str}:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"<float>": str(value)}
        if kind is list:
            return self._items(value, where, depth)
        if kind in {dict, OrderedDict, Counter}:
            return self._mapping(value, where, depth)
        if kind in _KIND_OF:
            return {_KIND_OF[kind]: self._items(value, where, depth)}
        return self._bytes_or_array(value, where)

    def _items(self, values: Any, where: str, depth: int) -> list[Any]:
        return [self.encode(value, f"{where}[{number}]", depth + 1) for number, value in enumerate(values)]

    def _mapping(self, value: dict[Any, Any], where: str, depth: int) -> dict[str, Any]:
        plain = type(value) is dict and all(type(key) is str and not key.startswith("<") for key in value)
        if plain:
            return {key: self.encode(entry, f"{where}[{key!r}]", depth + 1) for key, entry in value.items()}
        pairs = [
            [self.encode(key, f"{where} key {key!r}", depth + 1), self.encode(entry, f"{where}[{key!r}]", depth + 1)]
            for key, entry in value.items()
        ]
        return {_KIND_OF[type(value)]: pairs}

    def _bytes_or_array(self, value: Any, where: str) -> Any:
        kind = type(value)
        if kind in {bytes, bytearray}:
            return {f"<{kind.__name__}>": base64.b64encode(value).decode()}
        if kind is complex:
            return {"<complex>": [self.encode(value.real, where), self.encode(value.imag, where)]}
        if kind in {torch.Tensor, torch.nn.Parameter}:
            return {"<tensor>": self._put(value, where)}
        if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc":
            contiguous = np.ascontiguousarray(value).reshape(value.shape)
            form = "<numpy>" if isinstance(value, np.generic) else "<ndarray>"
            return {form: [value.dtype.str, list(value.shape), base64.b64encode(contiguous.tobytes()).decode()]}
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        raise CheckpointError(
            f"{where}: a {name} cannot be stored; store numbers, text, lists, dicts or tensors made of it, such as its state_dict"
        )

    def _put(self, tensor: torch.Tensor, where: str) -> int:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{where}: a {tensor.layout} tensor on {tensor.device} cannot be stored; make it dense"
            )
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1


def decode(data: Any, tensors: list[torch.Tensor]) -> Any:
    """What ``Encoder`` made JSON of; ValueError, KeyError, TypeError, IndexError where it is none of its words."""
    if isinstance(data, list):
        return [decode(entry, tensors) for entry in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1 or not (kind := next(iter(data))).startswith("<"):
        return {key: decode(value, tensors) for key, value in data.items()}
    inside = data[kind]
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]({decode(key, tensors): decode(value, tensors) for key, value in inside})
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(entry, tensors) for entry in inside)
    return _scalar(kind, inside, tensors)


def _scalar(kind: str, inside: Any, tensors: list[torch.Tensor]) -> Any:
    if kind == "<tensor>":
        return tensors[inside]
    if kind == "<float>":
        return float(inside)
    if kind == "<complex>":
        return complex(*(decode(part, tensors) for part in inside))
    if kind in {"<bytes>", "<bytearray>"}:
        raw = base64.b64decode(inside, validate=True)
        return raw if kind == "<bytes>" else bytearray(raw)
    if kind in {"<numpy>", "<ndarray>"}:
        dtype, shape, text = inside
        if np.dtype(dtype).kind not in "biufc":
            raise ValueError(f"{dtype!r} is no type of numbers")
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).reshape(shape)
        return array[()] if kind == "<numpy>" else array.copy()
    raise ValueError(f"{kind!r} is no kind of value")
