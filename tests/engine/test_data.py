"""The data loader: at any sequence of world sizes and restarts, every sample of every epoch once, in one order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ds.config.training import BatchSizes
from hpc_ds.engine.data import Position, TrainingLoader
from hpc_ds.errors import ConfigError

CPU = torch.device("cpu")


class Numbers(torch.utils.data.Dataset):
    """The numbers below a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index


class World:
    """The loaders of all ranks of one start, which resume from a state and advance together."""

    def __init__(
        self,
        length: int,
        world_size: int,
        *,
        train: int = 12,
        accumulation: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 0,
    ) -> None:
        sizes = BatchSizes(train, train // world_size // accumulation, accumulation, world_size)
        self.loaders = [
            TrainingLoader(
                Numbers(length), Position(length, seed, sizes, rank, drop_last=drop_last), list, CPU, workers
            )
            for rank in range(world_size)
        ]
        self._iterators: list[Any] = []

    def resume(self, state: dict[str, int]) -> World:
        for loader in self.loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
        return self

    def state(self) -> dict[str, int]:
        states = [loader.state_dict() for loader in self.loaders]
        assert all(state == states[0] for state in states)
        return states[0]

    def micro_batch(self) -> list[int] | None:
        """What all ranks get next, in the order of the ranks; None at the end of an epoch."""
        self._iterators = self._iterators or [iter(loader) for loader in self.loaders]
        parts = [next(iterator, None) for iterator in self._iterators]
        if None in parts:
            assert parts == [None] * len(parts)
            self._iterators = []
            return None
        return list(itertools.chain.from_iterable(parts))

    def take(self, count: int) -> list[int]:
        """``count`` micro-batches, over as many epochs as it takes."""
        found: list[int] = []
        while count:
            part = self.micro_batch()
            if part is not None:
                found += part
                count -= 1
        return found


def alone(length: int, samples: int, *, seed: int = 0, drop_last: bool = False) -> list[int]:
    """What one rank without restarts sees first."""
    return World(length, 1, train=12, seed=seed, drop_last=drop_last).take(-(-samples // 12))[:samples]


@settings(deadline=None, max_examples=150)
@given(
    length=st.integers(1, 60),
    seed=st.integers(-5, 5),
    starts=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9)), min_size=1, max_size=6),
    accumulation=st.sampled_from([1, 2]),
)
def test_any_restarts_at_any_world_size_give_the_order_of_one_rank(
    length: int, seed: int, starts: list[tuple[int, int]], accumulation: int
) -> None:
    seen: list[int] = []
    state = {"samples": 0, "epoch": 0, "seed": seed, "length": length}
    for world_size, count in starts:
        folds = accumulation if 12 % (world_size * accumulation) == 0 else 1
        world = World(length, world_size, accumulation=folds, seed=seed).resume(state)
        seen += world.take(count)
        state = world.state()
        assert (state["samples"], state["epoch"]) == (len(seen), len(seen) // length)
    assert seen == alone(length, len(seen), seed=seed)
    for first in range(0, len(seen) - length + 1, length):
        assert sorted(seen[first : first + length]) == list(range(length))


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(12, 60),
    starts=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9)), min_size=1, max_size=5),
)
def test_drop_last_leaves_out_what_fills_no_batch(length: int, starts: list[tuple[int, int]]) -> None:
    seen: list[int] = []
    state = {"samples": 0, "epoch": 0, "seed": 0, "length": length}
    for world_size, count in starts:
        world = World(length, world_size, drop_last=True).resume(state)
        seen += world.take(count)
        state = world.state()
    usable = length - length % 12
    assert seen == alone(length, len(seen), drop_last=True)
    assert state["epoch"] == len(seen) // usable
    for first in range(0, len(seen), usable):
        of_epoch = seen[first : first + usable]
        assert len(set(of_epoch)) == len(of_epoch)
        assert set(of_epoch) <= set(range(length))


@settings(deadline=None, max_examples=100)
@given(
    length=st.integers(12, 60),
    starts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]), st.integers(0, 9)), min_size=1, max_size=6
    ),
    drop_last=st.booleans(),
)
def test_another_batch_size_sees_each_sample_of_an_epoch_once_too(
    length: int, starts: list[tuple[int, int, int]], drop_last: bool
) -> None:
    order = World(length, 1, train=1).take(2 * length)  # of the first two epochs
    seen: list[list[int]] = [[]]
    state = World(length, 1, train=1).state()
    for world_size, micro, count in starts:
        world = World(length, world_size, train=micro * world_size, drop_last=drop_last).resume(state)
        usable = world.loaders[0].position.usable
        if len(seen[-1]) >= usable:  # what is left of the epoch fills no batch of this size
            seen.append([])
        for sample in world.take(count):
            seen[-1].append(sample)
            if len(seen[-1]) == usable:
                seen.append([])
        state = world.state()
        assert (state["epoch"], state["samples"] % usable) == (len(seen) - 1, len(seen[-1]))
    for number, epoch in enumerate(seen[:2]):
        assert epoch == order[number * length :][: len(epoch)]
    assert all(len(set(epoch)) == len(epoch) for epoch in seen)
    assert drop_last or all(len(epoch) == length for epoch in seen[:-1])


