"""Python functions as jobs, through submitit: in a process of this machine, and on a real Slurm."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

import hpc_ds
from hpc_ds.cluster.callables import submit
from hpc_ds.errors import ConfigError, SubmitError

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster


def where(base: int) -> tuple[int, str]:
    return base + int(os.environ.get("SLURM_PROCID", "0")), os.environ.get("SLURM_JOB_NUM_NODES", "none")


@pytest.fixture(autouse=True)
def _pickled_whole() -> None:
    """Take the function along by value: the job does not have this folder on its path."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.mark.local
def test_a_function_runs_in_another_process_of_this_machine(tmp_path: Path) -> None:
    job = hpc_ds.submit(where, 10, site="local", resources={"time": "2"}, folder=tmp_path)
    assert job.result() == (10, "none")


@pytest.mark.slurm
@pytest.mark.filterwarnings("ignore::UserWarning:submitit.*")
def test_a_function_runs_on_every_rank_of_a_slurm_job(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    resources = {"nodes": 2, "tasks_per_node": 2, "time": "2", "partition": "main"}
    job = submit(where, 10, site="slurm", resources=resources, folder=tmp_path)
    assert job.results() == [(10 + rank, "2") for rank in range(4)]


def test_what_cannot_be_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resources: node: unknown key; did you mean 'nodes'"):
        submit(where, 1, site="local", resources={"node": 2}, folder=tmp_path)
    with pytest.raises(SubmitError, match="site 'moon'"):
        submit(where, 1, site="moon", folder=tmp_path)
    assert not list(tmp_path.iterdir())
