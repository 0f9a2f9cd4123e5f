"""Preemption on a real Slurm: with grace and without, twice in a row, in the middle of a save, and of a loop of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lives import (
    Life,
    Told,
    assert_undisturbed,
    attempts,
    causes,
    live,
    taken_again,
)

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster
    from whole_runs import Run

pytestmark = pytest.mark.slurm

OWN_LOOP = """\
import json, os, pathlib, time
from hpc_ds import preemption
state = pathlib.Path(os.environ["HPCDS_RUN_DIR"]) / "state.json"
step = json.loads(state.read_text()) if state.exists() else 0
while step < 40:
    step += 1
    time.sleep(0.5 if os.environ["HPCDS_ATTEMPT"] == "1" and step > 10 else 0.01)
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
    run = life.submit("--set", "checkpoint.every_steps=8", args=("--slow-disk-s", "1.5"))
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


@pytest.fixture(scope="module")
def told(slurm_cluster: SlurmCluster, left_alone: Run, tmp_path_factory: pytest.TempPathFactory) -> Told:
    stories = {
        "n1,n2": [with_grace, again_during_the_restart],
        "n3,n4": [without_grace, during_an_asynchronous_save, of_a_loop_of_ones_own],
    }
    slurm_cluster.reset()
    return live(slurm_cluster, tmp_path_factory.mktemp("preemption"), stories)


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
