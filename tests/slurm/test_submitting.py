"""What a real Slurm says of jobs before they are queued, and what it does with those that wait for others."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from whole_runs import Run, Runs, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

JOB = ("submit", "job.json", "--site", "slurm", "--time", "1")


@pytest.fixture
def runs(slurm_cluster: SlurmCluster, tmp_path: Path) -> Runs:
    (tmp_path / "job.json").write_text(json.dumps({"name": "job", "command": ["true"]}))
    return Runs(tmp_path, slurm_cluster.env)


# What cannot be had from five nodes of four cores and two GPUs -> what is said.
NEVER = {
    ("--nodes", "20"): "resources.nodes 20: partition main has 5 nodes, so the job could never start",
    (
        "--gpus-per-node",
        "3",
    ): "the job could never start: Requested node configuration is not available (partition main: 5 ",
    ("--constraint", "foo"): "sbatch: refused the job: Invalid feature specification",
    ("--set", 'resources.sbatch={"bogus": true}'): "sbatch: refused the job: unrecognized option '--bogus'",
}


@pytest.mark.parametrize("options", NEVER, ids=" ".join)
def test_what_can_never_start_is_refused_with_the_reason(
    options: tuple[str, ...], slurm_cluster: SlurmCluster, runs: Runs
) -> None:
    for more in ((), ("--dry-run",)):
        done = runs.hpcds(*JOB, *options, *more, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
        assert NEVER[options] in done.stderr
    assert not list((runs.folder / "runs").glob("*"))
    assert slurm_cluster.run("squeue", "--noheader").stdout == ""


def test_nodes_that_are_down_are_a_warning_and_the_job_waits(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    slurm_cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        done = runs.hpcds(*JOB, "--nodes", "5", "--json")
        job_id = json.loads(done.stdout)["job_id"]
        assert "1 of 5 nodes do not work just now; the job waits for them" in done.stderr
        assert slurm_cluster.job(job_id)["JobState"] == "PENDING"
    finally:
        slurm_cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")


def test_a_dry_run_tells_when_the_job_would_start(runs: Runs) -> None:
    told = json.loads(runs.hpcds(*JOB, "--nodes", "2", "--dry-run", "--json").stdout)
    assert told["plan"]["start"] > 1.7e9
    assert not (runs.folder / "runs").exists()


def test_a_job_can_be_queued_unchecked(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    """Slurm takes it: it has more nodes tomorrow, perhaps."""
    job_id = json.loads(runs.hpcds(*JOB, "--nodes", "20", "--no-check", "--json").stdout)["job_id"]
    assert slurm_cluster.job(job_id)["JobState"] == "PENDING"
    runs.hpcds("cancel", job_id)


# The first attempt lasts until it is told to stop; the second finishes.
TWICE = """
import os, signal, sys, time
from hpc_ds.runtime.run import CurrentRun
run, told = CurrentRun.from_environment(), []
for name in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(name, lambda number, _: told.append(number))
for step in range(1, 10_000):
    run.record("step", step=step + 10_000 * run.attempt, loss=1.0, lr=0.1, seconds=0.05)
    time.sleep(0.05)
    if run.attempt == 2:
        sys.exit(0)
    if told:
        sys.exit(75)
