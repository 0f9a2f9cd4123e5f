"""Many runs, few questions: what is asked of Slurm when, by a clock that the test moves."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from fakes import FakeShell, refusal

from hpc_ds.cluster import process
from hpc_ds.cluster.queue import Queue
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.errors import CommandError, SchedulerError
from hpc_ds.run_dir import RunDir, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from fakes import Answer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(folder: Path, job_id: str, scheduler: str = "slurm") -> RunDir:
    run = RunDir(folder / f"run-{job_id}")
    run.local.mkdir(parents=True)
    write_json(run.config, {"name": "gpt"})
    write_json(run.site, {"name": scheduler, "scheduler": scheduler})
    write_json(run.job, {"job_id": job_id} if job_id else {})
    return run


def line(job_id: int, state: str = "RUNNING") -> str:
    return f"{job_id}|{job_id}|{state}|7|N/A|N/A|n1|None\n"


def asked(shell: FakeShell, program: str = "squeue") -> list[list[str]]:
    return [command for command in shell.commands if command[0] == program]


def queue_of(*answers: Answer, **others: Answer) -> tuple[Queue, FakeShell, Clock]:
    shell, clock = FakeShell({"squeue": list(answers), **others}), Clock()
    return Queue(shell, clock), shell, clock


def test_all_jobs_are_asked_for_by_one_squeue(tmp_path: Path) -> None:
    queue, shell, _ = queue_of(line(1) + line(3, "PENDING"))
    runs = [made(tmp_path, name) for name in ("1", "2", "3", "")]
    found = queue.answers(runs)
    assert [one.state if isinstance(one, JobState) else one for one in found] == ["RUNNING", None, "PENDING", None]
    (command,) = asked(shell)
    assert command[command.index("-j") + 1] == "1,2,3"


def test_within_ten_seconds_the_last_answer_stands(tmp_path: Path) -> None:
    queue, shell, clock = queue_of(line(1), line(1, "COMPLETING"))
    run = made(tmp_path, "1")
    for _ in range(100):
        queue.answers([run])
        clock.now += 0.0999
    assert len(asked(shell)) == 1
    clock.now += 0.02
    (found,) = queue.answers([run])
    assert isinstance(found, JobState)
    assert found.state == "COMPLETING"
    assert len(asked(shell)) == 2


def times_asked(queue: Queue, shell: FakeShell, clock: Clock, run: RunDir, seconds: int) -> list[float]:
    times, begin = [], clock.now
    while clock.now < begin + seconds:
        before = len(asked(shell))
        queue.answers([run])
        if len(asked(shell)) > before:
            times.append(clock.now - begin)
        clock.now += 0.5
    return times


def test_while_nothing_changes_the_pause_grows_to_half_a_minute(tmp_path: Path) -> None:
    queue, shell, clock = queue_of(line(1))
    times = times_asked(queue, shell, clock, made(tmp_path, "1"), 200)
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses[0] == 10
    assert pauses == sorted(pauses)
    assert pauses[-3:] == [30, 30, 30]


def test_a_change_and_news_bring_the_pause_back(tmp_path: Path) -> None:
    queue, shell, clock = queue_of(*[line(1)] * 8, line(1, "COMPLETING"))
    run = made(tmp_path, "1")
    times = times_asked(queue, shell, clock, run, 400)
    assert 10 in [after - before for before, after in pairwise(times[8:])]
    queue.expect_news()
    before = len(asked(shell))
    queue.answers([run])
    clock.now += 10
    queue.answers([run])
    assert len(asked(shell)) - before in {1, 2}


DOWN = refusal("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
NO_PROGRAM = CommandError(["squeue"], None, "", "squeue: no such program on PATH; is this a machine of the cluster?")


@pytest.mark.parametrize("trouble", [DOWN, NO_PROGRAM, "welcome\n"], ids=["down", "missing", "junk"])
def test_a_silent_scheduler_is_asked_less_and_its_words_are_kept(trouble: Answer, tmp_path: Path) -> None:
    queue, shell, clock = queue_of(trouble)
    run = made(tmp_path, "1")
    times = times_asked(queue, shell, clock, run, 120)
    assert all(after - before >= 10 for before, after in pairwise(times))
    assert times[-1] - times[-2] == 30
    (found,) = queue.answers([run])
    assert isinstance(found, SchedulerError)


def test_a_scheduler_that_is_back_is_believed(tmp_path: Path) -> None:
    queue, _, clock = queue_of(DOWN, line(1))
    run = made(tmp_path, "1")
    assert isinstance(queue.answers([run])[0], SchedulerError)
    clock.now += 31
    assert isinstance(queue.answers([run])[0], JobState)


def test_a_job_that_joins_between_two_questions_is_not_said_to_be_gone(tmp_path: Path) -> None:
    queue, shell, clock = queue_of(line(1), line(1) + line(2))
    first, second = made(tmp_path, "1"), made(tmp_path, "2")
    queue.answers([first])
    assert isinstance(queue.answers([first, second])[1], SchedulerError)
    clock.now += 31
    assert isinstance(queue.answers([first, second])[1], JobState)
    assert len(asked(shell)) == 2


def test_a_run_on_this_machine_is_read_whenever_it_is_asked_for(tmp_path: Path) -> None:
    queue, shell, _ = queue_of(line(1))
    run = made(tmp_path, "local-1", "local")
    keeper = {"job_id": "local-1", "pid": os.getpid(), "started": process.start_time(os.getpid())}
    for state in ("RUNNING", "COMPLETING"):
        write_json(run.local / "state.json", {**keeper, "job": asdict(JobState(state))})
        (found,) = queue.answers([run])
        assert isinstance(found, JobState)
        assert found.state == state
    assert shell.commands == []


def test_the_accounts_are_asked_once_for_each_job(tmp_path: Path) -> None:
    shell = FakeShell({"sacct": "1|NODE_FAIL|60|2026-01-31T13:45:00|n1\n2|RUNNING|60|2026-01-31T13:45:00|n1\n"})
    queue = Queue(shell, Clock())
    for _ in range(3):
        assert {job_id: state.state for job_id, state in queue.last_words(["1", "2", "3"]).items()} == {
            "1": "NODE_FAIL"
        }
    (command,) = asked(shell, "sacct")
    assert command[command.index("-j") + 1] == "1,2,3"
    queue.last_words(["4"])
    assert len(asked(shell, "sacct")) == 2


def test_without_accounting_nothing_is_known(tmp_path: Path) -> None:
    shell = FakeShell({"sacct": refusal("Slurm accounting storage is disabled")})
    assert Queue(shell, Clock()).last_words(["1"]) == {}
