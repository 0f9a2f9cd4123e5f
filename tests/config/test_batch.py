"""The batch arithmetic: every case of what is given, every contradiction."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from hpc_ds.config.batch import fitting_world_size, resolve_batch_sizes
from hpc_ds.config.training import TrainingConfig, load_training
from hpc_ds.errors import ConfigError

# (train, micro, accumulation), world size -> (train, micro, accumulation) as DeepSpeed infers them.
BATCHES: list[tuple[tuple[int | None, int | None, int | None], int, tuple[int, int, int]]] = [
    ((12, 2, 3), 2, (12, 2, 3)),
    ((12, 2, None), 2, (12, 2, 3)),
    ((12, None, 3), 2, (12, 2, 3)),
    ((None, 2, 3), 2, (12, 2, 3)),
    ((12, None, None), 2, (12, 6, 1)),
    ((None, 2, None), 2, (4, 2, 1)),
    ((1, None, None), 1, (1, 1, 1)),
]

CONTRADICTIONS: list[tuple[tuple[int | None, int | None, int | None], int, tuple[int, int, int, int]]] = [
    ((8, 3, 2), 1, (8, 3, 2, 6)),
    ((8, 3, 2), 4, (8, 3, 2, 24)),
    ((7, None, None), 2, (7, 3, 1, 6)),
    ((7, 2, None), 1, (7, 2, 3, 6)),
    ((2, 4, None), 1, (2, 4, 1, 4)),
    ((1, None, None), 4, (1, 1, 1, 4)),
    ((12, None, 5), 2, (12, 1, 5, 10)),
]


KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_config(sizes: tuple[int | None, int | None, int | None]) -> TrainingConfig:
    return load_training({key: size for key, size in zip(KEYS, sizes, strict=True) if size is not None})[0]


@pytest.mark.parametrize(("given", "world", "expected"), BATCHES, ids=str)
def test_the_third_batch_size_follows_from_two(
    given: tuple[int | None, int | None, int | None], world: int, expected: tuple[int, int, int]
) -> None:
    found = resolve_batch_sizes(batch_config(given), world)
    assert (found.train, found.micro, found.accumulation, found.world_size) == (*expected, world)


@pytest.mark.parametrize(("given", "world", "named"), CONTRADICTIONS, ids=str)
def test_contradicting_batch_sizes_are_named_all_four(
    given: tuple[int | None, int | None, int | None], world: int, named: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch_sizes(batch_config(given), world)
    train, micro, accumulation, product = named
    assert str(caught.value).startswith(
        f"train_batch_size {train}: not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
        f"{accumulation} x world size {world} = {product}; "
    )


@pytest.mark.parametrize("given", [(None, None, None), (None, None, 4)], ids=str)
def test_one_batch_size_at_least_is_needed(given: tuple[int | None, int | None, int | None]) -> None:
    with pytest.raises(ConfigError, match="train_batch_size, train_micro_batch_size_per_gpu: neither is given"):
        resolve_batch_sizes(batch_config(given), 2)


def test_sizes_that_are_auto_are_not_given() -> None:
    config = load_training({"train_batch_size": "auto", KEYS[1]: 2, KEYS[2]: "auto"})[0]
    assert resolve_batch_sizes(config, 3).train == 6
    with pytest.raises(ConfigError, match="neither is given"):
        resolve_batch_sizes(load_training(dict.fromkeys(KEYS, "auto"))[0], 2)


def test_a_size_may_be_written_with_a_point() -> None:
    assert resolve_batch_sizes(load_training({"train_batch_size": 8.0})[0], 2).micro == 4


def test_a_contradiction_says_why_the_world_is_so_large() -> None:
    with pytest.raises(ConfigError, match=r"x world size 4 \(2 nodes x 2 ranks\) = 24; make them agree"):
        resolve_batch_sizes(batch_config((8, 3, 2)), 4, "2 nodes x 2 ranks")


# (train, micro, accumulation) -> the one world size they allow.
FITTING: list[tuple[tuple[int | None, int | None, int | None], int | None]] = [
    ((16, 4, 1), 4),
    ((16, 4, 2), 2),
    ((16, 3, 1), None),
    ((4, 8, 1), None),
    ((16, 4, None), None),
    ((None, 4, 1), None),
]


@pytest.mark.parametrize(("given", "world"), FITTING, ids=str)
def test_three_sizes_leave_one_world_size(given: tuple[int | None, int | None, int | None], world: int | None) -> None:
    assert fitting_world_size(batch_config(given)) == world


SIZES = st.integers(1, 64)


@hypothesis.settings(deadline=None)
@hypothesis.given(SIZES, SIZES, st.integers(1, 16), st.sets(st.sampled_from([0, 1, 2]), max_size=1))
def test_whichever_of_the_three_is_left_out_is_found(micro: int, steps: int, world: int, left_out: set[int]) -> None:
    sizes = (micro * steps * world, micro, steps)
    given = tuple(None if place in left_out else size for place, size in enumerate(sizes))
    found = resolve_batch_sizes(batch_config(given), world)
    assert (found.train, found.micro, found.accumulation) == sizes


@hypothesis.settings(deadline=None)
@hypothesis.given(st.tuples(*[st.none() | SIZES] * 3), st.integers(1, 16))
def test_the_sizes_agree_or_are_refused(given: tuple[int | None, int | None, int | None], world: int) -> None:
    """And what was given is never changed."""
    try:
        found = resolve_batch_sizes(batch_config(given), world)
    except ConfigError:
        return
    assert found.train == found.micro * found.accumulation * world
    for asked, size in zip(given, (found.train, found.micro, found.accumulation), strict=True):
        assert asked in {None, size}
