"""What breaks on a real Slurm: ranks, nodes, memory, the supervisor, the controller. Each time the run goes on to the bit."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from lives import (
    Life,
    Told,
    assert_undisturbed,
    attempts,
    causes,
    environ_of,
    job_id_of,
    live,
    processes_of,
    ranks_of,
    read_process,
    taken_again,
)

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster
    from whole_runs import Run

pytestmark = pytest.mark.slurm

SAVING = ("--set", "checkpoint.every_steps=4")


def a_killed_rank(life: Life) -> Run:
    run = life.submit(*SAVING)
    life.wait_for_step(run)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    return life.wait_until_over(run)


def a_rank_out_of_memory(life: Life) -> Run:
    return life.wait_until_over(life.submit(*SAVING, args=("--greedy-at", "14", "--slow-s", "0.1")))


def a_rank_that_stands_still(life: Life) -> Run:
    run = life.submit(*SAVING, "--set", "restart.hang_minutes=0.1")
    life.wait_for_step(run)
    os.kill(ranks_of(run)[1], signal.SIGSTOP)
    return life.wait_until_over(run)


def a_crash_at_the_same_step_each_time(life: Life) -> Run:
    run = life.wait_until_over(life.submit(*SAVING, args=("--crash-at", "13", "--slow-s", "0")))
    life.wait_for(lambda: life.cluster.job(run.job_id)["JobState"] == "SPECIAL_EXIT", run, "a job held by Slurm")
    life.cluster.run("scancel", run.job_id)
    return run


def a_killed_supervisor(life: Life) -> Run:
    run = life.submit(*SAVING)
    life.wait_for_step(run)
    supervisors = [pid for pid in processes_of(run) if b"supervise" in read_process(pid, "cmdline")]
    assert len(supervisors) == 1
    os.kill(supervisors[0], signal.SIGKILL)
    life.wait_for(lambda: not processes_of(run), run, "the end of the ranks")
    life.runs.hpcds("resume", str(run.folder))
    return life.wait_until_over(run)


def a_lost_node(life: Life) -> Run:
    """The power of the second of two nodes fails; a third one is free."""
    run = life.submit(*SAVING, "--set", "resources.sbatch.nodelist=null", "--set", f"resources.exclude={EXCEPT[life.nodes]}")
    life.wait_for_step(run)
    life.cluster.kill_node(life.nodes[1])
    return life.wait_until_over(run)


def an_absent_controller(life: Life) -> Run:
    """slurmctld is away when the ranks end, and for a while after."""
    run = life.submit(*SAVING)
    life.wait_for_step(run)
    life.cluster.stop_slurmctld()
    os.kill(ranks_of(run)[0], signal.SIGUSR2)
    life.wait_for(lambda: not ranks_of(run), run, "the end of the ranks")
    life.cluster.start_slurmctld()
    return life.wait_until_over(run)
