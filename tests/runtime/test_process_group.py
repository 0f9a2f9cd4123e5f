"""init_distributed under the real launchers: torchrun, mpirun, srun, and none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.errors import RankError
from hpc_ds.runtime import process_group, rendezvous
from hpc_ds.runtime.rank import Rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slurm_cluster import SlurmCluster

MPIEXEC_OF_MPICH = "mpiexec.hydra"
SCRIPT = str(Path(__file__).with_name("who_am_i.py"))
ROOT_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def start(command: list[str], env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False
    )


def found_in(folder: Path, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def check_world(found: list[dict[str, Any]], local_ranks: list[int], source: str) -> None:
    size = len(local_ranks)
    assert [entry["rank"] for entry in found] == list(range(size))
    assert [entry["local_rank"] for entry in found] == local_ranks
    assert {entry["source"] for entry in found} == {source}
    assert {entry["sum"] for entry in found} == {sum(range(size))}
    assert [entry["env"] for entry in found] == [str(rank) for rank in range(size)]


@pytest.mark.ranks
def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    check_world(found_in(tmp_path, start([sys.executable, SCRIPT, str(tmp_path)])), [0], "single")


@pytest.mark.ranks
def test_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    check_world(found_in(tmp_path, start([*torchrun, SCRIPT, str(tmp_path)])), [0, 1], "env")


@pytest.mark.mpi
def test_open_mpi_introduces_the_ranks(tmp_path: Path) -> None:
    mpirun = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, SCRIPT, str(tmp_path)]
    check_world(found_in(tmp_path, start(mpirun, {**os.environ, **ROOT_MPI})), [0, 1], "openmpi")


@pytest.mark.mpi
def test_mpich_introduces_the_ranks(tmp_path: Path) -> None:
    """Though mpi4py, asked by itself, would load Open MPI and find every process alone: mpiexec itself is asked."""
    mpiexec = [MPIEXEC_OF_MPICH, "-n", "2", sys.executable, SCRIPT, str(tmp_path)]
    check_world(found_in(tmp_path, start(mpiexec)), [0, 1], "pmi")


@pytest.mark.slurm
def test_srun_without_a_run_folder(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    env = {**slurm_cluster.env, "HOME": str(tmp_path)}
    out = tmp_path / "out"
    out.mkdir()
    srun = ["srun", "-N2", "--ntasks-per-node=2", "--time=2", sys.executable, SCRIPT, str(out)]
    check_world(found_in(out, start(srun, env)), [0, 1, 0, 1], "slurm")


@pytest.mark.slurm
def test_srun_with_rank_0_on_the_last_node(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """``-m arbitrary`` puts rank 0 where a file says; SLURM_STEP_NODELIST still reads n[1-2]."""
    (tmp_path / "hosts").write_text("n2\nn1\n")
    env = {**slurm_cluster.env, "HOME": str(tmp_path), "SLURM_HOSTFILE": str(tmp_path / "hosts")}
    out = tmp_path / "out"
    out.mkdir()
    srun = ["srun", "-N2", "-n2", "-m", "arbitrary", "--time=2", sys.executable, SCRIPT, str(out)]
    check_world(found_in(out, start(srun, env)), [0, 0], "slurm")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE, LOCAL_RANK: not set", "RANK='0'"]),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK 'x': not a whole number", "WORLD_SIZE='2'"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK 2: does not fit", "WORLD_SIZE='2'"]),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, ["SLURM_STEP_NUM_TASKS, SLURM_LOCALID: not set"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
            ["MASTER_ADDR 'localhost', MASTER_PORT None: only one is set"],
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["MASTER_ADDR and MASTER_PORT are not set"]),
    ],
)
@pytest.mark.ranks
def test_wrong_variables_are_listed(env: dict[str, str], words: list[str], tmp_path: Path) -> None:
    done = start([sys.executable, SCRIPT, str(tmp_path)], {**os.environ, **env})
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("hpc_ds.errors.RankError: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("local_rank", "current", "devices", "chosen"), [(2, 0, 4, [2]), (2, 3, 4, []), (2, 0, 1, []), (0, 0, 4, [0])]
)
def test_a_script_that_has_chosen_no_device_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, current: int, devices: int, chosen: list[int]
) -> None:
    """Where it made the process group itself: all ranks of a node would share the first device otherwise."""
    found: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(process_group.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(process_group.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(process_group.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process_group.torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(process_group.torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(process_group.torch.cuda, "set_device", found.append)
    process_group.init_distributed()
    assert found == chosen


def test_rank_0_listens_where_the_site_allows_it(tmp_path: Path) -> None:
    environ = {"HPCDS_RUN_DIR": str(tmp_path), "HPCDS_ATTEMPT": "1"}
    assert rendezvous.allowed_ports({}) == rendezvous.allowed_ports(environ) == [0]
    for given, ports in (([7000, 7000], [7000]), ([7000, 7002], [7002, 7000, 7001]), (None, [0]), ([7000], [0])):
        (tmp_path / "site.json").write_text(json.dumps({"port_range": given}))
        assert rendezvous.allowed_ports(environ) == ports
    (tmp_path / "site.json").write_text(json.dumps({"port_range": [10000, 29999]}))
    first, second = (rendezvous.allowed_ports({**environ, "HPCDS_ATTEMPT": number}) for number in "12")
    assert (len(first), len({*first, *second})) == (50, 100)


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    me, deadline = Rank(0, 0, 2, 2, "env"), rendezvous.Deadline(timedelta(seconds=20))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(rendezvous, "allowed_ports", lambda _: [port, 0])
        store, published = rendezvous._listen(me, 0, deadline, [])
        assert store.port == published.port != port
        assert published.hosts == ("127.0.0.1",)
        assert rendezvous._Published.read(published.text()) == published
        with pytest.raises(RankError, match=f"port {port}: rank 0 cannot listen there: address already in use; choose"):
            rendezvous._listen(me, port, deadline, [])
