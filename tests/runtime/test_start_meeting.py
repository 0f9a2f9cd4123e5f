"""The meeting before a process group is made: real ranks, real stores; every way in which one should not be there."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from ranks import Outcomes, run_cases
from small import said

from hpc_ds.runtime import meeting, rendezvous
from hpc_ds.runtime.meeting import judge, meet
from hpc_ds.runtime.rank import Rank
from hpc_ds.runtime.rendezvous import Deadline, Place

if TYPE_CHECKING:
    from collections.abc import Callable

LONG, SHORT = timedelta(seconds=60), timedelta(seconds=1)
WORLD = 3


def harness_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def meeting_place(name: str, rank: int, *, is_older: bool = False) -> Place:
    """A store that rank 0 serves, new for each case; its port is told through the harness's store."""
    meeting._starts = itertools.count()
    store = harness_store()
    if rank == 0:
        served = rendezvous._serve(0, WORLD, Deadline(LONG), "")
        store.set(f"port of {name}", str(served.port))
    else:
        known = rendezvous._Published(int(store.get(f"port of {name}")), "", ("127.0.0.1",))
        served = rendezvous._dial_until(lambda: known, me(rank), Deadline(LONG), "the test")
    return Place(served, "127.0.0.1", "rank 0 at the test", is_older)


def me(rank: int, **changes: Any) -> Rank:
    return replace(Rank(rank, rank, WORLD, None, "env"), **changes)


def all_come(rank: int) -> list[Any]:
    place = meeting_place("all_come", rank)
    closed: list[int] = []
    met = meet(me(rank), place._replace(close=lambda: closed.append(rank)), Deadline(LONG), 0)
    met.store.set(f"mine/{rank}", "x")
    met.store.wait([f"mine/{other}" for other in range(WORLD)], LONG)
    dist.barrier()
    return [met.me.local_rank, met.interface, closed]


def unplaced(rank: int) -> tuple[int, int | None]:
    place = meeting_place("unplaced", rank)
    met = meet(me(rank, local_rank=0, placed=False), place, Deadline(LONG), 0)
    dist.barrier()
    return met.me.local_rank, met.me.local_world_size


def twice(rank: int) -> str:
    """Rank 1 takes itself for rank 2; nobody is rank 1."""
    place = meeting_place("twice", rank)
    words = said(lambda: meet(me(2 if rank == 1 else rank), place, Deadline(LONG), 0))
    dist.barrier()
    return words


def another_world(rank: int) -> str:
    place = meeting_place("another_world", rank)
    if rank == 2:
        place.store.wait(["hpc_ds/start/0/0/meeting/1/came/0", "hpc_ds/start/0/0/meeting/1/came/1"], LONG)
    words = said(lambda: meet(me(rank, world_size=8 if rank == 2 else WORLD), place, Deadline(LONG), 0))
    dist.barrier()
    return words


def one_local_rank(rank: int) -> str:
    place = meeting_place("one_local_rank", rank)
    words = said(lambda: meet(me(rank, local_rank=rank % 2), place, Deadline(LONG), 0))
    dist.barrier()
    return words


def one_local_rank_each_with_its_own_device(rank: int) -> int:
    place = meeting_place("own_device", rank)
    os.environ["CUDA_VISIBLE_DEVICES"] = f"GPU-{rank}"
    try:
        local_rank = meet(me(rank, local_rank=0), place, Deadline(LONG), 1).me.local_rank
    finally:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.barrier()
    return local_rank


def absent(rank: int) -> str:
    place = meeting_place("absent", rank)
    if rank == 0:  # whose time is the one that counts
        place.store.wait(["hpc_ds/start/0/0/meeting/1/came/2"], LONG)
    words = (
        "stayed away" if rank == 1 else said(lambda: meet(me(rank), place, Deadline(SHORT if rank == 0 else LONG), 0))
    )
    dist.barrier()
    return words


def gone(rank: int) -> str:
    """Rank 0 serves the store and goes, as if it had failed."""
    place = meeting_place("gone", rank)
    dist.barrier()
    if rank == 0:
        del place
        return "went"
    return said(lambda: meet(me(rank), place, Deadline(LONG), 0))


