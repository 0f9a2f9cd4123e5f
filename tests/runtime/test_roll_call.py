"""The roll call before collective methods: who does not come, or comes for something else, is named."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist
from ranks import Outcomes, run_cases
from small import said

from hpc_ds.runtime import roll_call as module
from hpc_ds.runtime.roll_call import roll_call

pytestmark = pytest.mark.ranks

SHORT = timedelta(seconds=1)


def all_come(rank: int) -> list[str]:
    return [said(lambda what=what: roll_call(what)) for what in ("save", "load", "save")]


def some_stay_away(rank: int) -> str:
    if rank != 0:
        next(module._calls)  # the next call is everybody's again
        return "stayed away"
    return said(lambda: roll_call("save", SHORT))


def another_name(rank: int) -> str:
    words = said(lambda: roll_call("save" if rank == 0 else "load"))
    next(module._calls)
    return words


def nothing_piles_up(rank: int) -> int:
    """Keys in the store that calls leave behind: those of the last one."""
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    for _ in range(20):
        roll_call("save")
    dist.barrier()
    return int(store.num_keys()) - before


@pytest.fixture(scope="module")
def three() -> Outcomes:
    functions = (all_come, nothing_piles_up, some_stay_away, another_name)
    return run_cases(3, {function.__name__: (function, ()) for function in functions})


def test_nothing_is_said_when_all_come(three: Outcomes) -> None:
    assert three["all_come"] == [["no error, but None"] * 3] * 3


def test_the_absent_are_named(three: Outcomes) -> None:
    first, *others = three["some_stay_away"]
    assert others == ["stayed away"] * 2
    assert first == (
        "RankError: save: ranks 1, 2 did not call it within 1 s; it is collective: call it on every rank, never under "
        "`if rank == 0`"
    )


def test_those_that_came_for_something_else_are_named(three: Outcomes) -> None:
    first, *others = three["another_name"]
    assert first == "RankError: save: ranks 1, 2 called load instead; call the same on every rank"
    assert others == ["RankError: load: rank 0 called save instead; call the same on every rank"] * 2


def test_the_store_does_not_grow(three: Outcomes) -> None:
    assert max(three["nothing_piles_up"]) < 20
