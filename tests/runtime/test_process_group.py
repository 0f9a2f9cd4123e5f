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
from hpc_ds.runtime.descent import RANK_PROCESS
from hpc_ds.runtime.rank import Rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hosts import Hosts
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
def test_torchrun_and_a_restart_by_it(tmp_path: Path) -> None:
    """Its agent serves the store, with all that the first start has left there."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = start([*torchrun, SCRIPT, str(tmp_path)], {**os.environ, "FAIL_ON_START": "0"})
    check_world(found_in(tmp_path, done), [0, 1], "env")


@pytest.mark.mpi
def test_open_mpi_introduces_the_ranks(tmp_path: Path) -> None:
    """The second has only a sign of MPI left, as under a PMIx that is not Open MPI's."""
    rank = [sys.executable, SCRIPT, str(tmp_path)]
    bare = ["env", *(f"--unset=OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))]
    mpirun = ["mpirun", "--oversubscribe", "-n", "1", *rank, ":", "-n", "1", *bare, *rank]
    found = found_in(tmp_path, start(mpirun, {**os.environ, **ROOT_MPI}))
    assert [entry.pop("source") for entry in found] == ["openmpi", "mpi4py"]
    check_world([{**entry, "source": "MPI"} for entry in found], [0, 1], "MPI")


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
    srun = [
        "srun",
        "-N2",
        "-n4",
        "--ntasks-per-node=2",
        "-m",
        "cyclic",
        "--mpi=pmi2",
        "--time=2",
        sys.executable,
        SCRIPT,
        str(out),
    ]
    check_world(found_in(out, start(srun, env)), [0, 0, 1, 1], "slurm")
    assert not list((tmp_path / ".cache" / "hpcds" / "rendezvous").iterdir())


@pytest.mark.slurm
def test_one_step_over_a_heterogeneous_job(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Each component counts its local ranks from 0."""
    env = {**slurm_cluster.env, "HOME": str(tmp_path)}
    out = tmp_path / "out"
    out.mkdir()
    salloc = ["salloc", "-N1", "-n1", "--time=2", ":", "-N1", "-n2", "--time=2", "srun", "--het-group=0,1"]
    check_world(found_in(out, start([*salloc, sys.executable, SCRIPT, str(out)], env)), [0, 0, 1], "slurm")


@pytest.mark.slurm
def test_a_script_that_srun_did_not_start_is_refused(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    done = start(["salloc", "-n4", "--time=2", sys.executable, SCRIPT, str(tmp_path)], slurm_cluster.env)
    assert done.returncode == 1
    assert (
        "hpc_ds.errors.RankError: SLURM_NTASKS 4: this process was not started by srun, so the world is 1; start it with "
        "srun or hpcds run (one process alone: srun --ntasks=1)"
    ) in done.stderr


@pytest.mark.slurm
def test_srun_with_rank_0_on_the_last_node(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """``-m arbitrary`` puts rank 0 where a file says; SLURM_STEP_NODELIST still reads n[1-2]."""
    (tmp_path / "hosts").write_text("n2\nn1\n")
    env = {**slurm_cluster.env, "HOME": str(tmp_path), "SLURM_HOSTFILE": str(tmp_path / "hosts")}
    out = tmp_path / "out"
    out.mkdir()
    srun = ["srun", "-N2", "-n2", "-m", "arbitrary", "--time=2", sys.executable, SCRIPT, str(out)]
    check_world(found_in(out, start(srun, env)), [0, 0], "slurm")


@pytest.mark.hosts
@pytest.mark.ranks
def test_ranks_on_several_hosts_meet_over_the_network(hosts: Hosts, tmp_path: Path) -> None:
    """Each host's own name resolves to 127.0.1.1 there, which gloo would take; rank 0 is on the last."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    (run / "site.json").write_text(json.dumps({"interfaces": ["eth0"], "port_range": [20000, 29999]}))
    common = {
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "HPCDS_RUN_DIR": str(run),
        "HPCDS_ATTEMPT": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, SCRIPT, str(out)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [hosts.start_on(2 - rank, command, {**common, "RANK": str(rank)}, **pipes) for rank in range(3)]
    said = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    check_world(found, [0, 0, 0], "env")
    assert [entry["interface"] for entry in found] == ["eth0"] * 3


def test_a_site_s_interface_that_is_not_here_is_passed_over(tmp_path: Path) -> None:
    me = Rank(0, 0, 2, None, "env")
    (tmp_path / "site.json").write_text(json.dumps({"interfaces": ["no-such-interface"]}))
    environ = {"HPCDS_RUN_DIR": str(tmp_path)}
    assert rendezvous._own_hosts(me, environ, []) == rendezvous._own_hosts(me, {}, [])
    assert rendezvous._own_hosts(me, {**environ, "NCCL_SOCKET_IFNAME": "=lo"}, []) == ["127.0.0.1"]
    assert rendezvous._own_hosts(Rank(0, 0, 2, 2, "env"), environ, []) == ["127.0.0.1"]


RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
MASTER = {"MASTER_ADDR": "127.0.0.1"}
# Variables, arguments -> what the message says. FREE is a port where nobody listens, TAKEN one where somebody else does.
WRONG: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "only RANK": ({"RANK": "0"}, {}, "WORLD_SIZE, LOCAL_RANK: not set, while RANK='0'"),
    "only an address": (
        {**RANK_0, **MASTER}, {}, "MASTER_ADDR '127.0.0.1', MASTER_PORT None: only one is set; set both or none",
    ),
    "only a port": ({**RANK_0, "MASTER_PORT": "FREE"}, {}, "MASTER_ADDR None, MASTER_PORT 'FREE': only one is set"),
    "nowhere to meet": (RANK_0, {}, "rank 0 of 2: MASTER_ADDR and MASTER_PORT are not set, and there is neither"),
    "no port": ({**RANK_0, **MASTER, "MASTER_PORT": "http"}, {}, "MASTER_PORT 'http': not a port; use a number from 1"),
    "port 0": ({**RANK_0, **MASTER, "MASTER_PORT": "0"}, {}, "MASTER_PORT '0': not a port; use a number from 1 to 65535"),
    "a port of another's": (
        {**RANK_0, **MASTER, "MASTER_PORT": "TAKEN"}, {},
        "MASTER_PORT TAKEN: rank 0 cannot listen there: address already in use; choose another, or none and leave",
    ),
    "the others do not come": (
        {**RANK_0, **MASTER, "MASTER_PORT": "FREE"}, {},
        "rank 1 of 2: did not come within 1 s; rank 0 at MASTER_ADDR '127.0.0.1', MASTER_PORT FREE; look at their logs",
    ),
    "an address of another host": (
        {**RANK_0, "MASTER_ADDR": "192.0.2.77", "MASTER_PORT": "FREE"}, {},
        ", and whether '192.0.2.77' is rank 0's host: it is not",
    ),
    "rank 0 does not come": (
        {**RANK_1, **MASTER, "MASTER_PORT": "FREE"}, {},
        "rank 0 at MASTER_ADDR '127.0.0.1', MASTER_PORT FREE: rank 1 has not met it in 1 s: nobody listens there; did rank 0",
    ),
    "a name of no host": (
        {**RANK_1, "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "FREE"}, {},
        "rank 0 at MASTER_ADDR 'no-such-host.invalid', MASTER_PORT FREE: rank 1 has not met it in ",
    ),
    "somebody else answers": (
        {**RANK_1, **MASTER, "MASTER_PORT": "TAKEN"}, {}, "something else than a store listens there; choose another port",
    ),
    "the port as an argument": (
        {**RANK_1, **MASTER}, {"distributed_port": 9}, "rank 0 at MASTER_ADDR '127.0.0.1', MASTER_PORT 9: rank 1 has not",
    ),
    "the place as an argument": (
        {}, {"init_method": "tcp://127.0.0.1:9", "rank": 1, "world_size": 2},
        "rank 0 at MASTER_ADDR '127.0.0.1', MASTER_PORT 9: rank 1",
    ),
    "no such rank": ({}, {"rank": 2, "world_size": 2}, "init_distributed: rank 2 of a world of 2; ranks count from 0"),
    "MPI as the backend": ({}, {"dist_backend": "mpi"}, "dist_backend 'mpi': torch has it only if it was built against your MPI"),
    "MPI as a backend": ({}, {"dist_backend": "cpu:mpi,cuda:nccl"}, "dist_backend 'cpu:mpi,cuda:nccl': torch has it only"),
    "nccl without a device": ({}, {"dist_backend": "nccl"}, "dist_backend 'nccl': this process sees no CUDA device; look at"),
    "MPI may not be asked": (
        {"PMIX_RANK": "1"}, {"auto_mpi_discovery": False}, "PMIX_RANK '1': this is a process of MPI's, which may not be asked",
    ),
    "not initialised": ({}, {"dist_init_required": False}, "init_distributed: dist_init_required is False, but no process"),
    "no interface of that name": (
        {**RANK_0, "HPCDS_RUN_DIR": "RUN", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "NCCL_SOCKET_IFNAME": "=nosuch0"}, {},
        "interfaces '=nosuch0': none of them has an address on ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("env", "arguments", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_sentence(
    env: dict[str, str], arguments: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process_group.preemption, "attend", lambda *_: None)
    with socket.socket() as taken, socket.socket() as free:
        for bound in (taken, free):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a store may listen on the free one
            bound.bind(("", 0))
        taken.listen()
        names = {"TAKEN": str(taken.getsockname()[1]), "FREE": str(free.getsockname()[1]), "RUN": str(tmp_path)}
        for name, value in env.items():
            monkeypatch.setenv(name, names.get(value, value))
        with pytest.raises(RankError) as caught:
            process_group.init_distributed(timeout=timedelta(seconds=1), **arguments)
    for name, value in names.items():
        words = words.replace(name, value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("local_rank", "current", "devices", "chosen"), [(2, 0, 4, [2]), (2, 3, 4, []), (2, 0, 1, []), (0, 0, 4, [0])]
)
def test_a_script_that_has_chosen_no_device_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, current: int, devices: int, chosen: list[int]
) -> None:
    """Where it made the process group itself: all ranks of a node would share the first device otherwise."""
    found: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv(RANK_PROCESS, "")  # which it will set
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
