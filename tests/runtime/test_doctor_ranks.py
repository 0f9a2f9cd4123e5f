"""One rank of the doctor: what it finds out about its node, and what it tells when it cannot go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.runtime import node_facts

if TYPE_CHECKING:
    from pathlib import Path

ROOT_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
DOCTOR = [sys.executable, "-m", "hpc_ds.runtime.doctor"]


def start(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*env.pop("first", "").split(), *filter(None, sys.path)])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return record


def test_a_torch_that_cannot_be_loaded_is_told_and_the_rank_ends(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    done = start([*DOCTOR, "--folder", str(tmp_path)], first=str(tmp_path), RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert done.returncode == 1, done.stderr
    record = told(tmp_path)
    assert (record["phase"], record["rank"], record["world_size"]) == ("done", 0, 2)
    assert record["errors"] == {"torch": "ImportError: libtorch.so: cannot open shared object file"}
    assert record["memory"]["available_mib"] > 0


def test_a_rank_that_hangs_says_where_and_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
    done = start([*DOCTOR, "--folder", str(tmp_path), "--limit", "1"], first=str(tmp_path))
    assert done.returncode == 1, done.stderr
    record = told(tmp_path)
    assert (record["phase"], record["stuck"]) == ("looking", True)
    assert record["doing"], "on a busy machine it may still be at something before torch"


def test_a_process_that_is_no_rank_says_so() -> None:
    done = start(DOCTOR, RANK="one", WORLD_SIZE="2", LOCAL_RANK="0")
    assert done.returncode != 0
    assert "RANK 'one': not a whole number" in done.stderr
    assert done.stdout == ""


@pytest.mark.mpi
def test_mpi_and_its_launcher_are_held_against_each_other(tmp_path: Path) -> None:
    done = start(["mpirun", "--oversubscribe", "-n", "2", *DOCTOR, "--folder", str(tmp_path)], **ROOT_MPI)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        record = told(tmp_path, rank)
        assert (record["phase"], record["source"], record["errors"]) == ("done", "openmpi", {})
        assert (record["mpi"]["rank"], record["mpi"]["world_size"]) == (rank, 2)
        assert "OMPI_COMM_WORLD_RANK" in record["mpi_signs"]


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    found = node_facts.folder(str(tmp_path))
    assert found["free_mib"] > 0
    assert found["write_s"] >= 0
    assert "error" not in found
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_used_has_a_reason(tmp_path: Path) -> None:
    assert node_facts.folder(str(tmp_path / "none")) == {
        "path": str(tmp_path / "none"),
        "error": "No such file or directory",
    }
    (tmp_path / "file").write_text("")
    assert node_facts.folder(str(tmp_path / "file"))["error"] == "Not a directory"


def test_a_function_that_does_not_end_is_left_behind() -> None:
    import threading

    never = threading.Event()
    assert not node_facts.within(0.01, never.wait)
    never.set()
    assert node_facts.within(60.0, lambda: None)


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 1\ninactive_file 50\n"}, 650),
        ({"memory.max": "max", "memory.current": "400"}, None),
        (
            {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400", "memory.stat": "total_inactive_file 7\n"},
            607,
        ),
        ({"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "400"}, None),
        ({}, None),
    ],
)
def test_what_a_cgroup_allows(files: dict[str, str], room: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert node_facts._room(tmp_path) == room


def test_facts_of_this_machine() -> None:
    memory = node_facts.memory()
    assert 0 < memory["available_mib"] <= memory["total_mib"]
    assert node_facts.cores() == sorted(os.sched_getaffinity(0))
    assert set(node_facts.limits()) == {"open_files", "locked_mib"}
    assert node_facts.versions()["python"] == sys.version.split()[0]
