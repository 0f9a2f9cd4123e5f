"""How the complaints of pydantic become one sentence: ``<file>: <key> <value>: <what is wrong>; <what to do>``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field

from hpc_ds.config.model import Model, check, nearest
from hpc_ds.errors import ConfigError


def _even(number: int) -> int:
    if number % 2:
        raise ValueError("odd")
    return number


class Inner(Model):
    """A section."""

    size: Annotated[int, Field(ge=1, le=8)] = 1
    mode: Literal["fast", "slow"] = "fast"
    later: bool = Field(default=False, alias="async")


class Outer(Model):
    """A file."""

    name: str
    inner: Inner = Field(default_factory=Inner)
    either: str | Inner | None = None
    share: float = 0.5
    words: list[str] = Field(default_factory=list)
    free: dict[str, str] = Field(default_factory=dict)
    number: Annotated[int, AfterValidator(_even)] = 0


COMPLAINTS: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "f: name: missing; it has no default", "name"),
    ({"name": 1}, "f: name 1: not text; put it in quotes", "name"),
    ({"name": None}, "f: name None: not text; put it in quotes", "name"),
    ({"name": "a", "nmae": 1}, "f: nmae: unknown key; did you mean 'name'?", "nmae"),
    (
        {"name": "a", "zzz": 1},
        "f: zzz: unknown key; known: either, free, inner, name, number, share, words",
        "zzz",
    ),
    ({"name": "a", "inner": {"sise": 2}}, "f: inner.sise: unknown key; did you mean 'size'?", "inner.sise"),
    ({"name": "a", "inner": {"asnyc": 2}}, "f: inner.asnyc: unknown key; did you mean 'async'?", "inner.asnyc"),
    ({"name": "a", "inner": 2}, "f: inner 2: not a section; give a section in { }", "inner"),
    ({"name": "a", "inner": [1]}, "f: inner [1]: not a section; give a section in { }", "inner"),
    (
        {"name": "a", "inner": {"size": "2"}},
        "f: inner.size '2': not a whole number; give a number without quotes or fraction",
        "inner.size",
    ),
    (
        {"name": "a", "inner": {"size": True}},
        "f: inner.size True: not a whole number; give a number without quotes or fraction",
        "inner.size",
    ),
    (
        {"name": "a", "inner": {"size": 9}},
        "f: inner.size 9: out of range; it must be less than or equal to 8",
        "inner.size",
    ),
    (
        {"name": "a", "inner": {"mode": "quick"}},
        "f: inner.mode 'quick': not one of the choices; use 'fast' or 'slow'",
        "inner.mode",
    ),
    (
        {"name": "a", "inner": {"async": 1}},
        "f: inner.async 1: neither true nor false; give true or false without quotes",
        "inner.async",
    ),
    ({"name": "a", "share": "x"}, "f: share 'x': not a number; give a number without quotes", "share"),
    ({"name": "a", "words": "x"}, "f: words 'x': not a list; give a list in [ ]", "words"),
    ({"name": "a", "words": ["x", 2]}, "f: words[1] 2: not text; put it in quotes", "words[1]"),
    ({"name": "a", "free": []}, "f: free []: not a section; give a section in { }", "free"),
    ({"name": "a", "free": {"k": 2}}, "f: free.k 2: not text; put it in quotes", "free.k"),
    ({"name": "a", "either": 2}, "f: either 2: not text; put it in quotes", "either"),
    ({"name": "a", "number": 3}, "f: number 3: odd", "number"),
    (
        {"number": 3, "words": "x"},
        "f: name: missing; it has no default, and words 'x': not a list; give a list in [ ], and number 3: odd",
        "name",
    ),
]


@pytest.mark.parametrize(("data", "message", "key"), COMPLAINTS, ids=lambda value: str(value)[:40])
def test_every_complaint_is_a_sentence_that_names_key_value_and_cure(
    data: dict[str, Any], message: str, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Outer, data, "f")
    assert str(caught.value) == message
    assert (caught.value.file, caught.value.key, caught.value.exit_code) == ("f", key, 2)


def test_what_is_right_is_frozen() -> None:
    model = check(Outer, {"name": "a", "inner": {"async": True}, "either": {"size": 2}}, "f")
    assert (model.inner.later, model.either.size) == (True, 2)
    with pytest.raises(ValueError, match="frozen"):
        model.name = "b"


def test_an_error_of_ours_hides_that_of_pydantic() -> None:
    with pytest.raises(ConfigError) as caught:
        check(Outer, {}, "f")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_nearest_word_is_named_else_all() -> None:
    assert nearest("nodse", ["nodes", "time"]) == "did you mean 'nodes'?"
    assert nearest("xxx", ["time", "nodes"]) == "known: nodes, time"
