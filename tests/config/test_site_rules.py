"""Jobs against the rules of a site: what would never start is refused with the reason, what is only supposed warns."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.config.site_rules import check_job, fitted, gpus_per_rank, longest_s
from hpc_ds.errors import ConfigError


def job_of(**resources: Any) -> JobConfig:
    job: JobConfig = check(JobConfig, {"command": ["true"], "resources": resources}, "job.json")
    return job


def site_of(**data: Any) -> SiteConfig:
    site: SiteConfig = check(SiteConfig, {"name": "s", "description": "d", "scheduler": "slurm", **data}, "site.json")
    return site


FRONTIER = {
    "walltime": [
        {"nodes": 91, "time": "2:00:00"},
        {"nodes": 183, "time": "6:00:00"},
        {"nodes": None, "time": "12:00:00"},
    ]
}

# site, resources -> the refusal
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "time": (
        {"partitions": {"p": {"walltime": "1:00:00"}}},
        {"partition": "p", "time": "61"},
        (
            "resources.time '61': partition 'p' of site 's' lets a job of 1 node run for 01:00:00 at most; ask for less, a run "
            "goes on beyond it"
        ),
    ),
    "time of a site": (
        {"walltime": "7-0"},
        {"time": "8-0"},
        "resources.time '8-0': site 's' lets a job of 1 node run for 168:00:00 at most; ask for less, a run goes on beyond it",
    ),
    "time of a QOS": (
        {"qos": {"q": {"walltime": "30"}}, "default_qos": "q"},
        {"time": "31"},
        (
            "resources.time '31': QOS 'q' of site 's' lets a job of 1 node run for 00:30:00 at most; ask for less, a run goes on "
            "beyond it"
        ),
    ),
    "time of so many nodes": (
        {"partitions": {"p": FRONTIER}, "default_partition": "p"},
        {"nodes": 92, "time": "7:00:00"},
        (
            "resources.time '7:00:00': partition 'p' of site 's' lets a job of 92 nodes run for 06:00:00 at most; ask for less, a "
            "run goes on beyond it"
        ),
    ),
    "node hours": (
        {"max_node_hours": 1.5},
        {"nodes": 3, "time": "31"},
        "resources.time '31': site 's' lets a job of 3 nodes run for 00:30:00 at most; ask for less, a run goes on beyond it",
    ),
    "nodes": (
        {"partitions": {"p": {"max_nodes": 4}}, "sbatch": {"partition": "p"}},
        {"nodes": 5},
        "resources.nodes 5: partition 'p' of site 's' gives a job at most 4; ask for fewer",
    ),
    "few nodes": ({"min_nodes": 2}, {}, "resources.nodes 1: site 's' is for jobs of at least 2; ask for more"),
    "GPUs": (
        {"gpus_per_node": 8, "partitions": {"p": {"gpus_per_node": 4}}},
        {"partition": "p", "gpus_per_node": 8},
        "resources.gpus_per_node 8: a node of partition 'p' of site 's' has 4; ask for fewer, or more nodes",
    ),
    "parts of nodes": (
        {"gpus_per_node": 4, "whole_nodes": "several"},
        {"nodes": 2, "gpus_per_node": 2},
        (
            "resources.gpus_per_node 2: site 's' gives jobs of several nodes whole nodes only, which have 4; ask for 4, or for "
            "one node"
        ),
    ),
    "uneven GPUs": (
        {"gpu_request": "gpus_per_task"},
        {"gpus_per_node": 4, "tasks_per_node": 3},
        (
            "resources.gpus_per_node 4: not a multiple of the 3 ranks on a node, as this site asks for GPUs by rank; change "
            "resources.tasks_per_node"
        ),
    ),
    "cores": (
        {"cpus_per_node": 56},
        {"gpus_per_node": 8, "cpus_per_task": 8},
        "resources.cpus_per_task 8: 8 ranks of them on a node of site 's', where jobs may use 56; ask for fewer",
    ),
    "no account": (
        {"account": {"required": True, "form": "def-<PI>"}},
        {},
        "resources.account: missing; site 's' starts no job without; name yours, of the form def-<PI>",
    ),
    "account": (
        {"account": {"pattern": "def-.+"}},
        {"account": "ada"},
        "resources.account 'ada': not an account as site 's' has them; write one that matches def-.+",
    ),
    "memory": (
        {"memory": "forbidden"},
        {"mem": "0"},
        "resources.mem '0': site 's' gives memory by cores and GPUs, and refuses --mem; leave it out",
    ),
    "memory in another way": (
        {"memory": "forbidden"},
        {"sbatch": {"mem-per-cpu": "4G"}},
        "resources.sbatch.mem-per-cpu '4G': site 's' gives memory by cores and GPUs, and refuses --mem-per-cpu; leave it out",
    ),
    "no memory": (
        {"memory": "required"},
        {},
        "resources.mem: missing; site 's' starts no job without it; say how much a node is to give",
    ),
    "tasks": (
        {"sbatch_ntasks": "forbidden"},
        {"sbatch": {"ntasks": 4}},
        (
            "resources.sbatch.ntasks 4: sbatch of site 's' refuses it; use resources.tasks_per_node and resources.cpus_per_task, "
            "which srun is told"
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_never_start_is_refused(name: str) -> None:
    site, resources, complaint = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        check_job(job_of(**resources), site_of(**site))
    assert str(caught.value) == complaint
    assert caught.value.key == complaint.split(":")[0].split(" ")[0]


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "uneven GPUs"])
def test_a_rule_that_is_not_verified_warns(name: str) -> None:
    site, resources, complaint = REFUSED[name]
    sources = {field: {"source": "somebody", "verified": False} for field in site}
    warnings = check_job(job_of(**resources), site_of(**site, sources=sources))
    wrong, _, cure = complaint.rpartition("; ")
    assert f"{wrong} (not verified: somebody); {cure}" in warnings


def test_the_narrowest_source_counts() -> None:
    site = site_of(
        partitions={"p": {"walltime": "60", "max_nodes": 1}},
        default_partition="p",
        sources={"partitions": {"source": "a"}, "partitions.p.walltime": {"source": "b", "verified": False}},
    )
    assert check_job(job_of(time="61"), site) == [
        (
            "resources.time '61': partition 'p' of site 's' lets a job of 1 node run for 01:00:00 at most (not verified: b); ask "
            "for less, a run goes on beyond it"
        )
    ]
    with pytest.raises(ConfigError, match="at most 1; ask for fewer"):
        check_job(job_of(nodes=2), site)


WARNED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "default time": ({"default_time": "30"}, {}, "resources.time: not given; site 's' ends such a job after 00:30:00"),
    "whole nodes": (
        {"whole_nodes": "always", "gpus_per_node": 4},
        {"gpus_per_node": 1},
        "resources.gpus_per_node 1: nodes are given and charged whole here, and one has 4",
    ),
    "partition": (
        {"partitions": {"a": {}, "b": {}}},
        {"partition": "c"},
        "resources.partition 'c': the file of site 's' knows only a, b",
    ),
    "QOS": ({"qos": {"a": {}}}, {"qos": "c"}, "resources.qos 'c': the file of site 's' knows only a"),
    "requeue": (
        {"requeue": "refused"},
        {},
        "site 's': jobs may not be queued again; a run goes on in jobs of their own instead",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_may_surprise_is_said(name: str) -> None:
    site, resources, warning = WARNED[name]
    assert check_job(job_of(**resources), site_of(**site)) == [warning]


def test_nothing_is_known_of_any_cluster_and_of_this_machine() -> None:
    job = job_of(nodes=10_000, gpus_per_node=64, time="365-0", account="x", mem="1T")
    assert check_job(job, load_site("slurm")) == []
    assert check_job(job, load_site("local")) == []


def test_of_several_partitions_the_first_known_counts() -> None:
    site = site_of(partitions={"small": {"max_nodes": 1}, "large": {"max_nodes": 9}})
    assert check_job(job_of(nodes=5, partition="large,small"), site) == []
    with pytest.raises(ConfigError, match="partition 'small'"):
        check_job(job_of(nodes=5, partition="small,large"), site)


def test_walltime_is_a_function_of_the_number_of_nodes() -> None:
    place = site_of(**FRONTIER)
    hours = {nodes: longest_s(place, nodes) for nodes in (1, 91, 92, 183, 184, 9000)}
    assert {nodes: (seconds or 0) / 3600 for nodes, seconds in hours.items()} == {
        1: 2, 91: 2, 92: 6, 183: 6, 184: 12, 9000: 12,
    }  # fmt: skip
    assert longest_s(site_of(walltime=[{"nodes": 2, "time": "1:00"}]), 3) is None
    assert longest_s(site_of(walltime="2:00:00", max_node_hours=4), 4) == 3600


def test_the_site_fills_in_cores_memory_and_features() -> None:
    site = site_of(
        gpus_per_node=4, cpus_per_node=72, memory="whole_node", constraint="a", partitions={"p": {"constraint": "b"}}
    )
    found = fitted(job_of(gpus_per_node=2, partition="p"), site)
    assert (found.cpus_per_task, found.mem, found.constraint) == (18, "0", "b")
    assert fitted(job_of(gpus_per_node=2, tasks_per_node=1), site).cpus_per_task == 36
    assert fitted(job_of(), site).cpus_per_task is None, "a job without GPUs has no share of theirs"
    own = fitted(job_of(gpus_per_node=2, cpus_per_task=3, mem="4G", constraint="c"), site)
    assert (own.cpus_per_task, own.mem, own.constraint) == (3, "4G", "c")
    taken_back = fitted(job_of(gpus_per_node=2, sbatch={"cpus-per-task": 5, "mem-per-cpu": "1G"}), site)
    assert (taken_back.cpus_per_task, taken_back.mem) == (None, None)
    assert fitted(job_of(gpus_per_node=1), site_of(cpus_per_gpu=32)).cpus_per_task == 32


def test_gpus_are_shared_out_among_ranks() -> None:
    assert gpus_per_rank(job_of(gpus_per_node=8, tasks_per_node=2).resources) == 4
