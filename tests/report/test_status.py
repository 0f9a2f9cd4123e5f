"""What a run is doing: from the words of its scheduler and its ledger to one state and one sentence."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program

from hpc_ds.cluster import process
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.report.follow import follow
from hpc_ds.report.history import lost_after
from hpc_ds.report.status import OVER, status_of
from hpc_ds.report.summary import losses, summary
from hpc_ds.run_dir import RunDir, append_line, write_json
from hpc_ds.supervise.ledger import Attempt, close_attempt, open_attempt

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run on site local, whose keeper is this process."""
    run = RunDir(tmp_path / "gpt-1")
    for folder in (run.root, run.local):
        folder.mkdir()
    write_json(run.config, {"name": "gpt"})
    write_json(run.site, {"name": "here", "scheduler": "local"})
    write_json(run.job, {"job_id": "local-1"})
    return run


def kept(run: RunDir, job: JobState, *, alive: bool = True) -> None:
    """The keeper says this of its job."""
    started = process.start_time(os.getpid())
    assert started is not None
    keeper = {"job_id": "local-1", "pid": os.getpid(), "started": started if alive else started + 1}
    write_json(run.local / "state.json", {**keeper, "job": asdict(job)})


def attempts(run: RunDir, *ends: dict[str, Any] | None) -> None:
    for number, end in enumerate(ends, start=1):
        open_attempt(run, "local-1", "vm", "vm")
        if end is not None:
            close_attempt(run, number, **end)


HELD = {"cause": "crashed", "action": "hold", "detail": "held: it crashed before its first step"}
QUEUED = {"cause": "preempted", "action": "requeue", "detail": "preempted: queued again"}
FINISHED = {"cause": "finished", "action": "finish", "detail": "all ranks finished"}
CANCELLED = {"cause": "cancelled", "action": "leave", "detail": "cancelled: nothing is requeued"}

# The scheduler's word (None: none; a JobState, and whether its keeper lives), the attempts -> state, words.
STATES: dict[str, tuple[tuple[JobState, bool] | None, list[dict[str, Any] | None], str, str]] = {
    "queued": ((JobState("PENDING", reason="Resources"), True), [], "waiting", "in the queue (Resources)"),
    "queued again": ((JobState("PENDING"), True), [QUEUED], "waiting", "in the queue"),
    "being configured": ((JobState("CONFIGURING"), True), [], "waiting", "in the queue"),
    "started": ((JobState("RUNNING", nodes="n[1-2]"), True), [], "running", "an attempt begins"),
    "started again": ((JobState("RUNNING", nodes="n[1-2]"), True), [QUEUED], "running", "an attempt begins"),
    "running": ((JobState("RUNNING", nodes="vm"), True), [QUEUED, None], "running", "attempt 2 on vm"),
    "holding still": ((JobState("COMPLETING"), True), [QUEUED], "ending", "preempted: queued again"),
    "ending": ((JobState("COMPLETING"), True), [None], "ending", "being ended by the scheduler"),
    "finished": ((JobState("COMPLETED"), False), [QUEUED, FINISHED], "finished", "finished in attempt 2"),
    "finished, still ending": ((JobState("RUNNING"), True), [FINISHED], "finished", "finished in attempt 1"),
    "finished, forgotten": (None, [FINISHED], "finished", "finished in attempt 1"),
    "held": ((JobState("SPECIAL_EXIT", held=True), False), [HELD], "held", "held: it crashed before its first step"),
    "held by a person": ((JobState("PENDING", held=True), True), [], "held", "held; `hpcds resume` releases it"),
    "held, forgotten": (None, [HELD], "held", "held: it crashed before its first step"),
    "cancelled": ((JobState("CANCELLED"), False), [CANCELLED], "cancelled", "`hpcds resume` continues it"),
    "cancelled before its supervisor could say so": ((JobState("CANCELLED"), False), [None], "cancelled", "cancelled"),
    "cancelled, forgotten": (None, [CANCELLED], "cancelled", "cancelled"),
    "never begun": ((JobState("FAILED"), False), [], "failed", "the job ended before its first attempt began"),
    "its keeper was killed": ((JobState("RUNNING"), False), [None], "failed", "its supervisor was killed"),
    "lost": (None, [None], "failed", "its supervisor was killed, and nothing started it again; `hpcds resume`"),
    "timed out": ((JobState("TIMEOUT"), False), [None], "failed", "`hpcds resume` continues it"),
}


