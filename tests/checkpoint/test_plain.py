"""Client state comes back as it was, and what cannot is refused by its place before anything is written."""

from __future__ import annotations

import collections
import json
import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import content, load, names, said, save

from hpc_ds.checkpoint import reader, writer
from hpc_ds.checkpoint.plain import Encoder, decode

if TYPE_CHECKING:
    from collections.abc import Callable


def there_and_back(value: Any) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "it"), allow_nan=False)
    return decode(json.loads(text), encoder.tensors)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


VALUES = {
    "numbers": [1, 2.5, -3, 10**40, True, None, 1e300, complex(1, math.inf)],
    "not finite": [math.inf, -math.inf, math.nan],
    "text": "ä\n\ud800",
    "nested": {"deep": [{"er": (1, (2, ()))}]},
    "odd keys": {5: "five", None: 0, (1, 2): "pair", "<tuple>": 1, 2.5: "x"},
    "sets": [{1, 2}, frozenset({"a"})],
    "mappings": [collections.OrderedDict(a=1, b=2), collections.Counter({3: 2})],
    "bytes": [b"\0\xff", bytearray(b"abc")],
    "size": torch.Size([2, 3]),
    "arrays": [np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(1.5), np.bool_(1), np.zeros((0, 2))],
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "python's dice": random.Random(1).getstate(),
}
TENSORS = {
    "whole": torch.arange(3),
    "types": [torch.tensor([1.5, -2.0], dtype=torch.bfloat16), torch.tensor(True), torch.zeros(0, 4)],  # noqa: FBT003
    "view": torch.arange(12).reshape(3, 4).t(),
    "parameter": torch.ones(2),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name: str) -> None:
    assert same(there_and_back(VALUES[name]), VALUES[name])


def test_a_whole_client_state_comes_back_from_disk(tmp_path: Path) -> None:
    state = {**VALUES, **TENSORS, "parameter": nn.Parameter(torch.ones(2))}
    writer.save(tmp_path, "one", content(1, client_state=state, rank_state=[VALUES, TENSORS]))
    loaded = reader.load(tmp_path, None, lambda _stored: [])
    assert loaded is not None
    assert same(loaded.client_state, {**VALUES, **TENSORS})
    assert same(loaded.rank_state, [VALUES, TENSORS])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_any_plain_value_comes_back(value: Any) -> None:
    assert same(there_and_back(value), value)


class Named(collections.namedtuple("Named", "a b")):  # noqa: PYI024
    """A tuple with names would come back without them."""

    __slots__ = ()


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (lambda: endless, "a function"),
    "module": (lambda: nn.Linear(1, 1), "a torch.nn.modules.linear.Linear"),
    "object": (object, "a object"),
    "stream": (lambda: sys.stdout, "a "),
    "path": (Path, "a pathlib.PosixPath"),
    "generator": (lambda: random.Random(1), "a random.Random"),
    "named tuple": (lambda: Named(1, 2), "a test_plain.Named"),
    "default dict": (lambda: collections.defaultdict(list), "a collections.defaultdict"),
    "objects": (lambda: np.array([object()]), "a numpy.ndarray"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "a torch.sparse_coo tensor on cpu"),
    "no data": (lambda: torch.zeros(1, device="meta"), "a torch.strided tensor on meta"),
    "subclass": (lambda: torch.Tensor._make_subclass(Strange, torch.zeros(1)), "a test_plain.Strange"),
}


class Strange(torch.Tensor):
    """A tensor that is more than its numbers."""


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_not_plain_is_refused_by_its_place(tmp_path: Path, kind: str) -> None:
    make, wanted = UNFIT[kind]
    save(tmp_path, 1)
    client = {"fine": 1, "list": [0, {"it": make()}]}
    error = said(lambda: writer.save(tmp_path, "step2", content(2, client_state=client)))
    assert f"rank 0: client_state['list'][1]['it']: {wanted}" in error
    assert "cannot be stored; " in error
    assert names(tmp_path) == ["latest", "step1"]
    assert load(tmp_path) == ("step1", 1)


def test_what_contains_itself_is_refused() -> None:
    assert "does it contain itself?" in said(lambda: Encoder().encode(endless(), "it"))


def test_a_key_that_cannot_be_stored_is_named() -> None:
    assert said(lambda: Encoder().encode({object: 1}, "it")).startswith(
        "it key <class 'object'>: a type cannot be stored"
    )


@pytest.mark.parametrize(
    "data",
    [
        {"<path>": "/"},
        {"<tuple>": 5},
        {"<tensor>": 7},
        {"<dict>": [[1]]},
        {"<dict>": [[[1], 2]]},
        {"<ndarray>": ["O", [1], "AAAAAAAAAAA="]},
        {"<ndarray>": ["<f8", [10**9], "AAAAAAAAAAA="]},
        {"<bytes>": "?"},
        {"<complex>": ["a", 1]},
        {"<float>": "x"},
    ],
)
def test_words_that_the_encoder_does_not_speak_are_no_values(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        decode(data, [])
