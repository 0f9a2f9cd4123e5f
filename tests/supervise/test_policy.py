"""Every row of the two tables: why an attempt ended, and what follows from it."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from hpc_ds.cluster.scheduler import JobState
from hpc_ds.config.job import Restart
from hpc_ds.supervise.ledger import Attempt
from hpc_ds.supervise.policy import Ended, action_after, cause_of, excluded_nodes

NOW = 1_000_000.0
FAR = NOW + 3600


def ended(exit_code: int, job: JobState | None, **known: Any) -> Ended:
    usual = {"restarts_before": 0, "terminated": False, "due_to": None}
    return Ended(exit_code=exit_code, job=job, **{**usual, **known})


RUNNING = JobState("RUNNING", end_time=FAR)
AGAIN = JobState("COMPLETING", restarts=1)

# What is known -> the cause.
CAUSES: dict[str, tuple[Ended, str]] = {
    "exit 0": (ended(0, RUNNING), "finished"),
    "exit 0 though preempted meanwhile": (ended(0, JobState("RUNNING", preempting=True)), "finished"),
    "exit 0 at the limit": (ended(0, JobState("COMPLETING", reason="TimeLimit"), terminated=True), "finished"),
    "exit 0, no word": (ended(0, None, terminated=True), "finished"),
    "saved in the grace of a preemption": (ended(75, JobState("RUNNING", preempting=True)), "preempted"),
    "failed in the grace of a preemption": (ended(1, JobState("RUNNING", preempting=True)), "preempted"),
    "killed after the grace": (ended(137, JobState("COMPLETING", preempting=True), terminated=True), "preempted"),
    "preempted without grace": (ended(75, JobState("COMPLETING", restarts=1), terminated=True), "requeued"),
    "requeued by an admin": (ended(143, JobState("COMPLETING", restarts=3), restarts_before=2), "requeued"),
    "requeued and pending": (ended(143, JobState("PENDING", restarts=1)), "requeued"),
    "preempted without grace, in srun's words": (ended(137, AGAIN, due_to="PREEMPTION"), "preempted"),
    "a lost node, in srun's words": (ended(137, AGAIN, due_to="NODE FAILURE"), "node_failure"),
    "words that say nothing of a cause": (ended(137, AGAIN, due_to="JOB REQUEUE"), "requeued"),
    "a lost node, in srun's words only": (ended(137, RUNNING, due_to="NODE FAILURE"), "node_failure"),
    "preempted where nothing is queued again, in srun's words": (
        ended(143, JobState("COMPLETING"), due_to="PREEMPTION", terminated=True),
        "preempted",
    ),
    "preempted, no word but srun's": (ended(143, None, due_to="PREEMPTION", terminated=True), "preempted"),
    "a time limit, no word but srun's": (ended(143, None, due_to="TIME LIMIT", terminated=True), "walltime"),
    "a time limit, in srun's words": (
        ended(143, JobState("COMPLETING", reason="TimeLimit"), due_to="TIME LIMIT", terminated=True),
        "walltime",
    ),
    "restarts of before do not count": (ended(1, JobState("RUNNING", restarts=2), restarts_before=2), "crashed"),
    "time limit, word of the reason": (ended(143, JobState("COMPLETING", reason="TimeLimit")), "walltime"),
    "time limit, word of the state": (ended(143, JobState("TIMEOUT")), "walltime"),
    "saved near the limit": (ended(75, RUNNING, near_limit=True), "walltime"),
    "saved long before the limit": (ended(75, RUNNING), "stopped"),
    "saved near the limit, no word": (ended(75, None, near_limit=True), "walltime"),
    "not saved when the job was about to be killed": (ended(137, RUNNING, near_limit=True, overdue=True), "walltime"),
    "stood still": (ended(137, RUNNING, hung=True), "hang"),
    "stood still while the scheduler ended it": (ended(137, JobState("COMPLETING"), hung=True), "hang"),
    "saved without a limit": (ended(75, JobState("RUNNING")), "stopped"),
    "saved, no word": (ended(75, None), "stopped"),
    "saved, no word, told to end": (ended(75, None, terminated=True), "stopped"),
    "crashed near the limit": (ended(1, RUNNING, near_limit=True), "crashed"),
    "scancel": (ended(143, JobState("COMPLETING", end_time=NOW), terminated=True), "cancelled"),
    "scancel, saved in time": (ended(75, JobState("COMPLETING", end_time=NOW), terminated=True), "cancelled"),
    "scancel, over": (ended(143, JobState("CANCELLED")), "cancelled"),
    "told to end, no word": (ended(143, None, terminated=True), "cancelled"),
    "node failure": (ended(137, JobState("NODE_FAIL"), terminated=True), "node_failure"),
    "exit 1": (ended(1, RUNNING), "crashed"),
    "killed": (ended(137, RUNNING), "crashed"),
    "exit 1, no word": (ended(1, None), "crashed"),
    "exit 1, no word of its end": (ended(1, JobState("RUNNING")), "crashed"),
    "still being configured": (ended(1, JobState("CONFIGURING", end_time=FAR)), "crashed"),
}


@pytest.mark.parametrize(("known", "cause"), CAUSES.values(), ids=CAUSES)
def test_why_an_attempt_ended(known: Ended, cause: str) -> None:
    assert cause_of(known) == cause


def test_a_program_that_does_not_know_us_may_end_with_0_because_it_was_told_to() -> None:
    told = JobState("RUNNING", preempting=True)
    assert cause_of(ended(0, told, joined=False)) == "preempted"
    assert cause_of(ended(0, JobState("COMPLETING", reason="TimeLimit"), joined=False)) == "walltime"
    assert cause_of(ended(0, RUNNING, joined=False)) == "finished"


def test_the_signal_of_the_job_asks_to_stop_and_no_other() -> None:
    assert cause_of(ended(128 + signal.SIGHUP, RUNNING, warning=signal.SIGHUP)) == "stopped"
    assert cause_of(ended(128 + signal.SIGHUP, RUNNING)) == "crashed"


def test_a_lost_node_is_no_hang() -> None:
    assert cause_of(ended(143, RUNNING, hung=True, due_to="NODE FAILURE")) == "node_failure"


def test_a_program_without_steps_is_held_after_a_crash_in_other_words() -> None:
    before = [Attempt(1, cause="walltime", action="requeue")]
    action, why = action_after("crashed", None, before, PLAIN, joined=False)
    assert (action, why) == ("hold", "held: it crashed before its first step (it has told of none), and would again")


def test_nodes_that_failed_twice_are_left_out_the_newest_of_them() -> None:
    blamed = [Attempt(1, node=node) for node in ("n1", "n2", "n2", "", "n3", "n1", "n3", "n4")]
    assert excluded_nodes(blamed, 3) == ["n2", "n1", "n3"]
    assert excluded_nodes(blamed, 2) == ["n1", "n3"]
    assert excluded_nodes(blamed, 0) == []


def crash(last_step: int | None, number: int = 1) -> Attempt:
    return Attempt(number, cause="crashed", action="requeue", last_step=last_step)


def past(cause: str, action: str = "requeue") -> Attempt:
    return Attempt(1, cause=cause, action=action, last_step=5)


def vain() -> Attempt:
    return Attempt(1, cause="stopped", action="requeue")


PLAIN = Restart()

# Cause, last step, what came before, limits -> what follows, and words of it.
ACTIONS: dict[str, tuple[str, int | None, list[Attempt], Restart, str, str]] = {
    "finished": ("finished", 10, [], PLAIN, "finish", "all ranks finished"),
    "finished after many crashes": ("finished", 10, [crash(step) for step in range(9)], PLAIN, "finish", "finished"),
    "cancelled": ("cancelled", 10, [], PLAIN, "leave", "cancelled: nothing is requeued"),
    "preempted": ("preempted", 10, [], PLAIN, "requeue", "preempted: queued again"),
    "preempted before a step": ("preempted", None, [], PLAIN, "requeue", "preempted: queued again"),
    "walltime": ("walltime", 10, [], PLAIN, "requeue", "walltime: queued again"),
    "stopped": ("stopped", 10, [], PLAIN, "requeue", "stopped: queued again"),
    "preempted a hundred times": ("preempted", 10, [past("preempted")] * 100, PLAIN, "requeue", "queued again"),
    "preempted after crashes": ("preempted", 10, [crash(step) for step in range(9)], PLAIN, "requeue", "queued again"),
    "restarts used up": (
        "walltime",
        10,
        [past("preempted"), past("requeued", "leave"), past("lost", "leave")],
        Restart(max_restarts=3),
        "hold",
        "held: it was started again 3 times, and restart.max_restarts is 3",
    ),
    "one restart left": ("walltime", 10, [past("preempted")], Restart(max_restarts=2), "requeue", "queued again"),
    "stopped again and again": ("stopped", 10, [past("stopped")] * 9, PLAIN, "requeue", "stopped: queued again"),
    "stopped at the same step again and again": (
        "walltime",
        5,
        [past("walltime"), past("walltime"), past("stopped")],
        PLAIN,
        "hold",
        "stopped 3 times in a row without getting beyond step 5; does a save take longer than restart.lead?",
    ),
    "stopped at the same step twice": (
        "walltime",
        5,
        [past("walltime"), past("walltime")],
        PLAIN,
        "requeue",
        "queued again",
    ),
    "crashed before a step, after attempts that got on": (
        "crashed",
        None,
        [past("walltime"), past("preempted")],
        PLAIN,
        "requeue",
        "after attempts that got on",
    ),
    "hung after progress": ("hang", 30, [crash(10)], PLAIN, "requeue", "hung after progress to step 30: queued again"),
    "hung where it crashed": (
        "hang",
        10,
        [crash(10)],
        PLAIN,
        "hold",
        "it hung at step 10, no further than the crash before (step 10)",
    ),
    "one hang too many": (
        "hang",
        30,
        [crash(10)],
        Restart(max_hangs=0),
        "hold",
        "hang number 1, and restart.max_hangs is 0",
    ),
    "stopped twice without a step": ("stopped", None, [vain()], PLAIN, "requeue", "stopped: queued again"),
    "stopped three times without a step": (
        "stopped",
        None,
        [vain(), vain()],
        PLAIN,
        "hold",
        "held: it was started 3 times in a row without taking a step",
    ),
    "stopped without a step, but not each time": (
        "stopped",
        None,
        [vain(), past("stopped"), vain()],
        PLAIN,
        "requeue",
        "queued again",
    ),
    "stopped without a step, and preempted between": (
        "stopped",
        None,
        [vain(), Attempt(1, cause="preempted", action="requeue"), vain()],
        PLAIN,
        "requeue",
        "queued again",
    ),
    "a time limit reached three times without a step": (
        "walltime",
        None,
        [vain(), Attempt(1, cause="walltime", action="requeue")],
        PLAIN,
        "hold",
        "held: it was started 3 times in a row without taking a step",
    ),
    "a time limit reached after steps": ("walltime", 3, [vain(), vain()], PLAIN, "requeue", "queued again"),
    "preempted without a step": ("preempted", None, [vain(), vain()], PLAIN, "requeue", "queued again"),
    "no restart allowed": ("preempted", 10, [], Restart(max_restarts=0), "hold", "started again 0 times"),
    "only what was started again counts": (
        "walltime",
        10,
        [past("cancelled", "leave"), past("crashed", "hold")],
        Restart(max_restarts=2),
        "requeue",
        "queued again",
    ),
    "crashed before a step": ("crashed", None, [], PLAIN, "hold", "held: it crashed before its first step"),
    "crashed after progress": ("crashed", 10, [], PLAIN, "requeue", "crashed after progress to step 10: queued again"),
    "crashed at step 0": ("crashed", 0, [], PLAIN, "requeue", "progress to step 0"),
    "crashed further on": ("crashed", 11, [crash(10)], PLAIN, "requeue", "progress to step 11"),
    "crashed at the same step": (
        "crashed",
        10,
        [crash(10)],
        PLAIN,
        "hold",
        "held: it crashed at step 10, no further than the crash before (step 10)",
    ),
    "crashed earlier": (
        "crashed",
        9,
        [crash(3), crash(10)],
        PLAIN,
        "hold",
        "no further than the crash before (step 10)",
    ),
    "crashed again before a step": ("crashed", None, [crash(10)], PLAIN, "hold", "before its first step"),
    "crashed after a crash before a step": ("crashed", 1, [crash(None)], PLAIN, "requeue", "progress to step 1"),
    "the last crash allowed": ("crashed", 30, [crash(10), crash(20)], PLAIN, "requeue", "progress to step 30"),
    "one crash too many": (
        "crashed",
        40,
        [crash(10), crash(20), crash(30)],
        PLAIN,
        "hold",
        "held: crash number 4, and restart.max_crashes is 3",
    ),
    "preemptions are no crashes": ("crashed", 40, [past("preempted")] * 50, PLAIN, "requeue", "progress to step 40"),
    "no crash allowed": (
        "crashed",
        10,
        [],
        Restart(max_crashes=0),
        "hold",
        "crash number 1, and restart.max_crashes is 0",
    ),
}


@pytest.mark.parametrize(("cause", "last_step", "before", "limits", "action", "words"), ACTIONS.values(), ids=ACTIONS)
def test_what_follows(
    cause: str, last_step: int | None, before: list[Attempt], limits: Restart, action: str, words: str
) -> None:
    found, why = action_after(cause, last_step, before, limits)
    assert found == action
    assert words in why
    assert "\n" not in why
