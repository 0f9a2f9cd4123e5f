"""Core lists, and cores parted among ranks."""

from __future__ import annotations

import os

import pytest

from hpc_ds.errors import ConfigError, LaunchError
from hpc_ds.launch.cores import Slice, parse_core_list, slices


def test_a_core_list_is_a_list_of_ranges() -> None:
    assert parse_core_list("0-3,8, 10-11") == [0, 1, 2, 3, 8, 10, 11]


@pytest.mark.parametrize(
    ("text", "part", "problem"),
    [
        ("", "", "is neither a core nor a range"),
        ("0,", "", "is neither a core nor a range"),
        ("0-", "0-", "is neither a core nor a range"),
        ("a", "a", "is neither a core nor a range"),
        ("3-1", "3-1", "does not ascend, or overlaps"),
        ("4,1", "1", "does not ascend, or overlaps"),
        ("0-3,3-5", "3-5", "does not ascend, or overlaps"),
    ],
)
def test_a_bad_core_list_is_refused(text: str, part: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_core_list(text)
    assert str(caught.value).startswith(f"core list {text!r}: {part!r} {problem}")


def test_a_list_is_parted_in_its_order() -> None:
    assert slices({0, 1, 4, 5, 6}, 2, "0-1,4-6") == [Slice(frozenset({0, 1}), 2), Slice(frozenset({4, 5}), 2)]


def test_cores_that_are_not_ours_are_named() -> None:
    with pytest.raises(LaunchError, match=r"core list '0-4,9': 3-4,9 not among the cores .* here, 0-2; leave them out"):
        slices({0, 1, 2}, 1, "0-4,9")


def test_too_few_cores_are_refused() -> None:
    with pytest.raises(LaunchError, match="2 cores: fewer than the 3 ranks of this host"):
        slices({0, 1}, 3, "0-1")


def test_our_cores_are_parted_whole() -> None:
    ours = os.sched_getaffinity(0)
    parts = slices(ours, len(ours), None)
    assert frozenset().union(*(part.cores for part in parts)) <= ours
    assert sum(len(part.cores) for part in parts) == len(frozenset().union(*(part.cores for part in parts)))
    assert slices(ours, 1, None)[0].cores == ours
