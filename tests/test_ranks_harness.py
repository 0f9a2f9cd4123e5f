"""The harness of the ranks tests: what it hands back, and what it shows when a rank fails, hangs or dies."""

from __future__ import annotations

import os
import signal
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import run_cases, run_ranks

pytestmark = pytest.mark.ranks


def who(rank: int, offset: int) -> tuple[int, int, str | None, int]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ.get("HPCDS_RUN_DIR"), torch.get_num_threads()


def fail_on(rank: int, which: int) -> None:
    if rank == which:
        raise LookupError("a message of mine")
    dist.barrier()


def hang(rank: int) -> None:
    while rank == 1:
        time.sleep(0.1)


def die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def fail_everywhere(rank: int) -> None:
    raise SystemExit(f"rank {rank}")


def test_values_come_back_by_rank_from_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDS_RUN_DIR", "/nowhere")
    assert run_ranks(who, 2, 10) == [(0, 21, None, 1), (1, 21, None, 1)]


def test_a_failing_rank_is_shown_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:\n(.|\n)*in fail_on(.|\n)*LookupError: a message of mine"):
        run_ranks(fail_on, 2, 1)


def test_a_hanging_rank_is_shown_with_its_stack() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 ended with exit code 1 and told nothing\n(.|\n)* in hang"):
        run_ranks(hang, 2, timeout_s=2.0)


def test_a_rank_that_dies_is_shown() -> None:
    with pytest.raises(AssertionError, match="rank 1 ended with exit code -9 and told nothing"):
        run_ranks(die, 2)


def test_each_case_has_its_own_outcome() -> None:
    cases = {"first": (who, (0,)), "second": (fail_everywhere, ()), "third": (who, (1,)), "fourth": (fail_on, (0,))}
    outcomes = run_cases(2, {**cases, "fifth": (who, (2,))}, timeout_s=30.0)
    assert [value[1] for value in outcomes["first"]] == [1, 1]
    assert [value[1] for value in outcomes["third"]] == [3, 3]
    with pytest.raises(
        AssertionError, match=r"rank 0, case 'second':(.|\n)*SystemExit: rank 0(.|\n)*SystemExit: rank 1"
    ):
        _ = outcomes["second"]
    with pytest.raises(AssertionError, match=r"rank 0, case 'fourth':(.|\n)*a message of mine"):
        _ = outcomes["fourth"]
    with pytest.raises(AssertionError, match="not run: an earlier case left the ranks apart"):
        _ = outcomes["fifth"]


def test_two_worlds_share_the_cases_and_do_not_disturb_each_other() -> None:
    cases = {"first": (fail_on, (0,)), "second": (who, (2,)), "third": (who, (3,)), "fourth": (who, (4,))}
    outcomes = run_cases(2, cases, timeout_s=30.0, worlds=2)
    assert [outcomes[name] for name in ("second", "fourth")] == [
        [(0, 5, None, 1), (1, 5, None, 1)],
        [(0, 9, None, 1), (1, 9, None, 1)],
    ]
    with pytest.raises(AssertionError, match=r"rank 0, case 'first':(.|\n)*a message of mine"):
        _ = outcomes["first"]
    with pytest.raises(AssertionError, match="not run: an earlier case left the ranks apart"):
        _ = outcomes["third"]
    with pytest.raises(AssertionError, match=r"rank 1 failed:\n(.|\n)*a message of mine"):
        ranks._run_worlds(2, [(who, (1,)), (fail_on, (1,))], 30.0)