@pytest.mark.parametrize(("word", "ends", "state", "words"), STATES.values(), ids=STATES)
def test_the_state_of_a_run(
    word: tuple[JobState, bool] | None, ends: list[dict[str, Any] | None], state: str, words: str, run: RunDir
) -> None:
    if word is not None:
        kept(run, word[0], alive=word[1])
    attempts(run, *ends)
    found = status_of(run)
    assert (found.state, found.name, found.site, found.job_id) == (state, "gpt", "here", "local-1")
    assert words in found.reason
    assert len(found.attempts) == len(ends)
    assert (state in OVER) == (state in {"finished", "held", "cancelled", "failed"})


def test_a_scheduler_that_does_not_answer_leaves_the_state_open(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(run.site, {"name": "slurm", "scheduler": "slurm"})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status_of(run).state == "unknown"
    fake_program(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = status_of(run)
    assert (found.state, found.state in OVER) == ("unknown", False)
    assert "Unable to contact slurm controller" in found.reason


def test_a_run_on_slurm_is_asked_for_there(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(run.site, {"name": "slurm", "scheduler": "slurm"})
    attempts(run, None)
    fake_program(tmp_path, "squeue", "echo 'local-1|1|RUNNING|7|N/A|2026-01-31T13:45:00|n[1-2]|None'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = status_of(run)
    assert found.reason == "attempt 1 on n[1-2]"
    assert (found.queue_state, found.queue_reason, found.nodes) == ("RUNNING", None, "n[1-2]")
    assert found.ends_at == time.mktime((2026, 1, 31, 13, 45, 0, 0, 0, -1))


def test_a_run_that_was_never_submitted_is_over(run: RunDir) -> None:
    run.job.unlink()
    assert (status_of(run).state, status_of(run).job_id) == ("failed", "")


def step(run: RunDir, attempt: int, number: int, loss: float = 1.0, **fields: Any) -> None:
    append_line(run.events, {"event": "step", "attempt": attempt, "step": number, "loss": loss, "lr": 0.1, **fields})


def test_the_last_step_and_the_last_save_are_told(run: RunDir) -> None:
    found = status_of(run)
    assert (found.step, found.loss, found.saved_step, found.steps_lost) == (None, None, None, 0)
    for number in (1, 2, 3):
        step(run, 1, number, loss=1 / number)
    append_line(run.events, {"event": "saved", "attempt": 1, "step": 2})
    attempts(run, {**QUEUED, "first_step": 1, "last_step": 3, "saved_step": 2}, None)
    step(run, 2, 3, loss=0.25)
    found = status_of(run)
    assert (found.step, found.loss, found.saved_step, found.steps_lost) == (3, 0.25, 2, 1)
    assert json.loads(json.dumps(found.as_data()))["step"] == 3


def taken(*attempts: range) -> list[dict[str, Any]]:
    return [
        {"event": "step", "attempt": number, "step": taken, "loss": 1.0}
        for number, steps in enumerate(attempts, start=1)
        for taken in steps
    ]


def ledger_of(*attempts: range) -> list[Attempt]:
    """What the supervisor writes of them."""
    return [
        Attempt(number, cause="crashed", first_step=min(steps, default=None), last_step=max(steps, default=None))
        for number, steps in enumerate(attempts, start=1)
    ]


# Steps of each attempt -> how many were taken again.
LOST = {
    "no step": ((), 0),
    "one attempt": ((range(1, 11),), 0),
    "saved at the last step": ((range(1, 11), range(11, 21)), 0),
    "two steps back": ((range(1, 11), range(9, 21)), 2),
    "from the beginning": ((range(1, 11), range(1, 21)), 10),
    "twice": ((range(1, 11), range(9, 16), range(14, 20)), 4),
    "an attempt without a step between": ((range(1, 11), range(0), range(9, 12)), 2),
    "an attempt that got less far": ((range(1, 11), range(6, 8), range(6, 12)), 7),
}


@pytest.mark.parametrize(("steps", "lost"), LOST.values(), ids=LOST)
def test_steps_lost_are_steps_taken_again(steps: tuple[range, ...], lost: int) -> None:
    events = taken(*steps)
    assert sum(lost_after(ledger_of(*steps))) == lost
    assert lost == len(events) - len({event["step"] for event in events})


def test_steps_are_lost_by_the_attempt_that_took_them() -> None:
    assert lost_after(ledger_of(range(1, 11), range(0), range(9, 12), range(11, 13))) == [2, 0, 1, 0]


def test_what_a_running_attempt_took_again_is_known_by_the_checkpoint_it_began_from() -> None:
    first = Attempt(1, cause="crashed", first_step=1, last_step=25, saved_step=20)
    assert lost_after([first]) == [0], "nothing was taken again yet"
    assert lost_after([first, Attempt(2)]) == [5, 0]
    assert lost_after([first, Attempt(2, cause="crashed", saved_step=20), Attempt(3)]) == [5, 0, 0]
    assert lost_after([first, Attempt(2, cause="finished", first_step=21, last_step=30)]) == [5, 0]


def test_of_a_step_taken_twice_the_last_loss_counts(run: RunDir) -> None:
    events = [
        *taken(range(1, 3)),
        {"event": "step", "attempt": 2, "step": 2, "loss": 0.5},
        {"event": "saved", "step": 2},
    ]
    assert losses(events) == {1: 1.0, 2: 0.5}


def test_the_summary_tells_the_story(run: RunDir) -> None:
    attempts(run, {**QUEUED, "first_step": 1, "last_step": 3}, {**FINISHED, "first_step": 4, "last_step": 6})
    for number in range(1, 7):
        step(run, 1 + number // 4, number, loss=7.0 - number)
    append_line(run.events, {"event": "resumed", "attempt": 2, "step": 3})
    story = summary(run)
    assert story.status == status_of(run)
    assert [(row[0], *row[2:]) for row in story.attempts] == [
        ("1", "1-3", "preempted", "preempted: queued again"),
        ("2", "4-6", "finished", "all ranks finished"),
    ]
    assert all(float(row[1]) >= 0 for row in story.attempts)
    assert story.totals == "6 steps, 0 lost, loss 6.000 -> 1.000"
    assert "restart" in story.curve[-1]


def test_an_attempt_that_runs_has_no_end_yet(run: RunDir) -> None:
    attempts(run, None)
    kept(run, JobState("RUNNING", nodes="vm"))
    assert summary(run).attempts == [("1", "", "none", "running", "")]


@pytest.mark.parametrize("word", [JobState("CANCELLED"), JobState("NODE_FAIL")], ids=lambda job: job.state)
def test_an_attempt_whose_supervisor_was_killed_is_not_said_to_run(word: JobState, run: RunDir) -> None:
    attempts(run, None)
    kept(run, word, alive=False)
    assert [row[3] for row in summary(run).attempts] != ["running"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_run_that_diverged_has_a_summary_too(loss: float, run: RunDir) -> None:
    attempts(run, FINISHED)
    for number, value in enumerate((3.0, 2.0, loss, loss), start=1):
        step(run, 1, number, loss=value)
    assert summary(run).totals == f"4 steps, 0 lost, loss 3.000 -> {loss:.3f}"


def test_a_run_without_a_step_has_a_summary_too(run: RunDir) -> None:
    attempts(run, HELD)
    assert (summary(run).totals, summary(run).curve) == ("", [])


def test_a_run_that_is_over_is_told_to_its_end(run: RunDir) -> None:
    attempts(run, {**QUEUED, "first_step": 1, "last_step": 3}, FINISHED)
    step(run, 1, 3, loss=2.5, time=2.0)
    append_line(run.events, {"event": "saved", "attempt": 1, "step": 3, "seconds": 0.5, "time": 3.0})
    append_line(run.events, {"event": "stopped", "attempt": 1, "step": 3, "told_by": "SIGTERM", "time": 4.0})
    append_line(run.events, {"event": "resumed", "attempt": 2, "step": 3, "time": 5.0})
    append_line(run.events, {"event": "diverged", "attempt": 2, "step": 4, "time": 6.0})
    lines = list(follow(run))
    assert lines[:5] == [
        "step      3   loss 2.5000   lr 1.00e-01",
        "saved step 3 in 0.5 s",
        "told to stop by SIGTERM: step 3 is safe",
        "resumed at step 3",
        "diverged at step 4",
    ]
    assert lines[5:] == [
        "attempt 1 begins on vm (job local-1)",
        "attempt 1 ended: preempted; preempted: queued again",
        "attempt 2 begins on vm (job local-1)",
        "attempt 2 ended: finished; all ranks finished",
    ]
