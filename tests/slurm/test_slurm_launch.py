"""``hpcds run`` inside real allocations: who its ranks are, what they hear, how they end."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import SlurmCluster

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LONG = os.environ.get("HPCDS_LONG") == "1"  # ranks that import torch take seconds each on a small machine
JOINED_RANKS = 32
ODD = "a,b  c'\"\\ $HOME `x`\t%n\nsecond=line é\n"

# A rank without torch: says who it is, and ends as it is told.
RANK = """
import json, os, signal, sys, time
rank = os.environ["RANK"]

def note(name, value=""):
    path = f"{os.environ['NOTES']}/{name}-{rank}"
    with open(f"{path}.{os.getpid()}", "w") as file:
        file.write(value)
    os.rename(f"{path}.{os.getpid()}", path)

def stopped(number, frame):
    note("stopped", str(number))
    sys.exit(75)

signal.signal(signal.SIGTERM, stopped)
signal.signal(signal.SIGUSR2, lambda number, frame: note("told", str(number)))
mpi = None
if "join" in sys.argv:
    from mpi4py import MPI
    mpi = [MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, MPI.COMM_WORLD.allreduce(1)]
names = ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "ODD"]
told = {name: os.environ.get(name) for name in names}
note("is", json.dumps({"node": os.environ["SLURMD_NODENAME"], "task": os.environ["SLURM_PROCID"], "mpi": mpi, **told}))
if "wait" in sys.argv:
    time.sleep(600)
if rank == "1" and "fail" in sys.argv:
    sys.exit(7)
