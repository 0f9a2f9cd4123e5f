"""A container that has srun and sbatch, but no scontrol: the run goes on as a job of its own."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from whole_runs import Runs

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

STEPS = 60
LOOP = f"""
import time
from pathlib import Path
import hpc_ds
from hpc_ds import preemption

done = Path("done")
for step in range(int(done.read_text()) + 1 if done.exists() else 1, {STEPS} + 1):
    time.sleep(0.2)
    done.write_text(str(step))
    preemption.step(step)
    if preemption.requested():
        raise hpc_ds.Preempted()
"""


def test_without_scontrol_a_successor_goes_on(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("srun", "sbatch"):
        found = shutil.which(program, path=slurm_cluster.env["PATH"])
        assert found is not None
        (tmp_path / "bin" / program).symlink_to(found)
    (tmp_path / "loop.py").write_text(LOOP)
    job = {"script": "loop.py", "resources": {"time": "10"}, "setup": [f"export PATH='{tmp_path / 'bin'}'"]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run = Runs(tmp_path, slurm_cluster.env).submit(tmp_path / "job.json", "--site", "slurm")
    run.wait_for_step(3)
    slurm_cluster.run("scancel", "--signal=TERM", run.job_id)
    status = run.wait_until_over()
    assert [(one["cause"], one["action"]) for one in status["attempts"]] == [
        ("stopped", "successor"), ("finished", "finish"),
    ], run.story()  # fmt: skip
    first, second = (one["job_id"] for one in status["attempts"])
    assert (first, status["job_id"]) == (run.job_id, second)
    assert first != second
    assert [step["step"] for step in run.steps()] == list(range(1, STEPS + 1))
    said = (run.folder / "logs" / "scheduler.log").read_text()
    assert said.count("scontrol: no such program on PATH") >= 1
    assert f"successor: job {second} goes on when this one has ended" in said
