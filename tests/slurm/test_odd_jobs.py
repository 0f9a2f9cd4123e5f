"""Jobs of other kinds on a real Slurm, and what is asked of it: arrays, heterogeneous jobs, no requeue, nodes to avoid, and
people who signal and requeue.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from lives import PACE, PACED, SLOW_FROM, Lane, Life, Told, assert_undisturbed
from run_facts import attempts, causes, environ_of, job_id_of, ranks_of, taken_again
from whole_runs import Run

from hpc_ds.config.load import build_job, load_site
from hpc_ds.launch.node_list import expand
from hpc_ds.script.submit import prepare

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]  # of which one test waits for all lives

# What a person writes by hand for a run folder that is there already.
ARRAY = """#!/bin/bash
#SBATCH --array=1-2 --nodes=2 --ntasks-per-node=1 --nodelist={nodes} --time=10 --open-mode=append --output={log}
{variables}
exec {python} -m hpc_ds supervise "{folder}/$SLURM_ARRAY_TASK_ID"
"""
HETEROGENEOUS = """#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=1 --nodelist={first} --time=10 --open-mode=append --output={log}
#SBATCH hetjob
#SBATCH --nodes=1 --ntasks-per-node=1 --nodelist={second}
{variables}
exec {python} -m hpc_ds supervise "{folder}/1"
"""


def tasks_of_an_array(life: Life) -> list[Run]:
    """The last of two tasks, whose job id is that of the whole array, is told to stop."""
    runs = [prepared(life, name) for name in ("1", "2")]
    life.cluster.submit(by_hand(life, ARRAY, nodes=",".join(life.nodes)))
    for run in runs:
        life.wait_for_step(run)
    os.kill(ranks_of(runs[1])[0], signal.SIGUSR2)
    hurry(runs[0])
    return [life.wait_until_over(run) for run in runs]


def a_heterogeneous_job(life: Life) -> Run:
    """Each of the two ranks is task 0 of its component; the second one is killed."""
    run = prepared(life, "1")
    life.cluster.submit(by_hand(life, HETEROGENEOUS, first=life.nodes[0], second=life.nodes[1]))
    life.wait_for_step(run)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    return life.wait_until_over(run)


def hurry(run: Run) -> None:
    """Nothing more will happen to it."""
    (run.folder / "hurry").touch()


def prepared(life: Life, name: str) -> Run:
    """A run folder without a job, where the script expects it."""
    asked = ["resources.nodes=2", "checkpoint.every_steps=4", "resources.time=10"]
    job = build_job({"script": str(PACED), "name": "by-hand"}, asked, PACE, file="by hand", base=life.runs.folder)
    run = prepare(job, load_site("slurm"), life.runs.folder / "runs", {})
    (life.runs.folder / name).symlink_to(run.root)
    return Run(run.root, "", life.runs.hpcds)


def by_hand(life: Life, script: str, **nodes: str) -> str:
    folder = life.runs.folder
    names = {"python": sys.executable, "folder": folder, "log": folder / "job-%j.log"}
    variables = "export SLURM_EXPORT_ENV=ALL OMP_NUM_THREADS=1"
    return script.format(variables=variables, **names, **nodes)


def a_job_that_may_not_be_requeued(life: Life) -> Run:
    run = life.submit("--set", "resources.sbatch.requeue=false", "--set", "resources.sbatch.no-requeue=true")
    life.wait_for_step(run)
    life.preempt()
    return life.wait_until_over(run)


def told_to_stop_by_a_person(life: Life) -> Run:
    run = life.submit()
    life.wait_for_step(run)
    life.cluster.run("scancel", "--signal=TERM", run.job_id)
    return life.wait_until_over(run)


def requeued_by_an_administrator(life: Life) -> Run:
    run = life.submit()
    life.wait_for_step(run)
    life.cluster.run("scontrol", "requeue", run.job_id)
    return life.wait_until_over(run)


def a_node_on_which_ranks_die_twice(life: Life) -> Run:
    """Of any two nodes out of three and any two others, one is the same: three crashes blame one twice."""
    run = life.submit("--set", "checkpoint.every_steps=4", *life.on_any_two(), args=("--slow-attempts", "3"))
    blamed: list[str] = []
    while len(blamed) == len(set(blamed)):
        number = len(blamed) + 1
        life.wait_for_step(run, SLOW_FROM + 5 * number, attempt=number)
        on = {environ_of(pid)["SLURMD_NODENAME"]: pid for pid in ranks_of(run).values()}
        blamed.append(next((node for node in on if node in blamed), max(on)))
        os.kill(on[blamed[-1]], signal.SIGKILL)
        life.wait_for_attempt(run, number, closed=True)
    hurry(run)
    return life.wait_until_over(run)


LANES: list[Lane] = [
    ("n3,n4,n5", [a_node_on_which_ranks_die_twice]),
    ("n1,n2", [a_job_that_may_not_be_requeued, told_to_stop_by_a_person, requeued_by_an_administrator]),
    ("n3,n4", [a_heterogeneous_job, tasks_of_an_array]),
]


def test_of_an_array_only_the_task_that_stopped_is_requeued(told: Told, left_alone: Run) -> None:
    first, last = told(tasks_of_an_array)
    assert causes(first) == ["finished"], first.story()
    assert causes(last) == ["stopped", "finished"], last.story()
    array, _, task = job_id_of(last).partition("_")
    assert (job_id_of(first), task) == (f"{array}_1", "2")
    assert {attempt.job_id for attempt in attempts(last)} == {f"{array}_2"}
    for run in (first, last):
        assert_undisturbed(run, left_alone)
        assert taken_again(run) == []


def test_a_heterogeneous_job_is_one_world_that_comes_back_whole(
    told: Told, left_alone: Run, stage: SlurmCluster
) -> None:
    run = told(a_heterogeneous_job)
    assert causes(run) == ["crashed", "finished"], run.story()
    crash = attempts(run)[0]
    assert crash.failure is not None
    assert (crash.failure["rank"], crash.failure["host"], crash.exit_code) == (1, "n4", 137)
    assert stage.job(job_id_of(run))["Restarts"] == "1"
    assert_undisturbed(run, left_alone)


def test_where_no_requeue_is_allowed_a_successor_goes_on(told: Told, left_alone: Run, stage: SlurmCluster) -> None:
    run = told(a_job_that_may_not_be_requeued)
    assert causes(run) == ["preempted", "finished"], run.story()
    first, second = attempts(run)
    assert first.action == "successor"
    assert (first.job_id, second.job_id) == (run.job_id, job_id_of(run))
    assert first.job_id != second.job_id
    assert stage.job(first.job_id)["Restarts"] == "0"
    assert run.status()["state"] == "finished"
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def test_a_signal_of_a_person_saves_and_starts_again(told: Told, left_alone: Run) -> None:
    run = told(told_to_stop_by_a_person)
    assert causes(run) == ["stopped", "finished"], run.story()
    assert attempts(run)[0].exit_code == 75
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def test_an_administrator_s_requeue_is_not_a_crash(told: Told, left_alone: Run) -> None:
    run = told(requeued_by_an_administrator)
    assert causes(run) == ["requeued", "finished"], run.story()
    assert attempts(run)[0].action == "leave", "Slurm starts it again by itself"
    assert_undisturbed(run, left_alone)
    assert taken_again(run) == []


def test_a_node_that_is_blamed_twice_is_avoided(told: Told, left_alone: Run) -> None:
    run = told(a_node_on_which_ranks_die_twice)
    *crashes, last = attempts(run)
    assert causes(run) == ["crashed"] * len(crashes) + ["finished"], run.story()
    node = crashes[-1].node
    assert [crash.node for crash in crashes].count(node) == 2
    assert node not in expand(last.nodes)
    assert_undisturbed(run, left_alone)
