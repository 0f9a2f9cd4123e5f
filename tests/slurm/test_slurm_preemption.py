"""The cluster asks for its nodes back, on a real Slurm: preemption with grace and without, twice in a row, in the middle
of a save and of a loop of one's own; and the time limit, announced by a signal, not announced, and during a save.

A limit of two minutes is the least that leaves the start of a rank out of the warning, which Slurm sends up to a minute
early. Those runs wait beside the others, all on one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from lives import Lane, Life, Told, assert_undisturbed
from run_facts import attempts, causes, taken_again

if TYPE_CHECKING:
    from pathlib import Path

    from whole_runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]  # of which one test waits for all lives

LIMITED = ("--time", "2")
BEYOND_THE_LIMIT = ("--slow-s", "4")

OWN_LOOP = """\
import json, os, pathlib, time
from hpc_ds import preemption
state = pathlib.Path(os.environ["HPCDS_RUN_DIR"]) / "state.json"
step = json.loads(state.read_text()) if state.exists() else 0
while step < 40:
    step += 1
    time.sleep(1 if os.environ["HPCDS_ATTEMPT"] == "1" and step > 10 else 0.01)
    preemption.step(step, loss=1.0 / step)
    if preemption.requested():
        state.write_text(json.dumps(step))
        preemption.saved(step)
        raise preemption.Preempted
"""


def with_grace(life: Life) -> Run:
    run = life.submit()
    life.wait_for_step(run)
    life.preempt()
    return life.wait_until_over(run)


def without_grace(life: Life) -> Run:
    run = life.submit("--partition", "nograce")
    life.wait_for_step(run)
    life.preempt()
    return life.wait_until_over(run)


def again_during_the_restart(life: Life) -> Run:
    run = life.submit(args=("--slow-start", "2"))
    life.wait_for_step(run)
    life.preempt()
    life.wait_for_attempt(run, 2)
    life.preempt()
    return life.wait_until_over(run)


def during_an_asynchronous_save(life: Life) -> Run:
    run = life.submit("--set", "checkpoint.every_steps=8", args=("--slow-disk-s", "1.0"))
    life.wait_for(lambda: hidden_saves(run), run, "a save under way")
    life.preempt()
    return life.wait_until_over(run)


def of_a_loop_of_ones_own(life: Life) -> Run:
    program = life.runs.folder / "own_loop.py"
    program.write_text(OWN_LOOP)
    run = life.submit(target=program, ranks=1)
    life.wait_for_step(run)
    life.preempt()
    return life.wait_until_over(run)


def hidden_saves(run: Run) -> list[Path]:
    """Checkpoints that are being written."""
    return [path for path in (run.folder / "checkpoints").iterdir() if path.name.startswith(".") and path.is_dir()]


@dataclass(frozen=True)
class Limited:
    """A finished run, and when its first attempt had to be over."""

    run: Run
    limit_at: float


def announced(life: Life) -> Limited:
    return until_the_limit(life, life.submit(*LIMITED, args=BEYOND_THE_LIMIT))


def not_announced(life: Life) -> Limited:
    silent = ("--set", "resources.sbatch.signal=false")
    return until_the_limit(life, life.submit(*LIMITED, *silent, args=BEYOND_THE_LIMIT))


def limit_during_a_save(life: Life) -> Limited:
    """Each save takes longer than the steps until the next one: one is always under way."""
    saving = ("--set", "checkpoint.every_steps=2")
    return until_the_limit(life, life.submit(*LIMITED, *saving, args=(*BEYOND_THE_LIMIT, "--slow-disk-s", "1.2")))


def until_the_limit(life: Life, run: Run) -> Limited:
    life.wait_for_step(run)
    limit_at = float((run.folder / "deadline").read_text().split()[1])
    return Limited(life.wait_until_over(run), limit_at)


LONG_LANES: list[Lane] = [("n6", [announced]), ("n6", [not_announced]), ("n6", [limit_during_a_save])]
LANES: list[Lane] = [
    ("n7,n8", [with_grace, again_during_the_restart]),
    ("n9,n10", [without_grace, during_an_asynchronous_save, of_a_loop_of_ones_own]),
]


def test_with_grace_no_step_is_lost(told: Told, left_alone: Run) -> None:
    run = told(with_grace)
    assert causes(run) == ["preempted", "finished"], run.story()
    assert attempts(run)[0].action == "requeue", "leaving inside the grace would have ended the job"
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def test_without_grace_no_step_is_lost_either(told: Told, left_alone: Run) -> None:
    run = told(without_grace)
    assert causes(run) == ["preempted", "finished"], run.story()
    assert attempts(run)[0].action == "leave", "Slurm had queued it again itself"
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def test_a_second_preemption_before_the_first_step_costs_nothing(told: Told, left_alone: Run) -> None:
    run = told(again_during_the_restart)
    assert causes(run) == ["preempted", "preempted", "finished"], run.story()
    assert attempts(run)[1].last_step is None
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def test_a_save_under_way_is_finished_or_given_up_for_a_better_one(told: Told, left_alone: Run) -> None:
    run = told(during_an_asynchronous_save)
    assert causes(run) == ["preempted", "finished"], run.story()
    first = attempts(run)[0]
    assert first.last_step is not None
    assert first.saved_step == first.last_step
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []
    assert hidden_saves(run) == [], "nothing half-written is left"


def test_a_loop_without_the_engine_lives_by_the_same_contract(told: Told) -> None:
    run = told(of_a_loop_of_ones_own)
    assert causes(run) == ["preempted", "finished"], run.story()
    assert [event["step"] for event in run.steps()] == list(range(1, 41))
    assert (attempts(run)[0].exit_code, attempts(run)[1].exit_code) == (75, 0)


def assert_survived(limited: Limited, left_alone: Run) -> None:
    run = limited.run
    assert causes(run) == ["walltime", "finished"], run.story()
    first = attempts(run)[0]
    assert first.action == "requeue"
    assert first.closed is not None
    assert first.closed < limited.limit_at, "it was saved only after the limit"
    assert first.saved_step == first.last_step
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def told_by(run: Run) -> list[str]:
    return [event["told_by"] for event in run.lines("events.jsonl") if event["event"] == "stopped"]


def test_a_limit_that_is_announced_is_survived(told: Told, left_alone: Run) -> None:
    assert_survived(told(announced), left_alone)


def test_without_a_signal_the_ranks_look_at_the_clock(told: Told, left_alone: Run) -> None:
    limited = told(not_announced)
    assert_survived(limited, left_alone)
    assert told_by(limited.run) == ["deadline"]
    assert "--signal" not in (limited.run.folder / "script.sbatch").read_text()


def test_a_save_under_way_at_the_limit_is_no_harm(told: Told, left_alone: Run) -> None:
    assert_survived(told(limit_during_a_save), left_alone)
