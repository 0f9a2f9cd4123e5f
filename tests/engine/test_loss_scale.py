"""The loss scale, step by step: what DeepSpeed's dynamic scaler does, by hand-written tables."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.config.training import Fp16Config
from hpc_ds.engine.loss_scale import LossScale
from hpc_ds.errors import DivergedError


def scales(config: Fp16Config, story: str) -> list[float]:
    """The scale after each step of a story: x is an overflow, anything else a good step."""
    scale = LossScale(config)
    values = []
    for step in story:
        scale.update(step == "x")
        values.append(scale.value)
    return values


def dynamic(**overrides: float) -> Fp16Config:
    given_ones = {"initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 1, **overrides}
    return Fp16Config(enabled=True, **given_ones)


def test_it_is_1_without_fp16() -> None:
    assert LossScale(Fp16Config()).value == 1.0
    assert scales(Fp16Config(loss_scale=8.0), "..x.") == [1.0] * 4


def test_a_static_scale_never_moves_and_never_gives_up() -> None:
    assert scales(Fp16Config(enabled=True, loss_scale=128.0), "....xxxx..") == [128.0] * 10


def test_the_defaults_are_deepspeeds() -> None:
    config = Fp16Config(enabled=True)
    assert LossScale(config).value == 65536.0
    # the first overflow is forgiven, the second halves; a window of 1000 good steps after the last one doubles
    assert scales(config, "xx" + "." * 1001)[-4:] == [32768.0, 32768.0, 32768.0, 65536.0]
    assert scales(config, "." * 1001)[-2:] == [65536.0, 131072.0]


@pytest.mark.parametrize(
    ("story", "wanted"),
    [
        # the window counts good steps after the first one, or after the first good one since an overflow
        ("........", [16, 16, 16, 32, 32, 32, 64, 64]),
        ("x", [8]),
        ("xxxx", [8, 4, 2, 1]),
        ("x......", [8, 8, 8, 8, 16, 16, 16]),
        ("..x.....", [16, 16, 8, 8, 8, 8, 16, 16]),
        ("...x", [16, 16, 16, 8]),
        ("....x", [16, 16, 16, 32, 16]),
    ],
)
def test_halving_and_doubling(story: str, wanted: list[float]) -> None:
    assert scales(dynamic(), story) == wanted


@pytest.mark.parametrize(
    ("story", "consecutive", "wanted"),
    [
        # two overflows use up a hysteresis of 3; the third halves, and so does each one after it
        ("xxx", False, [16, 16, 8]),
        ("xxxx", False, [16, 16, 8, 4]),
        # good steps do not refill it, unless consecutive ones are asked for
        ("x.x.x.x", False, [16, 16, 16, 16, 8, 8, 4]),
        ("x.x.x.x", True, [16, 16, 16, 16, 16, 16, 16]),
        ("xx.xxx", True, [16, 16, 16, 16, 16, 8]),
        # growing does
        ("xxx....xxx", False, [16, 16, 8, 8, 8, 8, 16, 16, 16, 8]),
    ],
)
def test_hysteresis(story: str, consecutive: bool, wanted: list[float]) -> None:
    assert scales(dynamic(hysteresis=3, consecutive_hysteresis=consecutive), story) == wanted


def test_an_overflow_that_is_forgiven_starts_the_window_again() -> None:
    assert scales(dynamic(hysteresis=2), "..x.....") == [16, 16, 16, 16, 16, 16, 32, 32]


def test_it_never_falls_below_the_minimum_and_then_gives_up() -> None:
    scale = LossScale(dynamic(min_loss_scale=6.0))
    for wanted in (8.0, 6.0):
        scale.update(overflowed=True)
        assert scale.value == wanted
    with pytest.raises(DivergedError, match=r"fp16 loss scale 6: gradients overflow at the smallest scale; lower"):
        scale.update(overflowed=True)
    assert DivergedError.exit_code == 5


def test_it_knows_when_the_next_overflow_is_the_last() -> None:
    scale = LossScale(dynamic(initial_scale_power=1, hysteresis=2))
    known = []
    for _ in range(2):
        known.append(scale.exhausted)
        scale.update(overflowed=True)
    assert [*known, scale.exhausted] == [False, False, True]
    with pytest.raises(
        DivergedError, match=r"^fp16 loss scale 1: gradient of 'x' on rank 1 is not finite at the smallest"
    ):
        scale.update(overflowed=True, culprit="gradient of 'x' on rank 1 is not finite")
    assert not LossScale(Fp16Config(enabled=True, loss_scale=1.0)).exhausted
    assert not LossScale(Fp16Config()).exhausted


def test_a_start_below_the_minimum_rises_to_it() -> None:
    assert scales(dynamic(initial_scale_power=0, min_loss_scale=4.0), "x.") == [4.0, 4.0]


def test_hysteresis_forgives_at_the_minimum_too() -> None:
    config = dynamic(initial_scale_power=0, hysteresis=2)
    assert scales(config, "x.") == [1, 1]
    with pytest.raises(DivergedError):
        scales(config, "xx")


def test_a_checkpoint_of_a_dynamic_scale_goes_on_where_it_stood() -> None:
    story, config = "..x....x..x......", dynamic(hysteresis=2)
    for cut in range(len(story)):
        first = LossScale(config)
        for step in story[:cut]:
            first.update(step == "x")
        second = LossScale(config)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        values = []
        for step in story[cut:]:
            second.update(step == "x")
            values.append(second.value)
        assert values == scales(config, story)[cut:]


def test_the_config_wins_over_a_checkpoint_where_it_changed() -> None:
    saved = LossScale(dynamic(hysteresis=9)).state_dict()
    static = LossScale(Fp16Config(enabled=True, loss_scale=128.0))
    static.load_state_dict(saved)
    assert static.value == 128.0
    off = LossScale(Fp16Config())
    off.load_state_dict(saved)
    assert off.value == 1.0
    less_patient = LossScale(dynamic(hysteresis=1))
    less_patient.load_state_dict(saved)
    less_patient.update(overflowed=True)
    assert less_patient.value == 8.0


@pytest.mark.parametrize("before", [Fp16Config(), Fp16Config(enabled=True, loss_scale=128.0)])
def test_a_scale_that_becomes_dynamic_begins_as_the_config_says(before: Fp16Config) -> None:
    after = LossScale(dynamic(initial_scale_power=5))
    after.load_state_dict(LossScale(before).state_dict())
    assert after.value == 32.0


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
def test_it_is_always_a_power_of_two_times_the_start(
    story: list[bool], window: int, hysteresis: int, consecutive: bool
) -> None:
    scale = LossScale(dynamic(loss_scale_window=window, hysteresis=hysteresis, consecutive_hysteresis=consecutive))
    previous = scale.value
    for overflowed in story:
        try:
            scale.update(overflowed)
        except DivergedError:
            assert overflowed
            assert scale.value == 1.0
            return
        assert scale.value in ({previous, previous / 2} if overflowed else {previous, previous * 2})
        previous = scale.value