"""

# Ranks of init_distributed: the sum of all of them, and where they are.
JOINED = """
import json, os, sys
import torch
import hpc_ds
hpc_ds.init_distributed()
total = torch.tensor([torch.distributed.get_rank() + 1])
torch.distributed.all_reduce(total)
rank = torch.distributed.get_rank()
told = [os.environ["SLURMD_NODENAME"], int(os.environ["LOCAL_RANK"]), int(total)]
with open(f"{sys.argv[-1]}/is-{rank}", "w") as file:
    json.dump(told, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


class Launching:
    """A cluster, a folder for programs and for what ranks write down, and how to call ``hpcds run`` there."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "rank.py").write_text(RANK)
        (folder / "joined.py").write_text(JOINED)
        self.exports = f"export OMP_NUM_THREADS=1 PYTHONPATH={REPOSITORY} SLURM_EXPORT_ENV=ALL"

    def notes(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def run(self, name: str, *words: str) -> str:
        """A line of shell that calls ``hpcds run`` with a folder of notes of that name, and says its exit code."""
        program = f"{sys.executable} -m hpc_ds run {' '.join(words)}"
        return f"NOTES={self.notes(name)} {program}; echo {name} $?"

    def script(self, *lines: str) -> str:
        return "\n".join(["#!/bin/bash", self.exports, f"cd {self.folder}", *lines, ""])

    def salloc(self, *options: str, lines: tuple[str, ...]) -> str:
        script = self.folder / "allocated.sh"
        script.write_text(self.script(*lines))
        done = self.cluster.run("salloc", *options, "bash", str(script))
        return done.stdout + done.stderr

    def ranks(self, name: str) -> list[dict[str, Any]]:
        paths = list(self.notes(name).glob("is-*"))
        return [json.loads((self.notes(name) / f"is-{rank}").read_text()) for rank in range(len(paths))]

    def places(self, name: str) -> list[tuple[str, str, str, str]]:
        """Node, local rank, ranks of the node, node rank: of each rank."""
        ranks = self.ranks(name)
        assert [rank["task"] for rank in ranks] == [str(number) for number in range(len(ranks))]
        assert {rank["WORLD_SIZE"] for rank in ranks} == {str(len(ranks))}
        return [(rank["node"], rank["LOCAL_RANK"], rank["LOCAL_WORLD_SIZE"], rank["GROUP_RANK"]) for rank in ranks]


@pytest.fixture
def launching(slurm_cluster: SlurmCluster, tmp_path: Path) -> Launching:
    return Launching(slurm_cluster, tmp_path)


def test_a_batch_script_runs_on_its_nodes(launching: Launching) -> None:
    job = launching.cluster.submit(
        launching.script(
            "export ODD=$(printf 'a,b\\nc=')",
            launching.run("all", "rank.py"),
            launching.run("some", "--include n3@n2:0", "--env-file odd", "rank.py"),
            launching.run("failing", "rank.py fail"),
            "exit 75",
        ),
        *["--nodes=2", "--nodelist=n2,n3", "--gpus-per-node=2", "--ntasks-per-node=2"],
    )
    (launching.folder / "odd").write_text("# ours\n\nODD=x, y='z' $HOME\n")
    state = launching.cluster.wait_for_state(job, "FAILED", timeout_s=120)
    assert state["ExitCode"] == "75:0", launching.cluster.output(job)
    output = launching.cluster.output(job)
    assert [line for line in output.splitlines() if line.startswith(("all ", "some ", "failing "))] == [
        *("all 0", "some 0", "failing 7")
    ], output
    assert "hpcds run: rank 1 on n2: exit code 7" in output

    assert launching.places("all") == [
        *[("n2", "0", "2", "0"), ("n2", "1", "2", "0"), ("n3", "0", "2", "1"), ("n3", "1", "2", "1")]
    ]
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in launching.ranks("all")} == {"0,1"}, "as Slurm has bound them"
    assert launching.places("some") == [("n2", "0", "1", "0"), ("n3", "0", "2", "1"), ("n3", "1", "2", "1")]
    assert {rank["ODD"] for rank in launching.ranks("some")} == {"x, y='z' $HOME"}


def test_allocations_of_other_shapes(launching: Launching) -> None:
    # Five tasks on two nodes of eight: Slurm packs four and one.
    said = launching.salloc(
        *("--nodes=2", "--ntasks=5", "--nodelist=n1,n4", "--distribution=cyclic"),
        lines=(launching.run("uneven", f"--env ODD={shell_quoted(ODD)}", "rank.py"),),
    )
    assert "uneven 0" in said, said
    counts = [places[2] for places in launching.places("uneven")]
    assert len(counts) == 5
    assert counts in (["4", "4", "4", "4", "1"], ["3", "3", "3", "2", "2"]), counts
    assert {rank["ODD"] for rank in launching.ranks("uneven")} == {ODD}

    said = launching.salloc(
        *("--nodes=1", "--ntasks=1", "--cpus-per-task=4", "--nodelist=n5", ":"),
        *("--nodes=2", "--ntasks-per-node=2", "--nodelist=n1,n2"),
        lines=(
            launching.run("het", "rank.py"),
            launching.run("part", "--exclude n1", "rank.py"),
        ),
    )
    assert "het 0" in said, said
    assert "part 0" in said, said
    assert launching.places("het") == [
        ("n5", "0", "1", "0"),
        *[("n1", "0", "2", "1"), ("n1", "1", "2", "1"), ("n2", "0", "2", "2"), ("n2", "1", "2", "2")],
    ]
    assert launching.places("part") == [("n5", "0", "1", "0"), ("n2", "0", "2", "1"), ("n2", "1", "2", "1")]


def test_signals_of_slurm_reach_ranks(launching: Launching) -> None:
    waiting = launching.run("signals", "rank.py wait")
    job = launching.cluster.submit(launching.script(waiting, "echo over"), "--nodes=2", "--ntasks-per-node=1")
    notes = launching.notes("signals")

    def noted(name: str) -> list[str]:
        paths = [notes / f"{name}-{rank}" for rank in range(2)]
        launching.cluster.wait_for(lambda: all(path.exists() for path in paths), 60, f"{name} of all ranks")
        return [path.read_text() for path in paths]

    noted("is")
    launching.cluster.run("scancel", "--signal=USR2", job)
    assert noted("told") == ["12", "12"]
    # What a preemption with grace does: SIGTERM to the step, and not to the script.
    launching.cluster.run("scancel", "--signal=TERM", job)
    assert noted("stopped") == ["15", "15"]
    launching.cluster.wait_for_state(job, "COMPLETED")
    assert launching.cluster.output(job).splitlines()[-2:] == ["signals 75", "over"]


def test_a_killed_launcher_leaves_no_rank(launching: Launching) -> None:
    """The job goes on, as a script does that has lost one of its commands."""
    notes, pid = launching.notes("killed"), launching.folder / "pid"
    lines = (launching.run("killed", "rank.py wait").replace(";", f" & echo $! > {pid}; wait $!;"), "sleep 600")
    launching.cluster.submit(launching.script(*lines), "--nodes=2", "--ntasks-per-node=1")
    started = [notes / "is-0", notes / "is-1"]
    launching.cluster.wait_for(lambda: all(path.exists() for path in started), 60, "both ranks")
    assert len(with_notes(notes)) > 4, "the launcher, srun, agents and ranks"
    os.kill(int(pid.read_text()), signal.SIGKILL)
    launching.cluster.wait_for(lambda: with_notes(notes) == [], 60, "no process of the launch")


def with_notes(notes: Path) -> list[int]:
    """The live processes of a launch, by a variable that all of them have."""
    mark = b"\0NOTES=%b\0" % os.fsencode(notes)
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark in b"\0" + (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.mpi
def test_mpi_knows_the_ranks_that_hpcds_run_starts(launching: Launching) -> None:
    link = launching.folder / "abi" / "libmpi.so.12"  # as the wheel of mpi4py looks for it
    link.parent.mkdir()
    link.symlink_to(next(Path("/usr/lib").glob("*/libmpich.so.12")))
    joined = ("--launcher_args=--mpi=pmi2", f"--env LD_LIBRARY_PATH={link.parent}", "rank.py join")
    said = launching.salloc("--nodes=2", "--ntasks-per-node=2", lines=(launching.run("mpich", *joined),))
    assert "mpich 0" in said, said
    assert [rank["mpi"] for rank in launching.ranks("mpich")] == [[rank, 4, 4] for rank in range(4)]


@pytest.fixture
def wide_cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path / "slurm", nodes=64, gpus_per_node=0) as cluster:
        yield cluster


def test_sixty_four_nodes(wide_cluster: SlurmCluster, tmp_path: Path) -> None:
    launching = Launching(wide_cluster, tmp_path)
    hello = "--no_python /bin/sh -c 'echo $RANK $SLURMD_NODENAME >$NOTES/at-$RANK' --"
    lines = [launching.run("wide", "--no_local_rank", hello)]
    if LONG:
        lines.append(
            launching.run("joined", f"--num_nodes {JOINED_RANKS}", "joined.py", str(launching.notes("joined")))
        )
    said = launching.salloc("--nodes=64", "--ntasks-per-node=1", lines=tuple(lines))
    assert "wide 0" in said, said
    told = {int(rank): node for rank, node in (path.read_text().split() for path in launching.notes("wide").iterdir())}
    assert told == {rank: f"n{rank + 1}" for rank in range(64)}
    if LONG:
        assert "joined 0" in said, said
        total = JOINED_RANKS * (JOINED_RANKS + 1) // 2
        assert launching.ranks("joined") == [[f"n{rank + 1}", 0, total] for rank in range(JOINED_RANKS)]


def shell_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
