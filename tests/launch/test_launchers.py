"""``hpcds run`` over real hosts with every launcher: the same ranks, environment, signals, exit codes and clean end.

Hosts are network namespaces with sshd (tests/hosts.py). Ranks import neither torch nor hpc_ds, but for one all-reduce.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from hosts import Hosts

pytestmark = [pytest.mark.hosts, pytest.mark.mpi]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LAUNCHERS = ["ssh", "pdsh", "openmpi", "mpich"]
OF_MPI = {"openmpi", "mpich"}
HOSTFILE = "w3 slots=2\nw1 slots=1  # the launcher's own host, not the first\n\nw2 slots=2\n"
PLACES = [("w3", 0, 2, 0), ("w3", 1, 2, 0), ("w1", 0, 1, 1), ("w2", 0, 2, 2), ("w2", 1, 2, 2)]
ODD = "a,b  c'\"\\ $HOME `x`\t%n\nsecond=line é\n"
ODD_BYTES = os.fsdecode(b"\xff\xfe,\x01")

# Writes down who it is, meets the others at MASTER_ADDR, then waits for what its last argument says.
RANK = """
import json, os, signal, socket, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder, way = sys.argv[-2:]

def note(name, value=""):
    with open(f"{folder}/{name}-{rank}.part", "w") as file:
        file.write(value)
    os.rename(f"{folder}/{name}-{rank}.part", f"{folder}/{name}-{rank}")

def meet():
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        while True:
            try:
                return socket.create_connection(place, 5).recv(1)
            except OSError:
                time.sleep(0.05)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", place[1]))
        listener.listen(64)
        for _ in range(world - 1):
            listener.accept()[0].send(b"!")

def stopped(number, frame):
    note("stopped", str(number))
    sys.exit(75 if way == "stop" else 0)

signal.signal(signal.SIGTERM, stopped)
signal.signal(signal.SIGUSR2, lambda number, frame: note("told", str(number)))
mpi = None
if way in ("stop", "world"):
    meet()
if os.environ.get("JOIN"):
    from mpi4py import MPI
    mpi = [MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, MPI.COMM_WORLD.allreduce(1)]
print(f"out of {rank}")
print(f"err of {rank}", file=sys.stderr)
names = [name for name in os.environ if name.startswith(("HPCDS_", "ODD", "MINE")) or name in %(names)r]
names = [name for name in names if name != "HPCDS_REQUIRE_SLURM"]  # of continuous integration
note("is", json.dumps({
    "host": os.uname().nodename, "cwd": os.getcwd(), "argv": sys.argv[1:-2], "mpi": mpi,
    "env": {name: os.environ[name] for name in names}, "stdin": os.readlink("/proc/self/fd/0"),
}))
while way != "fail" or not os.path.exists(f"{folder}/go"):
    time.sleep(0.02)
if rank == 3:
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "kill" else sys.exit(7)
time.sleep(600)
"""
NAMES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"),
]


class Launch:
    """One ``hpcds run`` on the first host, and what its ranks write down."""

    def __init__(self, hosts: Hosts, folder: Path, launcher: str) -> None:
        self.hosts, self.folder, self.launcher = hosts, folder, launcher
        self.program = folder / "rank.py"
        self.program.write_text(RANK % {"names": NAMES})
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text(HOSTFILE)
        self.process: subprocess.Popen[str] | None = None

    def start(self, *words: str, options: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "hpc_ds", "run", "--launcher", self.launcher, "--hostfile", str(self.hostfile)]
        if self.launcher == "mpich":
            options = ("--env", f"LD_LIBRARY_PATH={mpich_for_mpi4py(self.folder)}", *options)
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            program = [] if "--no_python" in options else [str(self.program)]
            self.process = self.hosts.start_on(
                0, [*argv, *options, *program, *words], env, stdout=out, stderr=err, text=True, cwd=self.folder
            )
        return self.process

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=120)

    def noted(self, name: str, count: int = len(PLACES)) -> list[str]:
        """Wait until that many ranks have written something down, and return it."""
        assert self.process is not None
        paths = [self.folder / f"{name}-{rank}" for rank in range(count)]
        while not all(path.exists() for path in paths):
            time.sleep(0.02)
            assert self.process.poll() is None or all(path.exists() for path in paths), self.out + self.err
        return [path.read_text() for path in paths]

    def ranks(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.noted("is")]


def mpich_for_mpi4py(folder: Path) -> Path:
    """A folder where the wheel of mpi4py finds Debian's MPICH, which has another name there."""
    link = folder / "abi" / "libmpi.so.12"
    if not link.is_symlink():
        link.parent.mkdir()
        link.symlink_to(next(Path("/usr/lib").glob("*/libmpich.so.12")))
    return link.parent


@pytest.fixture(params=LAUNCHERS)
def launch(request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path) -> Iterator[Launch]:
    it = Launch(hosts, tmp_path, request.param)
    yield it
    if it.process is not None and it.process.poll() is None:
        it.process.kill()
        it.process.wait()


