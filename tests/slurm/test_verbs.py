"""The verbs on a real Slurm: what they ask of it, and what it makes of what they do."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from whole_runs import Run, Runs, wait_until

from hpc_ds.cluster.queue import Queue
from hpc_ds.cluster.slurm import Slurm

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

# A rank that takes steps as an engine would tell of them until it is told to stop; the second attempt finishes.
PROGRAM = """
import os, signal, sys, time
from hpc_ds.runtime.run import CurrentRun
run, told = CurrentRun.from_environment(), []
for name in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(name, lambda number, _: told.append(number))
first = 1 + sum(1 for _ in run.files.events.open()) if run.files.events.exists() else 1
for step in range(first, 10_000):
    if os.environ["SLURM_PROCID"] == "0":
        run.record("step", step=step, loss=1.0 / step, lr=0.1, seconds=0.05)
    time.sleep(0.05)
    if run.attempt == 2:
        sys.exit(0)
    if told:
        sys.exit(75)
"""


@pytest.fixture
def runs(slurm_cluster: SlurmCluster, tmp_path: Path) -> Runs:
    (tmp_path / "rank.py").write_text(PROGRAM)
    return Runs(tmp_path, slurm_cluster.env)


def submitted(runs: Runs, *options: str) -> Run:
    job = runs.folder / "job.json"
    job.write_text(json.dumps({"name": "job", "command": [sys.executable, "rank.py"], "steps": 10_000}))
    return runs.submit(job, "--site", "slurm", "--time", "10", *options)


def told(runs: Runs, *words: str) -> Any:
    return json.loads(runs.hpcds(*words, "--json").stdout)


def test_several_runs_are_told_of_and_a_held_one_is_changed(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    """One runs on two nodes, one is held by an option of sbatch; the held one goes on with another shape."""
    running = submitted(runs, "--nodes", "2")
    held = submitted(runs, "--set", 'resources.sbatch={"hold": true}')
    running.wait_for_step(3)
    found = {one["job_id"]: one for one in told(runs, "status", running.job_id, held.job_id)}
    assert (found[running.job_id]["state"], found[running.job_id]["nodes"]) == ("running", "n[1-2]")
    assert found[running.job_id]["ends_at"] > found[running.job_id]["step_at"]
    assert found[running.job_id]["steps_per_s"] > 0
    assert (found[held.job_id]["state"], found[held.job_id]["queue_reason"]) == ("held", "JobHeldUser")
    assert [one["job_id"] for one in told(runs, "status")] == [running.job_id], "a held run does nothing by itself"

    changed = told(runs, "resume", held.job_id, "--nodes", "2", "--set", 'resources.sbatch={"comment": "again"}')
    assert changed["job_id"] not in {held.job_id, running.job_id}
    assert slurm_cluster.job(held.job_id)["JobState"] == "CANCELLED"
    job = slurm_cluster.job(changed["job_id"])
    assert (job["NumNodes"].partition("-")[0], job["Comment"]) == ("2", "again")
    cancelled = told(runs, "cancel", running.job_id, changed["job_id"])
    assert [one["action"] for one in cancelled] == ["cancelled", "cancelled"]
    assert running.wait_until_over()["state"] == "cancelled"


def test_a_requeued_run_is_queued_by_slurm_and_said_to_wait(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    run = submitted(runs)
    run.wait_for_step(3)
    slurm_cluster.run("scontrol", "update", "NodeName=ALL", "State=DRAIN", "Reason=test")  # so that it waits
    assert told(runs, "requeue", run.job_id)["action"] == "requeued"
    wait_until(lambda: run.status()["state"] == "waiting", 60, run, "its place in the queue")
    refused = runs.hpcds("requeue", run.job_id, check=False)
    assert refused.returncode == 2
    assert "it is in the queue already" in refused.stderr
    slurm_cluster.run("scontrol", "update", "NodeName=ALL", "State=RESUME")
    lines = runs.hpcds("status", "--watch", run.job_id).stdout.splitlines()
    assert "finished (finished in attempt 2)" in lines[-1]
    rows = told(runs, "history", run.job_id)
    assert rows[0]["cause"] in {"requeued", "lost"}, "lost: its supervisor was killed before it could say so"
    assert rows[1]["cause"] == "finished", run.story()
    assert slurm_cluster.job(run.job_id)["Restarts"] == "1"
    report = told(runs, "report", run.job_id)
    assert report["state"] == "finished"
    assert report["sacct_allocated_s"] is None or report["sacct_allocated_s"] > 0
    assert report["seconds"]["queueing"] > 0


def test_a_job_that_slurm_has_forgotten_is_not_said_to_run(slurm_cluster: SlurmCluster, runs: Runs) -> None:
    """Its ledger still has an attempt that was never closed."""
    run = submitted(runs)
    run.wait_for_step(1)
    job = json.loads((run.folder / "job.json").read_text())
    (run.folder / "job.json").write_text(json.dumps({**job, "job_id": "999999"}))
    status = run.status()
    assert (status["state"], status["queue_state"]) == ("failed", None)
    assert "nothing started it again; `hpcds resume` continues it" in status["reason"]
    (run.folder / "job.json").write_text(json.dumps(job))
    assert run.status()["state"] == "running"


def test_where_there_is_accounting_its_time_is_shown_beside(
    accounting_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rank.py").write_text(PROGRAM.replace("run.attempt == 2", "step == 30"))
    run = submitted(Runs(tmp_path, accounting_cluster.env))
    assert run.wait_until_over()["state"] == "finished", run.story()

    def counted() -> float:
        return float(told(Runs(tmp_path, accounting_cluster.env), "report", run.job_id)["sacct_allocated_s"] or 0.0)

    wait_until(lambda: counted() > 0, 60, run, "its time in sacct")
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, accounting_cluster.env[name])
    (account,) = Slurm().accounts([run.job_id])
    assert (account.job_id, account.nodes) == (run.job_id, run.status()["attempts"][0]["nodes"])
    wait_until(lambda: "COMPLETED" in str(Queue().last_words([run.job_id])), 60, run, "its end in sacct")