def an_older_store(rank: int) -> list[int]:
    """torchrun's: it still has the end of the start before, and one that was cut short before rank 2 had come."""
    place = meeting_place("an_older_store", rank, is_older=True)
    meet(me(rank), place, Deadline(LONG), 0)
    dist.barrier()
    meeting._starts = itertools.count()
    if rank == 0:
        cut_short = dist.PrefixStore("hpc_ds/start/0/0", place.store)
        number = cut_short.add("opened", 1)
        for other in (0, 1):
            meeting._come(me(other), place, 0, dist.PrefixStore(f"meeting/{number}", cut_short))
    dist.barrier()
    met = meet(me(rank), place, Deadline(LONG), 0)
    met.store.set(f"mine/{rank}", "x")
    met.store.wait([f"mine/{other}" for other in range(WORLD)], LONG)
    dist.barrier()
    return [met.me.rank]


def through_a_file(rank: int, folder: str) -> list[str]:
    """Three programs of one attempt, one after another; the first was killed before its ranks had met."""
    os.environ["HPCDS_RUN_DIR"] = folder
    meeting._starts = itertools.count()
    path = rendezvous.rendezvous_file(os.environ, me(rank))
    if rank == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_text("9,0123456789abcdef,127.0.0.1")  # nobody listens at the discard port
    dist.barrier()
    words = []
    for _ in range(2):
        place = rendezvous.find_place(me(rank), 0, Deadline(LONG), ask_mpi=True)
        words.append(said(lambda place=place: meet(me(rank), place, Deadline(LONG), 0).me.rank))
        dist.barrier()
        words.append(str(path.exists()))
        dist.barrier()
    del os.environ["HPCDS_RUN_DIR"]
    return words


def a_second_rank_0(rank: int, folder: str) -> str:
    """Ranks 0 and 1 both take themselves for rank 0: one serves the store, the other finds it and all are told."""
    os.environ["HPCDS_RUN_DIR"] = folder
    number = max(0, rank - 1)
    # All have found the place before any is refused: then its address is taken away.
    if rank == 1:
        harness_store().wait(["place of 0", "place of 2"], LONG)
    place = rendezvous.find_place(me(number), 0, Deadline(LONG), ask_mpi=True)
    harness_store().set(f"place of {rank}", "")
    meeting._starts = itertools.count()
    words = said(lambda: meet(me(number), place, Deadline(LONG), 0))
    dist.barrier()
    del os.environ["HPCDS_RUN_DIR"]
    return words


CASES: tuple[Callable[..., Any], ...] = (
    all_come, unplaced, twice, another_world, one_local_rank, one_local_rank_each_with_its_own_device, absent,
    an_older_store, gone,
)  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("run")
    with_folder = (through_a_file, a_second_rank_0)
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in CASES}
    cases |= {function.__name__: (function, (str(folder),)) for function in with_folder}
    return run_cases(WORLD, cases)


pytestmark = pytest.mark.ranks


def test_all_meet_and_have_a_store_of_their_own(three: Outcomes) -> None:
    assert three["all_come"] == [[0, "", [0]], [1, "", []], [2, "", []]]


def test_ranks_that_nobody_placed_are_counted_on_their_node(three: Outcomes) -> None:
    assert three["unplaced"] == [(0, 3), (1, 3), (2, 3)]


def test_a_rank_that_came_twice_is_refused_on_all(three: Outcomes) -> None:
    assert len(set(three["twice"])) == 1
    assert three["twice"][0].startswith("RankError: rank 2: came twice, as process ")


def test_another_world_size_is_refused_on_all(three: Outcomes) -> None:
    assert len(set(three["another_world"])) == 1
    assert three["another_world"][0].startswith("RankError: WORLD_SIZE 8 on rank 2 (")
    assert "): ranks 0, 1 say 3; start all ranks with one launcher" in three["another_world"][0]


def test_two_ranks_with_one_local_rank_are_refused_on_all(three: Outcomes) -> None:
    assert len(set(three["one_local_rank"])) == 1
    assert three["one_local_rank"][0].startswith("RankError: LOCAL_RANK 0: ranks 0, 2 on ")
    assert three["one_local_rank_each_with_its_own_device"] == [0, 0, 0]


