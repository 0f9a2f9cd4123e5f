"""Whole training runs of the example on a real Slurm: two nodes with two ranks each, preempted, cancelled, hostile names.

Every disturbed run must show, bit for bit, the losses of the same run left alone. What else a cluster does to runs is in
the files beside this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from run_facts import causes, processes_of, taken_again
from whole_runs import GPT, SMALL, Run, Runs

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

STEPS = 60
FOUR_RANKS = ("--site", "slurm", "--nodes", "2", "--tasks-per-node", "2", "--time", "10")


@pytest.fixture
def runs(slurm_cluster: SlurmCluster, tmp_path: Path) -> Runs:
    return Runs(tmp_path, slurm_cluster.env)


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that all others are compared with."""
    slurm_cluster.reset()
    runs = Runs(tmp_path_factory.mktemp("undisturbed"), slurm_cluster.env)
    run = train(runs)
    assert run.wait_until_over()["state"] == "finished", run.story()
    return run


def train(runs: Runs, *options: str, steps: int = STEPS) -> Run:
    return runs.submit(GPT, *FOUR_RANKS, *options, args=("--steps", str(steps), *SMALL))


def restarts(cluster: SlurmCluster, run: Run) -> str:
    return cluster.job(run.job_id)["Restarts"]


def test_two_nodes_with_two_ranks_each_train_and_finish(undisturbed: Run) -> None:
    status = undisturbed.status()
    assert (status["state"], status["step"], status["steps_lost"]) == ("finished", STEPS, 0)
    assert [attempt["nodes"] for attempt in status["attempts"]] == ["n[1-2]"]
    logs = sorted(path.name for path in (undisturbed.folder / "logs" / "attempt-1").glob("*.log"))
    assert logs == ["launcher.log", "rank-0.log", "rank-1.log", "rank-2.log", "rank-3.log"]
    losses = [loss for loss, _, _ in undisturbed.losses().values()]
    assert losses[-1] < losses[0] - 1.5


def test_a_preempted_run_is_saved_in_its_grace_and_resumes_to_the_bit(
    slurm_cluster: SlurmCluster, runs: Runs, undisturbed: Run
) -> None:
    run = train(runs)
    run.wait_for_step(15)
    slurm_cluster.submit("#!/bin/bash\nsleep 2\n", "-p", "urgent", "--exclusive", "-N4", "--time=1")
    status = run.wait_until_over()
    assert causes(run) == ["preempted", "finished"], run.story()
    assert run.losses() == undisturbed.losses()
    assert taken_again(run) == []
    assert status["steps_lost"] == 0
    assert restarts(slurm_cluster, run) == "1"
    assert slurm_cluster.job(run.job_id)["JobState"] == "COMPLETED"


def test_a_cancelled_run_stays_down_until_it_is_resumed(
    slurm_cluster: SlurmCluster, runs: Runs, undisturbed: Run
) -> None:
    run = train(runs)
    run.wait_for_step(15)
    slurm_cluster.run("scancel", run.job_id)
    status = run.wait_until_over()
    assert status["state"] == "cancelled", run.story()
    assert slurm_cluster.job(run.job_id)["JobState"] == "CANCELLED"
    assert restarts(slurm_cluster, run) == "0"
    assert status["attempts"][0]["saved_step"] == status["step"], "there was time to save"
    runs.hpcds("resume", str(run.folder))
    run.wait_until_over()
    assert causes(run) == ["cancelled", "finished"], run.story()
    assert run.losses() == undisturbed.losses()


def test_a_crash_before_the_first_step_is_held_with_its_reason(
    slurm_cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    run = runs.submit(tmp_path / "broken.py", "--site", "slurm", "--nodes", "2", "--time", "2")
    status = run.wait_until_over(60)
    assert status["state"] == "held", run.story()
    assert "before its first step" in status["reason"]
    assert status["attempts"][0]["exit_code"] == 3
    assert slurm_cluster.job(run.job_id)["JobState"] in {"SPECIAL_EXIT", "PENDING"}
    runs.hpcds("cancel", str(run.folder))


def test_hostile_names_and_arguments_arrive_byte_for_byte(runs: Runs, tmp_path: Path) -> None:
    hostile = ["a b", "it's", '"quoted"', "$HOME", "`id`", "back\\slash", "per%cent %j", "ünïcode", "semi;colon", "*"]
    folder = tmp_path / "a folder's $name %j"
    folder.mkdir()
    (folder / "show.py").write_text(
        "import json, os, sys\njson.dump([sys.argv[1:], os.environ['VALUE']], open(os.environ['HPCDS_RUN_DIR'] + '/seen', 'w'))\n"
    )
    value = "comma,space 'single' \"double\" $X\nnext line"
    run = runs.submit(
        folder / "show.py", "--site", "slurm", "--time", "1", "--runs", str(folder / "run's %t"),
        "--set", f"env.VALUE={value}", args=tuple(hostile),
    )  # fmt: skip
    assert run.wait_until_over(60)["state"] == "finished", run.story()
    seen: Any = json.loads((run.folder / "seen").read_text())
    assert seen == [hostile, value]
    assert (run.folder / "logs" / "scheduler.log").exists()


def test_a_refused_job_shows_sbatch_s_words_and_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    done = runs.hpcds("submit", str(GPT), "--site", "slurm", "--partition", "nowhere", check=False)
    assert done.returncode == 3
    assert "invalid partition specified: nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "runs").iterdir())


def test_a_submit_inside_a_job_does_not_inherit_its_shape(
    slurm_cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "inner.py").write_text(
        "import os\nopen(os.environ['HPCDS_RUN_DIR'] + '/seen', 'w').write(os.environ['SLURM_JOB_NUM_NODES'])\n"
    )
    script = f"#!/bin/bash\n{sys.executable} -m hpc_ds submit inner.py --site slurm --time 1 --json > out.json\n"
    outer = tmp_path / "outer.sh"
    outer.write_text(script)
    slurm_cluster.run("sbatch", "--wait", "-N3", "--time=1", f"--chdir={tmp_path}", str(outer))
    data = json.loads((tmp_path / "out.json").read_text())
    run = Run(tmp_path / data["run_dir"], data["job_id"], runs.hpcds)
    assert run.wait_until_over(60)["state"] == "finished", run.story()
    assert (run.folder / "seen").read_text() == "1"


def test_hostfile_of_an_allocation(slurm_cluster: SlurmCluster) -> None:
    done = slurm_cluster.run(
        "salloc", "-N2", "--gpus-per-node=2", "--time=1", sys.executable, "-m", "hpc_ds", "hostfile"
    )
    assert done.stdout == "n1 slots=2\nn2 slots=2\n"


def test_nothing_is_left(undisturbed: Run) -> None:
    assert processes_of(undisturbed) == []
    assert subprocess.run(["pgrep", "-f", str(undisturbed.folder)], check=False, capture_output=True).stdout == b""
