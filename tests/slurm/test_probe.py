"""``hpcds site`` on a real Slurm: what it says of itself becomes a site file that knows this cluster again."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.cluster.probe import probe
from hpc_ds.cluster.shell import Completed
from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site_rules import check_job
from hpc_ds.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm


def hpcds(cluster: SlurmCluster, home: Path, *words: str, code: int = 0, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_ds", *words],
        env={**cluster.env, "HOME": str(home), **variables},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_cluster_is_probed_and_known_again(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    detected = json.loads(hpcds(slurm_cluster, tmp_path, "site", "detect", "--json"))
    assert (detected["site"], detected["cluster"]) == ("slurm", None), "no site file names a cluster yet"
    printed = json.loads(hpcds(slurm_cluster, tmp_path, "site", "probe", "--dry-run"))
    assert not (tmp_path / ".config").exists()

    told = json.loads(hpcds(slurm_cluster, tmp_path, "site", "probe", "--name", "ours", "--json"))
    path = tmp_path / ".config" / "hpcds" / "sites" / "ours.json"
    assert told["file"] == str(path)
    assert json.loads(path.read_text()) == told["site"] == {**printed, "name": "ours"}
    assert told["site"]["detect"] == {"cluster_names": ["hpcds"]}
    size = {"default_time": "01:00:00", **size_of(slurm_cluster)}
    assert told["site"]["partitions"] == {
        "main": {**size, "preemption": "requeue", "preemption_grace_s": 20.0},
        "nograce": {**size, "preemption": "requeue", "preemption_grace_s": 0.0},
        "urgent": {**size, "preemption": "off"},
    }
    assert told["site"]["default_partition"] == "main"
    assert {source["verified"] for source in told["site"]["sources"].values()} == {True}
    assert "is there already; --force" in hpcds(slurm_cluster, tmp_path, "site", "probe", "--name", "ours", code=2)
    assert "3 partitions" in hpcds(slurm_cluster, tmp_path, "site", "probe", "--name", "ours", "--force")
    assert "is whole" in hpcds(slurm_cluster, tmp_path, "site", "validate", "ours")

    assert hpcds(slurm_cluster, tmp_path, "site", "detect") == "ours: Slurm calls its cluster hpcds\n"
    (tmp_path / "train.py").write_text("")
    preview = json.loads(hpcds(slurm_cluster, tmp_path, "submit", "train.py", "--dry-run", "--json"))
    assert preview["site"] == "ours"


def test_a_request_that_can_never_start_is_refused(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """sbatch takes it, and it would wait for ever."""
    data = probe("ours", in_cluster(slurm_cluster))
    (tmp_path / "ours.json").write_text(json.dumps(data))
    site = load_site(str(tmp_path / "ours.json"))
    job_id = slurm_cluster.submit("#!/bin/bash\ntrue\n", "-N20")
    assert slurm_cluster.job(job_id)["JobState"] == "PENDING"
    nodes, cores, gpus = size_of(slurm_cluster).values()
    for resources, complaint in (
        (
            {"nodes": 20},
            f"resources.nodes 20: partition 'main' of site 'ours' gives a job at most {nodes}; ask for fewer",
        ),
        (
            {"gpus_per_node": gpus + 1},
            f"resources.gpus_per_node {gpus + 1}: a node of partition 'main' of site 'ours' has",
        ),
        (
            {"cpus_per_task": cores + 1},
            f"resources.cpus_per_task {cores + 1}: 1 ranks of them on a node of partition 'main'",
        ),
    ):
        job: JobConfig = check(JobConfig, {"command": ["true"], "resources": resources}, "job.json")
        with pytest.raises(ConfigError) as caught:
            check_job(job, site)
        assert str(caught.value).startswith(complaint)


def test_qos_are_known_where_there_is_accounting(accounting_cluster: SlurmCluster) -> None:
    accounting_cluster.run("sacctmgr", "-i", "add", "qos", "short", "MaxWall=02:00:00")
    data = probe(None, in_cluster(accounting_cluster))
    assert data["qos"] == {"normal": {}, "short": {"walltime": "02:00:00"}}
    assert data["sources"]["qos"]["source"].startswith("sacctmgr show qos of Slurm ")
    assert data["name"] == "hpcds"


def size_of(cluster: SlurmCluster) -> dict[str, int]:
    return {
        "max_nodes": len(cluster.node_names),
        "cpus_per_node": cluster._cpus_per_node,
        "gpus_per_node": cluster._gpus_per_node,
    }


def in_cluster(cluster: SlurmCluster) -> Any:
    """The shell that the probe uses, in the environment of a cluster of the tests."""

    def run(command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
        done = cluster.run(*command, check=False, timeout_s=timeout_s)
        if check and done.returncode:
            raise RefusedError(done.stderr)
        return Completed(done.returncode, done.stdout, done.stderr)

    return run