def test_those_that_do_not_come_are_named_to_all(three: Outcomes) -> None:
    first, away, third = three["absent"]
    assert away == "stayed away"
    assert first == third
    assert first == (
        "RankError: rank 1 of 3: did not come within 1 s; rank 0 at the test; look at their logs and whether they started"
    )


def test_a_rank_0_that_goes_is_named(three: Outcomes) -> None:
    first, *others = three["gone"]
    assert first == "went"
    assert (
        others
        == ["RankError: rank 0 at the test: it went away before all ranks had come; look at what rank 0 said last"] * 2
    )


def test_a_store_that_outlives_its_ranks_serves_the_next_start(three: Outcomes) -> None:
    assert three["an_older_store"] == [[0], [1], [2]]


def test_a_file_of_an_earlier_program_is_passed_over(three: Outcomes) -> None:
    assert three["through_a_file"] == [[f"no error, but {rank}", "False"] * 2 for rank in range(WORLD)]


def test_a_second_rank_0_is_refused_on_all(three: Outcomes) -> None:
    assert len(set(three["a_second_rank_0"])) == 1
    assert three["a_second_rank_0"][0].startswith("RankError: rank 0: came twice, as process ")


def entry(rank: int, local_rank: int | None, host: str, devices: int = 4, **changes: Any) -> dict[str, Any]:
    plain = {"rank": rank, "local_rank": local_rank, "host": host, "network": host, "node": [host], "devices": devices,
             "visible": ["", "", ""], "address": f"10.0.0.{host[1:]}"}  # fmt: skip
    return plain | changes


# Entries -> how the refusal begins.
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one device for two": ([entry(0, 0, "n1"), entry(1, 1, "n1"), entry(2, 1, "n1")], "LOCAL_RANK 1: ranks 1, 2 on n1 all"),
    "more ranks than devices": ([entry(0, 0, "n1", 2), entry(1, 2, "n1", 2)], "LOCAL_RANK 2 of rank 1 on n1: it sees 2 devices"),
    "nothing says which device": (
        [entry(0, 0, "n1"), entry(1, None, "n2"), entry(2, None, "n2")],
        "ranks 1, 2 on n2: nothing says which of its 4 devices each of 2 ranks uses; set LOCAL_RANK",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "complaint"), REFUSED.values(), ids=REFUSED)
def test_local_ranks_that_do_not_fit_their_node(entries: list[dict[str, Any]], complaint: str) -> None:
    assert judge(entries)["refused"].startswith(complaint)


FITTING: dict[str, tuple[list[dict[str, Any]], dict[int, tuple[int, int]]]] = {
    "two nodes": ([entry(0, 0, "n1"), entry(1, 0, "n2")], {}),
    "interleaved": ([entry(0, 0, "n1"), entry(1, 0, "n2"), entry(2, 1, "n1"), entry(3, 1, "n2")], {}),
    "alone on its node": ([entry(0, None, "n1"), entry(1, None, "n2")], {0: (0, 1), 1: (0, 1)}),
    "one device shown to each": ([entry(0, None, "n1", 1), entry(1, None, "n1", 1)], {0: (0, 2), 1: (1, 2)}),
    "without devices": (
        [entry(0, None, "n1", 0), entry(1, None, "n2", 0), entry(2, None, "n1", 0)], {0: (0, 2), 1: (0, 1), 2: (1, 2)},
    ),
    "a device of its own": ([entry(0, 0, "n1", 1, visible=["0"]), entry(1, 0, "n1", 1, visible=["1"])], {}),
    "two agents of one host": ([entry(0, 0, "n1", node=["n1", "0"]), entry(1, 0, "n1", node=["n1", "1"])], {}),
    "one device, by the launcher's word": ([entry(0, 0, "n1", 1), entry(1, 1, "n1", 1)], {}),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "placed"), FITTING.values(), ids=FITTING)
def test_local_ranks_that_fit(entries: list[dict[str, Any]], placed: dict[int, tuple[int, int]]) -> None:
    told = judge(entries)
    assert told["placed"] == placed
    assert told["several"] == any(entry["host"] != entries[0]["host"] for entry in entries)
    assert told["elsewhere"] == ([f"10.0.0.{2}"] if told["several"] else [])


def test_many_names_are_cut_short() -> None:
    assert meeting._names([4]) == "rank 4"
    assert meeting._names(list(range(25))).endswith("18, 19 and 5 more")
