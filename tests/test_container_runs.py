"""A whole run whose ranks are started through a container's program.

The program is a stand-in, for neither apptainer nor shifter is among Debian's packages: it takes their options apart as
they do, and runs the command where it is told. What is real is everything around it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program
from whole_runs import Runs

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

# Options with "=" up to the image, then the command.
APPTAINER = """
[ "$1" = exec ] || exit 2
shift
while [[ "$1" == --* ]]; do
    case "$1" in
        --bind=*) printf '%s\\n' "${1#*=}" >> "$HPCDS_RUN_DIR/mounted-$RANK$SLURM_PROCID" ;;
        --pwd=*) cd "${1#*=}" || exit 3 ;;
    esac
    shift
done
export IMAGE="$1"
shift
exec "$@"
"""
PROGRAM = """
import json, os, sys, pathlib
from hpc_ds.runtime.run import CurrentRun
run = CurrentRun.from_environment()
rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
seen = {"image": os.environ["IMAGE"], "cwd": os.getcwd(), "args": sys.argv[1:], "attempt": run.attempt}
folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
seen["ours"] = [pathlib.Path(folder).name for folder in folders if "/hpc_ds/compat/" in folder]
pathlib.Path(run.files.root, f"seen-{rank}.json").write_text(json.dumps(seen))
sys.exit(75 if run.attempt == 1 else 0)
"""
ARGS = ["a b", "it's $HOME"]


def check_run(folder: Path, env: dict[str, str], site: str, compat: str | None = None) -> None:
    fake_program(folder / "bin", "apptainer", APPTAINER)
    (folder / "train.py").write_text(PROGRAM)
    (folder / "torch 2.sif").write_text("")
    runtime: dict[str, Any] = {
        "kind": "apptainer",
        "image": "torch 2.sif",
        "python": sys.executable,
        "binds": ["/data"],
    }
    job = {"script": "train.py", "args": ARGS, "runtime": runtime, "resources": {"tasks_per_node": 2}, "compat": compat}
    (folder / "job.json").write_text(json.dumps(job))
    runs = Runs(folder, {**env, "PATH": f"{folder / 'bin'}:{env['PATH']}"})
    run = runs.submit(folder / "job.json", "--site", site, "--time", "10")
    assert run.wait_until_over()["state"] == "finished", run.story()
    assert [attempt["cause"] for attempt in run.status()["attempts"]] == ["stopped", "finished"], run.story()
    for rank in range(2):
        seen = json.loads((run.folder / f"seen-{rank}.json").read_text())
        assert seen == {
            "image": str(folder / "torch 2.sif"),
            "cwd": str(folder),
            "args": ARGS,
            "attempt": 2,
            "ours": ["path", "startup"] if compat else [],  # paths of the host are none of the container's
        }
        assert set((run.folder / f"mounted-{rank}").read_text().splitlines()) == {str(folder), "/data"}


@pytest.mark.local
def test_ranks_in_a_container_on_this_machine(tmp_path: Path) -> None:
    check_run(tmp_path, dict(os.environ), "local", "deepspeed")


@pytest.mark.slurm
def test_ranks_in_a_container_under_srun(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    check_run(tmp_path, slurm_cluster.env, "slurm")


@pytest.mark.slurm
@pytest.mark.parametrize(("kind", "option"), [("pyxis", "--container-image=torch"), ("edf", "--environment=")])
def test_options_of_a_container_reach_srun(kind: str, option: str, slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """This Slurm has neither plugin: its srun refuses the option, which shows that it was given."""
    job = {"command": ["true"], "runtime": {"kind": kind, "image": "torch"}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run = Runs(tmp_path, slurm_cluster.env).submit(tmp_path / "job.json", "--site", "slurm", "--time", "10")
    assert run.wait_until_over()["state"] == "held", run.story()
    said = (run.folder / "logs" / "attempt-1" / "launcher.log").read_text()
    assert f"srun: unrecognized option '{option}" in said
    if kind == "edf":
        assert 'base_environment = ["torch"]' in (run.folder / "environment.toml").read_text()
