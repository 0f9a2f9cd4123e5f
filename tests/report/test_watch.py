"""Many runs watched for long, by a clock that the test moves: what is asked, what is told, and when it ends."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fakes import FakeShell, refusal
from runs_on_disk import closed, made, opened, steps

from hpc_ds.cluster.queue import Queue
from hpc_ds.report.watch import News, watch

if TYPE_CHECKING:
    from hpc_ds.cluster.shell import Completed
    from hpc_ds.run_dir import RunDir

MANY = 50


class Time:
    """A clock that sleeping moves, and what Slurm says at each moment."""

    def __init__(self, shell: FakeShell) -> None:
        self.now = 1000.0
        self.shell = shell
        self.asked_at: list[float] = []
        self.queue = Queue(self.run, lambda: self.now)

    def run(self, command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
        if command[0] == "squeue":
            self.asked_at.append(self.now)
        return self.shell(command, timeout_s=timeout_s, check=check)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pauses(self) -> list[float]:
        return [after - before for before, after in pairwise(self.asked_at)]


def running(*job_ids: int) -> str:
    return "".join(f"{job_id}|{job_id}|RUNNING|7|N/A|N/A|n1|None\n" for job_id in job_ids)


def test_fifty_runs_are_watched_with_one_squeue_in_ten_seconds_at_most(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"gpt-{job_id}", str(job_id)) for job_id in range(MANY)]
    for run in runs:
        opened(run, 1, 1000.0)
    time = Time(FakeShell({"squeue": running(*range(MANY))}))
    looks = 0
    for found in watch(runs, time.queue, time.sleep):
        looks += 1
        assert {one.state for one in found} == {"running" if time.now < 1600 else "finished"}
        if time.now > 1590:
            for run in runs:
                closed(run, 1, 1600.0, "finished", action="finish")
            time.now = 1600.0
    assert looks > 50
    assert min(time.pauses()) >= 10
    assert max(time.pauses()) <= 30 + 7.0, "it looks every seven seconds"
    assert 15 <= len(time.asked_at) <= 60


def test_while_slurm_does_not_answer_the_watch_goes_on(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    down = refusal("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    time = Time(
        FakeShell({"squeue": [running(25), down, down, running(25), refusal("Invalid job id specified")], "sacct": ""})
    )
    states = [found[0].state for found in watch([run], time.queue, time.sleep)]
    assert list(dict.fromkeys(states)) == ["running", "unknown", "failed"]
    assert states[-1] == "failed"
    assert min(time.pauses()) >= 10


def test_what_the_accounts_know_of_a_forgotten_job_is_told(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    time = Time(FakeShell({"squeue": "", "sacct": "25|NODE_FAIL|60|2026-01-31T13:45:00|n1\n"}))
    ((found,),) = watch([run], time.queue, time.sleep)
    assert found.state == "failed"
    assert found.reason.startswith("its supervisor was killed (NODE_FAIL), and nothing started it again")
    assert found.queue_state == "NODE_FAIL"


def test_an_ended_attempt_is_a_reason_to_ask_again_soon(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    pending = "25|25|PENDING|7|N/A|N/A||BeginTime\n"
    time = Time(FakeShell({"squeue": [*[running(25)] * 5, pending]}))
    for (found,) in watch([run], time.queue, time.sleep):
        if len(time.asked_at) == 5 and len(found.attempts) == 1 and found.attempts[0].cause is None:
            closed(run, 1, time.now, "preempted", action="requeue")
        if found.state == "waiting":
            break
    assert 10 <= time.pauses()[-1] < 15, "not the half minute that it was before"


def test_what_is_new_is_told_once_and_steps_now_and_then(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    time = Time(FakeShell({"squeue": running(25)}))
    news, told = News(lambda: time.now), []
    for number, found in enumerate(watch([run], time.queue, time.sleep), start=1):
        steps(run, 1, 1000.0 + number, range(number, number + 1), 1.0)
        told += [(time.now, one.state, one.step) for one in news.of(found)]
        if number == 50:
            closed(run, 1, time.now, "finished", action="finish")
    assert [state for _, state, _ in told] == ["running"] * (len(told) - 1) + ["finished"]
    times = [at for at, _, _ in told]
    assert all(after - before >= 30 for before, after in pairwise(times[:-1]))
    assert 3 <= len(told) <= 6


def test_a_run_made_while_a_folder_is_watched_is_taken_up(tmp_path: Path) -> None:
    closed(opened_run(tmp_path, "old", "1"), 1, 900.0, "finished", action="finish")
    first = opened_run(tmp_path, "gpt", "2")
    time = Time(FakeShell({"squeue": running(2, 3)}))
    seen: list[list[str]] = []
    for found in watch([first], time.queue, time.sleep, folder=tmp_path):
        seen.append([Path(one.run_dir).name for one in found])
        if len(seen) == 1:
            closed(opened_run(tmp_path, "new", "3"), 1, 1010.0, "finished", action="finish")
            closed(first, 1, 1020.0, "finished", action="finish")
    assert seen == [["gpt"], ["gpt", "new"]]


def opened_run(folder: Path, name: str, job_id: str) -> RunDir:
    run = made(folder, name, job_id)
    opened(run, 1, 800.0)
    return run
