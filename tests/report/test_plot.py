"""The curve in the terminal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.report.plot import curve


def test_no_points_make_no_curve() -> None:
    assert curve([]) == []


def test_a_falling_loss_falls() -> None:
    assert curve([(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)], width=4, height=4) == [
        "   4.000 ┤█   ",
        "         ┤█▅  ",
        "         ┤██▃ ",
        "   1.000 ┤███▁",
        "    step  1  4",
    ]


def test_restarts_are_marked() -> None:
    lines = curve([(1, 1.0), (2, 1.0), (3, 1.0)], [2, 99], width=3, height=2)
    assert lines[0] == "   1.000 ┤ │ "
    assert lines[-1] == " restart   ▲"


def test_a_single_point_and_a_flat_curve_are_curves() -> None:
    assert len(curve([(7, 2.0)])) == 11
    assert len(curve([(1, 2.0), (2, 2.0)], height=3)) == 4


def test_gaps_take_the_value_before_them() -> None:
    bottom = curve([(0, 1.0), (9, 2.0)], width=10, height=1)[0]
    assert bottom.endswith("┤▁▁▁▁▁▁▁▁▁█")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good", [[], [(1, 3.0), (2, 2.0)]], ids=["alone", "at the end"])
def test_a_loss_that_is_no_number_does_not_stop_the_curve(good: list[tuple[int, float]], bad: float) -> None:
    assert isinstance(curve([*good, (3, bad), (4, bad)]), list)


LOSSES = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(LOSSES, min_size=1, max_size=200), st.lists(st.integers(0, 300), max_size=4), st.integers(2, 80))
def test_every_line_has_the_same_width(values: list[float], marks: list[int], width: int) -> None:
    lines = curve(list(enumerate(values)), marks, width=width, height=5)
    assert {len(line.partition("┤")[2]) for line in lines[:5]} == {width}
    assert set("".join(line.partition("┤")[2] for line in lines[:5])) <= set(" ▁▂▃▄▅▆▇█│")
