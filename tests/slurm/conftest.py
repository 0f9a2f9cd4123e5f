"""What the tests on the real Slurm share: the run that was left alone, with which the disturbed ones are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lives import PACED, STEPS
from whole_runs import Run, Runs

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster


@pytest.fixture(scope="session")
def left_alone(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks of the paced program on two nodes, to whom nothing happens."""
    runs = Runs(tmp_path_factory.mktemp("left-alone"), slurm_cluster.env)
    run = runs.submit(PACED, "--site", "slurm", "--nodes", "2", "--time", "10", args=("--steps", str(STEPS)))
    assert run.wait_until_over()["state"] == "finished", run.story()
    return run
