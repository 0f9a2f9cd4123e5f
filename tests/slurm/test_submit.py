"""What a real Slurm says of jobs before they are queued, and what it does with those that wait for others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from whole_runs import Runs

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
