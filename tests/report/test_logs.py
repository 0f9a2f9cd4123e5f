"""What ranks wrote: of one or of all, whole lines or as it comes, and what is said where there is nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import FakeShell
from runs_on_disk import closed, made, opened

from hpc_ds.cluster.queue import Queue
from hpc_ds.errors import RunError
from hpc_ds.launch.runner import rank_log
from hpc_ds.report.logs import Wanted, read_logs, read_scheduler_log

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two attempts of two ranks, finished."""
    run = made(tmp_path)
    for number in (1, 2):
        opened(run, number, 1000.0 * number)
        closed(run, number, 1000.0 * number + 10, "preempted" if number == 1 else "finished", action="requeue")
        for rank in (0, 1):
            say(run, rank, number, f"one {rank} {number}\ntwo é\nthree")
    return run


def say(run: RunDir, rank: int, attempt: int, text: str) -> None:
    log = rank_log(run.attempt_logs(attempt), rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text)


def said(run: RunDir, wanted: Wanted) -> list[tuple[int | None, int | None, str]]:
    return [(one.attempt, one.rank, one.text) for one in read_logs(run, wanted)]


def test_a_log_is_the_text_of_one_rank_of_the_last_attempt(run: RunDir) -> None:
    assert said(run, Wanted()) == [(2, 0, "one 0 2\ntwo é\nthree")]
    assert said(run, Wanted(rank=1, attempt=1)) == [(1, 1, "one 1 1\ntwo é\nthree")]


def test_lines_come_one_by_one_and_the_last_without_its_end_too(run: RunDir) -> None:
    assert said(run, Wanted(lines=True)) == [(2, 0, "one 0 2"), (2, 0, "two é"), (2, 0, "three")]
    every = said(run, Wanted(rank=None, attempt=1, lines=True))
    assert [(rank, text) for _, rank, text in every if text.startswith("one")] == [(0, "one 0 1"), (1, "one 1 1")]
    assert len(every) == 6


def test_a_finished_run_can_be_followed_from_an_attempt(run: RunDir) -> None:
    assert said(run, Wanted(follow=True, attempt=1)) == [(1, 0, "one 0 1\ntwo é\nthree")]


def test_following_goes_on_in_the_next_attempt_until_the_end(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    say(run, 0, 1, "begun, é"[:-1])
    running = "25|25|RUNNING|7|N/A|N/A|n1|None\n"
    found = []
    for one in read_logs(run, Wanted(follow=True), Queue(FakeShell({"squeue": running}))):
        found.append((one.attempt, one.text))
        if len(found) == 1:
            say(run, 0, 1, "é and ended\n")
            closed(run, 1, 1010.0, "preempted", action="requeue")
            opened(run, 2, 1020.0)
        elif len(found) == 2:
            say(run, 0, 2, "again\n")
            closed(run, 2, 1030.0, "finished")
    assert found == [(1, "begun, "), (1, "é and ended\n"), (2, "again\n")]


def test_what_is_there_instead_is_named(run: RunDir, tmp_path: Path) -> None:
    for wanted, words in (
        (Wanted(rank=7), "log of rank 7 in attempt 2 of run .* not there; there are those of ranks 0 to 1"),
        (Wanted(attempt=9), "in attempt 9 of run .* not there; there are attempts 1 to 2"),
    ):
        with pytest.raises(RunError, match=words):
            said(run, wanted)
    fresh = made(tmp_path, "gpt-2")
    with pytest.raises(RunError, match="not there; no attempt has begun; look at `hpcds status`"):
        said(fresh, Wanted())
    with pytest.raises(RunError, match="no such file yet; the job has not started"):
        list(read_scheduler_log(fresh, Wanted()))
    opened(fresh, 1, 1000.0)
    with pytest.raises(
        RunError, match=r"log of any rank in attempt 1 .* no rank has written anything; look at --scheduler"
    ):
        said(fresh, Wanted(rank=None))


def test_the_scheduler_s_log_is_of_all_attempts(run: RunDir) -> None:
    run.scheduler_log.write_text("attempt 1\nattempt 2\n")
    assert [one.text for one in read_scheduler_log(run, Wanted())] == ["attempt 1\nattempt 2\n"]
    assert [one.text for one in read_scheduler_log(run, Wanted(lines=True, follow=True))] == ["attempt 1", "attempt 2"]