def test_ranks_are_where_the_plan_says_and_hear_signals(launch: Launch) -> None:
    joins = {"JOIN": "1"} if launch.launcher in OF_MPI else {}
    given = {"ODD": ODD, "ODD_BYTES": ODD_BYTES, **joins}
    options = tuple(word for name, value in given.items() for word in ("--env", f"{name}={value}"))
    (launch.folder / ".deepspeed_env").write_text("# ours\n\nMINE=a, b='c'\n")
    process = launch.start(
        ODD, ODD_BYTES, "--", "", str(launch.folder), "stop", options=options, CUDA_VISIBLE_DEVICES="7"
    )

    ranks = launch.ranks()
    common = {"WORLD_SIZE": "5", "CROSS_SIZE": "3", "MASTER_ADDR": launch.hosts.address(2)}
    common |= {"ODD": ODD, "ODD_BYTES": ODD_BYTES, "MINE": "a, b='c'"}
    assert len({rank["env"].pop("MASTER_PORT") for rank in ranks}) == 1
    for number, (rank, (host, local, of, node)) in enumerate(zip(ranks, PLACES, strict=True)):
        assert rank["host"] == host
        assert rank["env"] == {
            **common,
            "RANK": str(number),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(of),
            "LOCAL_SIZE": str(of),
            "GROUP_RANK": str(node),
            "CROSS_RANK": str(node),
        }
        assert rank["argv"] == [f"--local_rank={local}", ODD, ODD_BYTES, "--", ""]
        assert (rank["cwd"], rank["stdin"]) == (str(launch.folder), "/dev/null")
        assert rank["mpi"] == ([number, 5, 5] if joins else None), "MPI's ranks are ours"

    process.send_signal(signal.SIGUSR2)
    assert launch.noted("told") == [str(int(signal.SIGUSR2))] * 5
    process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.err
    assert launch.noted("stopped") == [str(int(signal.SIGTERM))] * 5
    assert sorted(launch.out.splitlines()) == [f"out of {rank}" for rank in range(5)]
    assert sorted(line for line in launch.err.splitlines() if line.startswith("err of")) == [
        f"err of {rank}" for rank in range(5)
    ]


def test_the_first_failure_ends_all_and_is_named(launch: Launch) -> None:
    dies, code, words = (
        ("kill", 137, "killed by SIGKILL (out of memory?)")
        if launch.launcher in {"pdsh", "mpich"}
        else ("exit", 7, "exit code 7")
    )
    launch.program.write_text(launch.program.read_text().replace("sys.argv[1]", repr(dies)))
    launch.start(str(launch.folder), "fail")
    launch.ranks()
    (launch.folder / "go").touch()
    assert launch.wait() == code, launch.err
    assert launch.err.splitlines()[-1] == f"hpcds run: rank 3 on w2: {words}"
    others = [rank for rank in range(5) if (launch.folder / f"stopped-{rank}").exists()]
    assert others == [0, 1, 2, 4], "all others were told to end"


def test_a_killed_launcher_leaves_nothing_on_any_host(launch: Launch) -> None:
    process = launch.start(str(launch.folder), "wait", options=("--no_local_rank",))
    launch.ranks()
    process.kill()
    launch.wait()
    assert launch.hosts.left() == []
    assert launch.noted("stopped") == [str(int(signal.SIGTERM))] * 5, "ranks were asked to end, before they were killed"


def test_a_host_that_refuses_is_named(launch: Launch) -> None:
    launch.hosts.stop_sshd(1)
    try:
        launch.start(str(launch.folder), "wait")
        assert launch.wait() == 1
    finally:
        launch.hosts.start_sshd(1)
    said = launch.err.splitlines()[-1]
    assert "ssh: connect to host w2 port 22: Connection refused" in said
    assert len(said) < 600, said
    assert launch.out == ""


def test_another_port_of_ssh(launch: Launch) -> None:
    launch.hostfile.write_text("w2 slots=1\n")
    launch.hosts.stop_sshd(1)
    launch.hosts.start_sshd(1, port=2222)
    try:
        launch.start("-c", "hostname", options=("--ssh_port", "2222", "--no_python", "--no_local_rank", "/bin/sh"))
        assert launch.wait() == 0, launch.err
    finally:
        launch.hosts.stop_sshd(1)
        launch.hosts.start_sshd(1)
    assert launch.out == "w2\n"


def test_a_host_that_dies_ends_the_launch(launch: Launch) -> None:
    launch.start(str(launch.folder), "wait")
    launch.ranks()
    launch.hosts.kill_host(1)
    code = launch.wait()
    said = launch.err.splitlines()[-1]
    # Whether its agent or its rank is killed first is chance.
    assert (code, "lost with its ranks" in said) in {(1, True), (137, False)}, said
    assert "w2" in said
    assert launch.hosts.left() == []


REDUCE = """
import os, sys
import torch
import hpc_ds
hpc_ds.init_distributed()
total = torch.tensor([torch.distributed.get_rank() + 1])
torch.distributed.all_reduce(total)
with open(f"{sys.argv[-1]}/of-{torch.distributed.get_rank()}", "w") as file:
    print(os.uname().nodename, os.environ["LOCAL_RANK"], total.item(), file=file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["hpcds run", "mpirun"])
def test_gloo_finds_its_way_between_hosts(way: str, hosts: Hosts, tmp_path: Path) -> None:
    """Each host calls itself 127.0.1.1, where gloo would listen."""
    (tmp_path / "reduce.py").write_text(REDUCE)
    (tmp_path / "hostfile").write_text("w3 slots=2\nw2 slots=1\n")
    script = [str(tmp_path / "reduce.py"), str(tmp_path)]
    if way == "hpcds run":
        argv = [sys.executable, "-m", "hpc_ds", "run", "--hostfile", str(tmp_path / "hostfile"), *script]
    else:
        options = [
            "--allow-run-as-root",
            "--map-by",
            "slot",
            "--oversubscribe",
            "--bind-to",
            "none",
            "-x",
            "PYTHONPATH",
        ]
        argv = ["mpirun.openmpi", *options, "--host", "w3:2,w2:1", sys.executable, *script]
    done = hosts.run_on(0, argv, {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"of-{rank}").read_text() for rank in range(3)] == ["w3 0 6\n", "w3 1 6\n", "w2 0 6\n"]
