"""What breaks on a real Slurm: ranks, nodes, memory, the supervisor, the controller. Each time the run goes on to the bit."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from lives import SLOW_FROM, Lane, Life, Told, assert_undisturbed
from run_facts import attempts, causes, processes_of, ranks_of, read_process, taken_again

from hpc_ds.launch.node_list import expand

if TYPE_CHECKING:
    from whole_runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]  # of which one test waits for all lives

SAVING = ("--set", "checkpoint.every_steps=4")


def a_killed_rank(life: Life) -> Run:
    run = life.submit(*SAVING)
    life.wait_for_step(run)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    return life.wait_until_over(run)


def a_rank_out_of_memory(life: Life) -> Run:
    return life.wait_until_over(life.submit(*SAVING, args=("--greedy-at", "14", "--slow-s", "0.1")))


def a_rank_that_stands_still(life: Life) -> Run:
    run = life.submit(*SAVING, "--set", "restart.hang_minutes=1")
    life.wait_for_step(run)
    os.kill(ranks_of(run)[1], signal.SIGSTOP)
    return life.wait_until_over(run)


def a_crash_at_the_same_step_each_time(life: Life) -> Run:
    run = life.wait_until_over(life.submit("--set", "checkpoint.every_steps=5", args=("--crash-at", "13")))
    life.wait_for(lambda: life.cluster.job(run.job_id)["JobState"] == "SPECIAL_EXIT", run, "a job held by Slurm")
    life.cluster.run("scancel", run.job_id)
    return run


def a_killed_supervisor(life: Life) -> Run:
    run = life.submit(*SAVING)
    life.wait_for_step(run)
    supervisors = [pid for pid in processes_of(run) if b"supervise" in read_process(pid, "cmdline")]
    assert len(supervisors) == 1
    os.kill(supervisors[0], signal.SIGKILL)
    life.wait_for(lambda: life.cluster.job(run.job_id)["JobState"] == "FAILED", run, "the end of the job")
    life.runs.hpcds("resume", str(run.folder))
    return life.wait_until_over(run)


def a_lost_node(life: Life) -> Run:
    """The power of the second of two nodes fails; a third one is free."""
    return lose_node(life, 1)


def a_lost_batch_node(life: Life) -> Run:
    """The same with the first one, where the supervisor is."""
    return lose_node(life, 0)


def lose_node(life: Life, place: int) -> Run:
    run = life.submit(*SAVING, *life.on_any_two())
    life.wait_for_step(run)
    node = expand(attempts(run)[0].nodes)[place]
    life.cluster.kill_node(node)
    life.wait_until_over(run)
    life.cluster.restart_slurmd(node)
    return run


def an_absent_controller(life: Life) -> Run:
    """slurmctld is restarted while the ranks train; then it is away when they end, and for a while after."""
    run = life.submit(*SAVING)
    life.wait_for_step(run)
    life.cluster.stop_slurmctld()
    life.cluster.start_slurmctld()
    life.wait_for_step(run, SLOW_FROM + 3)
    life.cluster.stop_slurmctld()
    os.kill(ranks_of(run)[0], signal.SIGUSR2)
    life.wait_for(lambda: not ranks_of(run), run, "the end of the ranks")
    life.cluster.start_slurmctld()
    return life.wait_until_over(run)


LANES: list[Lane] = [
    ("n11,n12,n13", [a_lost_node, a_lost_batch_node]),
    ("n3,n4", [a_rank_that_stands_still]),
    ("n3,n4", [a_killed_rank, a_killed_supervisor]),
    ("n3,n4", [a_rank_out_of_memory, a_crash_at_the_same_step_each_time]),
]
LAST_LANES: list[Lane] = [("n1,n2", [an_absent_controller])]


def test_a_killed_rank_is_named(told: Told, left_alone: Run) -> None:
    run = told(a_killed_rank)
    assert causes(run) == ["crashed", "finished"], run.story()
    crash = attempts(run)[0]
    assert (crash.action, crash.exit_code, crash.node) == ("requeue", 128 + signal.SIGKILL, "n4")
    assert crash.failure is not None
    assert (crash.failure["rank"], crash.failure["host"]) == (1, "n4")
    assert "rank 1 on n4: killed by SIGKILL" in crash.detail
    assert resumed_at(run) == [crash.saved_step]
    assert_undisturbed(run, left_alone)


def test_a_rank_out_of_memory_is_named_with_its_traceback(told: Told, left_alone: Run) -> None:
    run = told(a_rank_out_of_memory)
    assert causes(run) == ["crashed", "finished"], run.story()
    failure = attempts(run)[0].failure
    assert failure is not None
    assert (failure["rank"], failure["exit_code"]) == (1, 1)
    assert "out of memory" in failure["how"]
    assert failure["traceback"][-1].startswith("MemoryError")
    assert_undisturbed(run, left_alone)


def test_a_rank_that_stands_still_is_noticed_and_all_stacks_are_kept(told: Told, left_alone: Run) -> None:
    run = told(a_rank_that_stands_still)
    assert causes(run) == ["hang", "finished"], run.story()
    hang = attempts(run)[0]
    assert "rank 1 on n4 gives no sign of life" in hang.detail
    assert hang.node == "n4"
    stacks = sorted(path.name for path in (run.folder / "logs" / "attempt-1" / "stacks").iterdir())
    assert stacks == ["rank-0.txt"], "a stopped process cannot say where it is"
    assert_undisturbed(run, left_alone)


def test_a_crash_at_the_same_step_twice_is_held_for_a_person(told: Told) -> None:
    run = told(a_crash_at_the_same_step_each_time)
    assert causes(run) == ["crashed", "crashed"], run.story()
    first, second = attempts(run)
    assert (first.action, second.action) == ("requeue", "hold")
    assert "no further than the crash before" in second.detail
    assert "ValueError: step 13 is one too many" in second.detail


def test_a_killed_supervisor_is_found_out_by_the_next_attempt(told: Told, left_alone: Run) -> None:
    run = told(a_killed_supervisor)
    assert causes(run) == ["lost", "finished"], run.story()
    assert_undisturbed(run, left_alone)


def test_a_lost_node_is_left_for_another(told: Told, left_alone: Run) -> None:
    run = told(a_lost_node)
    assert causes(run) == ["node_failure", "finished"], run.story()
    first, second = attempts(run)
    assert first.node == expand(first.nodes)[1]
    assert first.node not in expand(second.nodes)
    assert_undisturbed(run, left_alone)


def test_a_lost_batch_node_takes_the_supervisor_but_not_the_run(told: Told, left_alone: Run) -> None:
    run = told(a_lost_batch_node)
    assert causes(run) == ["node_failure", "finished"], run.story()
    first, second = attempts(run)
    assert first.node == expand(first.nodes)[0]
    assert first.node not in expand(second.nodes)
    assert_undisturbed(run, left_alone)


def test_the_controller_may_be_away(told: Told, left_alone: Run) -> None:
    run = told(an_absent_controller)
    assert causes(run) == ["stopped", "finished"], run.story()
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def resumed_at(run: Run) -> list[int]:
    return [event["step"] for event in run.lines("events.jsonl") if event["event"] == "resumed"]