"""


def two_runs(runs: Runs, *options: str) -> tuple[Run, Run, Run]:
    """One that has to start twice, one that waits for its good end, and one that waits for its bad end."""
    (runs.folder / "twice.py").write_text(TWICE)
    (runs.folder / "twice.json").write_text(json.dumps({"name": "twice", "command": [sys.executable, "twice.py"]}))
    first = runs.submit(runs.folder / "twice.json", "--site", "slurm", "--time", "10", *options)
    others = [runs.submit(runs.folder / "job.json", *JOB[2:], "--after", f"twice:{when}") for when in ("ok", "notok")]
    first.wait_for_step(2)
    return first, *others


def waits(cluster: SlurmCluster, run: Run) -> str:
    return cluster.job(json.loads((run.folder / "job.json").read_text())["job_id"])["Dependency"]


def test_a_run_waits_for_another_through_its_requeue(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    """Slurm keeps the dependency of a job that is queued again: neither its good end nor its bad one has come."""
    first, then, in_vain = two_runs(runs)
    runs.hpcds("requeue", str(first.folder))
    assert first.wait_until_over()["state"] == "finished", first.story()
    assert then.wait_until_over()["state"] == "finished", then.story()
    assert [attempt["cause"] for attempt in first.status()["attempts"]] == ["requeued", "finished"]
    assert then.lines("attempts.jsonl")[0]["opened"] >= first.lines("attempts.jsonl")[-1]["closed"]
    assert in_vain.lines("attempts.jsonl") == []
    assert waits(slurm_cluster, in_vain).startswith(f"afternotok:{first.job_id}")
    runs.hpcds("cancel", str(in_vain.folder))


def test_a_run_waits_for_the_job_with_which_another_goes_on(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    """A job that may not be queued again goes on as another one; what waits for the run waits for that."""
    first, then, in_vain = two_runs(runs, "--set", 'resources.sbatch={"requeue": false, "no-requeue": true}')
    runs.hpcds("preempt", str(first.folder))
    assert first.wait_until_over()["state"] == "finished", first.story()
    assert [attempt["action"] for attempt in first.status()["attempts"]] == ["successor", "finish"]
    assert then.wait_until_over()["state"] == "finished", then.story()
    assert then.lines("attempts.jsonl")[0]["opened"] >= first.lines("attempts.jsonl")[-1]["closed"]
    assert in_vain.lines("attempts.jsonl") == []
    assert waits(slurm_cluster, in_vain).startswith(f"afternotok:{first.status()['job_id']}")
    runs.hpcds("cancel", str(in_vain.folder))


def test_a_chain_is_queued_as_a_whole_and_tells_of_its_ends(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    tells = {"command": ["sh", "-c", "cat >>told.jsonl; echo >>told.jsonl"]}
    (runs.folder / "job.json").write_text(json.dumps({"name": "job", "command": ["true"], "notify": tells}))
    told = json.loads(runs.hpcds(*JOB[:2], "job.json", "job.json", "--chain", *JOB[2:], "--json").stdout)
    found = [Run(runs.folder / one["run_dir"], one["job_id"], runs.hpcds) for one in told]
    for run in found:
        assert run.wait_until_over()["state"] == "finished", run.story()
    times = [[line.get("opened") or line["closed"] for line in run.lines("attempts.jsonl")] for run in found]
    assert times == sorted(times)
    assert len(times) == 3
    heard = runs.folder / "told.jsonl"
    wait_until(lambda: heard.exists() and heard.read_text().count("\n") == 3, 120, found[2], "the notice of its end")
    events = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [(one["run_dir"], one["cause"]) for one in events] == [(str(run.folder), "finished") for run in found]


# Finishes; the second task only when it is started again, and the third only when it may.
TASK = """
import os, sys, time
number = os.path.basename(os.environ["HPCDS_RUN_DIR"])
print("task", os.environ["SLURM_ARRAY_TASK_ID"], sys.argv[1:], flush=True)
while number == "3" and not os.path.exists("go"):
    time.sleep(0.1)
sys.exit(3 if number == "2" and os.environ["HPCDS_ATTEMPT"] == "1" else 0)
"""


def test_a_sweep_is_an_array_whose_tasks_live_and_are_resumed_each_for_itself(
    slurm_cluster: SlurmCluster, runs: Runs
) -> None:
    (runs.folder / "task.py").write_text(TASK)
    job = {"name": "sweep", "command": [sys.executable, "task.py"]}
    (runs.folder / "sweep.json").write_text(json.dumps(job))
    told = json.loads(
        runs.hpcds(
            "submit", "sweep.json", *JOB[2:], "--sweep", "args.--lr=1e-3,2e-3,3e-3,4e-3", "--throttle", "3", "--json"
        ).stdout
    )
    tasks = [Run(runs.folder / told["sweep_dir"] / str(n), f"{told['job_id']}_{n}", runs.hpcds) for n in (1, 2, 3, 4)]
    then = runs.submit(runs.folder / "job.json", *JOB[2:], "--after", f"{told['job_id']}:any")
    assert waits(slurm_cluster, then).startswith(f"afterany:{told['job_id']}_*")
    for task in (tasks[0], tasks[3]):
        assert task.wait_until_over()["state"] == "finished", task.story()
    assert tasks[1].wait_until_over()["state"] == "held", tasks[1].story()
    assert [task.status()["job_id"] for task in tasks] == [task.job_id for task in tasks]
    assert "['--lr', '4e-3']" in (tasks[3].folder / "logs" / "attempt-1" / "rank-0.log").read_text()
    runs.hpcds("cancel", tasks[2].job_id)
    assert tasks[2].wait_until_over()["state"] == "cancelled", tasks[2].story()
    (runs.folder / "go").touch()
    resumed = json.loads(runs.hpcds("resume", told["job_id"], "--json").stdout)
    assert sorted(one["run_dir"][-1] for one in resumed) == ["2", "3"]
    for task in tasks:
        assert task.wait_until_over()["state"] == "finished", task.story()
    assert len({task.status()["job_id"].partition("_")[0] for task in tasks}) == 2
    assert then.wait_until_over()["state"] == "finished", then.story()
