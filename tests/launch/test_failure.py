"""Of many dying ranks, the first: what launchers report, and what ranks wrote, in every order that happens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hpc_ds.launch.failure import Failure, TaskEnd, first_failure, in_words, only_victims
from hpc_ds.launch.runner import rank_log

if TYPE_CHECKING:
    from pathlib import Path

PEER = "RuntimeError", "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
TIMEOUT = "DistBackendError", "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5) ran for 600000 ms"
BUG = "ValueError", "no such column 'x'"


class Attempt:
    """The folder of an attempt."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder
        self.raised = folder / "failures"
        self.raised.mkdir()
        self.ends: list[TaskEnd] = []

    def end(self, rank: int, exit_code: int, at: float) -> None:
        self.ends.append(TaskEnd(rank, f"n{rank}", exit_code, at))

    def raise_(self, rank: int, what: tuple[str, str], at: float) -> None:
        kind, message = what
        data = {"rank": rank, "host": f"n{rank}", "time": at, "type": kind, "message": message}
        data["traceback"] = ["Traceback (most recent call last):", f"{kind}: {message}"]
        (self.raised / f"rank-{rank}.json").write_text(json.dumps(data))

    def first(self) -> Failure | None:
        return first_failure(self.ends, self.raised, self.logs)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


def test_nobody_failed(attempt: Attempt) -> None:
    assert attempt.first() is None


def test_the_one_that_raised_first_though_it_ended_last(attempt: Attempt) -> None:
    attempt.raise_(1, BUG, at=10.0)
    attempt.raise_(0, PEER, at=10.1)
    attempt.end(0, 1, at=11.0)
    attempt.end(1, 1, at=12.0)
    first = attempt.first()
    assert first is not None
    assert (first.rank, first.host, first.traceback[-1]) == (1, "n1", "ValueError: no such column 'x'")
    assert first.in_a_sentence() == "rank 1 on n1: exit code 1, ValueError: no such column 'x'"


def test_a_bug_counts_before_a_lost_neighbour_that_was_told_of_earlier(attempt: Attempt) -> None:
    """Clocks of machines differ by more than connections take to break."""
    attempt.raise_(0, PEER, at=9.9)
    attempt.raise_(1, BUG, at=10.0)
    attempt.end(0, 1, at=11.0)
    attempt.end(1, 1, at=11.0)
    first = attempt.first()
    assert first is not None
    assert first.rank == 1


def test_a_killed_rank_counts_before_those_that_lost_it(attempt: Attempt) -> None:
    attempt.raise_(0, PEER, at=10.0)
    attempt.end(0, 1, at=11.0)
    attempt.end(1, 137, at=11.1)
    first = attempt.first()
    assert first is not None
    assert (first.rank, first.exit_code, first.how) == (1, 137, "killed by SIGKILL (out of memory?)")


def test_a_rank_that_raised_counts_before_one_that_was_killed_later(attempt: Attempt) -> None:
    attempt.raise_(2, BUG, at=10.0)
    attempt.end(0, 139, at=20.0)
    attempt.end(2, 1, at=20.0)
    first = attempt.first()
    assert first is not None
    assert first.rank == 2


def test_an_abort_of_a_library_is_no_cause_while_anybody_raised(attempt: Attempt) -> None:
    attempt.raise_(1, TIMEOUT, at=30.0)
    attempt.end(0, 134, at=10.0)
    attempt.end(1, 1, at=31.0)
    first = attempt.first()
    assert first is not None
    assert first.rank == 1


def test_where_all_are_victims_the_earliest_counts(attempt: Attempt) -> None:
    attempt.raise_(3, PEER, at=10.0)
    attempt.raise_(0, PEER, at=10.5)
    attempt.end(0, 1, at=11.0)
    attempt.end(3, 1, at=11.0)
    first = attempt.first()
    assert first is not None
    assert first.rank == 3


def test_without_words_of_the_ranks_the_launcher_s_order_counts(attempt: Attempt) -> None:
    log = "before\nTraceback (most recent call last):\n  File x\nKeyError: 3\n"
    rank_log(attempt.logs, 4).write_text(log)
    attempt.end(4, 1, at=5.0)
    attempt.end(2, 1, at=5.0)
    first = attempt.first()
    assert first is not None
    assert (first.rank, first.last_lines[0]) == (4, "before")
    assert first.traceback == ["Traceback (most recent call last):", "  File x", "KeyError: 3"]


@pytest.mark.parametrize(
    "what",
    [("MemoryError", ""), ("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"),
     ("RuntimeError", "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: Cannot allocate memory")],
)  # fmt: skip
def test_memory_that_ran_out_is_said(what: tuple[str, str], attempt: Attempt) -> None:
    attempt.raise_(1, what, at=1.0)
    attempt.end(1, 1, at=2.0)
    first = attempt.first()
    assert first is not None
    assert first.how == "exit code 1 (out of memory)"


def test_a_file_that_is_no_record_is_passed_over(attempt: Attempt) -> None:
    (attempt.raised / "rank-0.json").write_text("{")
    (attempt.raised / "rank-1.json").write_text("[]")
    attempt.end(1, 3, at=1.0)
    first = attempt.first()
    assert first is not None
    assert (first.rank, first.exit_code) == (1, 3)


def test_victims_only(attempt: Attempt) -> None:
    attempt.end(0, 1, at=1.0)
    assert not only_victims(attempt.ends, attempt.raised), "it has not said why"
    attempt.raise_(0, PEER, at=0.9)
    assert only_victims(attempt.ends, attempt.raised)
    attempt.end(1, 134, at=1.0)
    assert only_victims(attempt.ends, attempt.raised), "a library aborts when its peer is gone"
    attempt.end(2, 137, at=1.0)
    assert not only_victims(attempt.ends, attempt.raised)


def test_exit_codes_in_words() -> None:
    assert in_words(3) == "exit code 3"
    assert in_words(139) == "killed by SIGSEGV"
    assert in_words(137) == "killed by SIGKILL (out of memory?)"
    assert in_words(255) == "exit code 255"