def test_the_place_within_an_epoch_stays_where_another_batch_size_leaves_out_others() -> None:
    first = World(50, 1, train=12, drop_last=True)  # 48 samples an epoch
    first.take(5)
    second = World(50, 1, train=10, drop_last=True).resume(first.state())
    assert (second.state()["epoch"], second.state()["samples"]) == (1, 62)
    later = World(50, 1, train=1).resume({**second.state(), "samples": 50}).take(50)
    assert second.take(3) == later[12:42]
    at_the_end = World(50, 1, train=10, drop_last=True).resume({**second.state(), "samples": 99})
    assert World(50, 1, train=12, drop_last=True).resume(at_the_end.state()).state()["samples"] == 96


def test_epochs_have_orders_of_their_own_and_seeds_too() -> None:
    first = alone(24, 48)
    assert first[:24] != first[24:]
    assert first[:24] != list(range(24))
    assert first != alone(24, 48, seed=1)
    assert first == alone(24, 48)


def test_a_batch_that_reaches_the_end_is_filled_from_the_next_epoch() -> None:
    world = World(30, 2)
    epoch = [world.micro_batch() for _ in range(3)]
    assert world.micro_batch() is None
    assert [len(part) for part in epoch if part] == [12, 12, 12]
    assert (world.state()["samples"], world.state()["epoch"]) == (36, 1)
    rest = [world.micro_batch() for _ in range(2)]
    assert world.micro_batch() is None
    seen = list(itertools.chain.from_iterable(part or [] for part in epoch + rest))
    assert sorted(seen[:30]) == sorted(seen[30:60]) == list(range(30))


@pytest.mark.parametrize(
    ("length", "consumed", "drop_last", "wanted"),
    [
        (24, 0, False, 4),
        (25, 0, False, 5),
        (25, 0, True, 4),
        (25, 6, False, 4),
        (25, 30, False, 4),  # five samples of the second epoch are gone
        (24, 24, False, 4),
        (5, 0, False, 1),
        (24, 48 + 18, True, 1),
    ],
)
def test_len_is_what_an_iteration_gives(length: int, consumed: int, drop_last: bool, wanted: int) -> None:
    world = World(length, 2, accumulation=2, drop_last=drop_last).resume(
        {"samples": consumed, "epoch": 0, "seed": 0, "length": length}
    )
    assert [len(loader) for loader in world.loaders] == [wanted, wanted]
    assert sum(1 for _ in world.loaders[0]) == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_only_what_was_handed_out_is_counted(workers: int) -> None:
    world = World(40, 1, workers=workers)
    assert world.state()["samples"] == 0
    first = world.take(1)
    assert world.state()["samples"] == 12  # workers have drawn more than that
    second = World(40, 1, workers=workers).resume(world.state()).take(3)
    assert first + second == alone(40, 48)


def test_a_step_that_is_not_complete_is_handed_out_again() -> None:
    world = World(40, 2, accumulation=2)
    world.take(3)
    state = world.loaders[0].state_dict(unfinished=1)
    assert state["samples"] == 12
    assert World(40, 2, accumulation=2).resume(state).take(2) == alone(40, 24)[12:]


def test_the_order_is_that_of_the_checkpoint_s_seed() -> None:
    state = World(40, 1, seed=7).state()
    assert World(40, 1, seed=8).resume(state).take(2) == World(40, 1, seed=7).take(2)


def test_positions_in_other_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="training_data of 41 samples: the checkpoint stands in one of 40"):
        World(41, 1).resume(World(40, 1).state())


def test_breaking_off_and_iterating_again_goes_on() -> None:
    (loader,) = World(40, 1).loaders
    seen = []
    for batch in loader:
        seen += batch
        break
    for batch in loader:
        seen += batch
    assert seen == alone(40, 48)
    assert loader.state_dict() == {"samples": 48, "epoch": 1, "seed": 0, "length": 40, "usable": 40}


def test_iterating_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    World(40, 1).take(5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_default_collation_makes_tensors() -> None:
    position = Position(8, 0, BatchSizes(4, 4, 1, 1), 0, drop_last=False)
    batches = list(TrainingLoader(Numbers(8), position, None, CPU))
    assert [tuple(batch.shape) for batch in batches] == [(4,), (4,)]


class Endless(torch.utils.data.IterableDataset):
    """Has neither positions nor a length."""

    def __iter__(self) -> Any:
        return itertools.count()


def test_an_iterable_dataset_is_refused() -> None:
    position = Position(8, 0, BatchSizes(4, 4, 1, 1), 0, drop_last=False)
    with pytest.raises(ConfigError, match="training_data: an IterableDataset has no positions to resume from; pass"):
        TrainingLoader(Endless(), position, None, CPU)


@pytest.mark.parametrize(("length", "drop_last"), [(0, False), (11, True)])
def test_too_few_samples_are_refused(length: int, drop_last: bool) -> None:
    with pytest.raises(ConfigError, match=f"training_data of {length} samples: too few for train_batch_size 12; use"):
        World(length, 1, drop_last=drop_last)
