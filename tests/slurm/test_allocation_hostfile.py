"""What `hpcds hostfile` and `hpcds run` make of a real allocation of two components, asked for with --gres."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

ASK = "{python} -m hpc_ds hostfile && {python} -m hpc_ds run --dry-run --json --no_python hostname"


def test_the_hosts_of_a_heterogeneous_allocation(slurm_cluster: SlurmCluster) -> None:
    ask = ASK.format(python=sys.executable)
    first, second = ["-N1", "--gres=gpu:2"], ["-N2", "-n4"]
    said = slurm_cluster.run("salloc", *first, ":", *second, "sh", "-c", ask).stdout
    *lines, plan = said.splitlines()
    hosts = [line.split(" slots=") for line in lines]
    assert [int(slots) for _, slots in hosts] == [2, 3, 1]
    told = json.loads(plan)
    assert (told["launcher"], told["world_size"]) == ("slurm", 6)
    assert [host["name"] for host in told["hosts"]] == [name for name, _ in hosts]
    assert [len(host["ranks"]) for host in told["hosts"]] == [2, 3, 1]
