"""Commands, loops and files as the guides of DeepSpeed have them, for real: each ends in ranks that train on hpc_ds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from whole_runs import Runs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hosts import Hosts
    from slurm_cluster import SlurmCluster

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GUIDE = Path(__file__).with_name("guide.py")
WRAPPER = [sys.executable, "-m", "hpc_ds.compat"]
ENVIRON = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

# The config of the guide, as it stands there.
CONFIG = """{
  "train_batch_size": 8,
  "gradient_accumulation_steps": 1,
  "optimizer": {
    "type": "Adam",
    "params": {
      "lr": 0.00015
    }
  },
  "fp16": {
    "enabled": true
  },
  "zero_optimization": true
}
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the script and the config of a guide, and a home without files."""
    shutil.copy(GUIDE, tmp_path / "train.py")
    (tmp_path / "ds_config.json").write_text(CONFIG)
    (tmp_path / "home").mkdir()
    return tmp_path


def start(command: Sequence[str], here: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    around = {**os.environ, **ENVIRON, "HOME": str(here / "home"), **environ}
    done = subprocess.run(command, cwd=here, env=around, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def told(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """What the ranks wrote down, once it was looked at that they trained as the config says."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert len(list(folder.iterdir())) == world_size
    for rank in ranks:
        assert rank["package"] == str(REPOSITORY / "hpc_ds" / "compat" / "path" / "deepspeed" / "__init__.py")
        assert (rank["micro_batch"], rank["stage"], rank["engine"]) == (8 // world_size, 1, True)
        assert rank["parameters"] == ranks[0]["parameters"]
    return ranks


@pytest.mark.ranks
def test_deepspeed_train_and_a_checkpoint_by_its_loss(here: Path) -> None:
    """``deepspeed train.py --deepspeed_config xxx.json``; then two ranks go on where the one has saved."""
    shutil.move(here / "ds_config.json", here / "xxx.json")
    start([*WRAPPER, "deepspeed", "train.py", "--deepspeed_config", "xxx.json"], here)
    (first,) = told(here / "told", 1)
    assert (first["begun"], len(first["losses"]), first["local_rank"]) == (0, 4, 0)
    ckpt_ids = [str(loss) for loss in first["losses"][1::2]]
    assert sorted(path.name for path in (here / "saved").iterdir() if path.is_dir()) == sorted(ckpt_ids)
    assert (here / "saved" / "latest").read_text().strip() == ckpt_ids[-1]

    words = ["--deepspeed", "--deepspeed_config", "xxx.json", "--load_dir", "saved", "--ckpt_id", ckpt_ids[0]]
    start([*WRAPPER, "deepspeed", "--num_gpus=2", "train.py", *words, "--told", "again", "--save_dir", "others"], here)
    again = told(here / "again", 2)
    assert [rank["begun"] for rank in again] == [2, 2]
    assert [rank["local_rank"] for rank in again] == [0, 1]
    assert {rank["deepspeed"] for rank in again} == {True}
    # Each rank's loss is another; a checkpoint has one name, that of rank 0.
    assert [path.name for path in (here / "others").iterdir() if path.is_dir()] == [str(again[0]["losses"][-1])]


@pytest.mark.ranks
@pytest.mark.hosts
def test_deepspeed_over_the_hosts_of_a_hostfile(here: Path, hosts: Hosts) -> None:
    """With the options before and behind the script, and the variables of .deepspeed_env in every process."""
    (here / "myhostfile").write_text("w1 slots=1\nw2 slots=1\n")
    (here / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\n\nMINE=a, 'b' and $HOME\n")
    words = ["--hostfile=myhostfile", "train.py", "--steps", "2", "--deepspeed", "--deepspeed_config", "ds_config.json"]
    done = on_the_first(hosts, here, [*WRAPPER, "deepspeed", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = told(here / "told", 2)
    assert [rank["host"] for rank in ranks] == ["w1", "w2"]
    assert [rank["environ"] for rank in ranks] == [{"NCCL_DEBUG": "WARN", "MINE": "a, 'b' and $HOME"}] * 2


def on_the_first(
    hosts: Hosts, here: Path, command: list[str], environ: Mapping[str, str] = ENVIRON
) -> subprocess.CompletedProcess[str]:
    return hosts.run_on(0, ["env", f"--chdir={here}", *command], environ, timeout_s=180)


# Writes down which rank is where, with what; no torch.
WHERE = """
import os, pathlib, sys
import deepspeed
line = [os.uname().nodename, *(os.environ.get(name, "-") for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "MINE"))]
pathlib.Path("where-" + os.environ["RANK"]).write_text(" ".join([*line, *sys.argv[1:]]))
"""
# Options -> host, local rank and devices of each rank. Where a host gives all its slots its devices are left as they are.
FORMS = {
    "--num_nodes 2": ["w1 0 -", "w1 1 -", "w2 0 -", "w2 1 -"],
    "--num_nodes=2 --num_gpus=1": ["w1 0 0", "w2 0 0"],
    "--include w2:0,1": ["w2 0 -", "w2 1 -"],
    "--include w1:1@w3": ["w1 0 1", "w3 0 -", "w3 1 -"],
    "--exclude w1@w3:0": ["w2 0 -", "w2 1 -", "w3 0 1"],
    # As accelerate launch writes it.
    "--no_local_rank --launcher pdsh --num_gpus 1 --master_addr w1 --master_port 29511": ["w1 0 0", "w2 0 0", "w3 0 0"],
}


@pytest.mark.hosts
@pytest.mark.parametrize("options", FORMS)
def test_which_hosts_and_slots_are_taken(options: str, here: Path, hosts: Hosts) -> None:
    (here / "where.py").write_text(WHERE)
    (here / "hosts").write_text("w1 slots=2\nw2 slots=2\nw3 slots=2\n")
    (here / "their_env").write_text("MINE=x\n")
    command = [*WRAPPER, "deepspeed", "--hostfile", "hosts", *options.split(), "where.py", "-a"]
    done = on_the_first(hosts, here, command, {**ENVIRON, "DS_ENV_FILE": "their_env"})
    assert done.returncode == 0, done.stdout + done.stderr
    behind = "x -a" if "--no_local_rank" in options else "x --local_rank={} -a"
    expected = [f"{line} {behind.format(line.split()[1])}" for line in FORMS[options]]
    assert [(here / f"where-{rank}").read_text() for rank in range(len(list(here.glob("where-*"))))] == expected


@pytest.mark.ranks
@pytest.mark.mpi
def test_mpirun_of_a_script(here: Path) -> None:
    """MPI starts the ranks and introduces them; who they are stands in RANK and its like from the beginning."""
    command = [*WRAPPER, sys.executable, "train.py", "--steps", "2", "--deepspeed_config", "ds_config.json"]
    start(["mpirun", "--oversubscribe", "-n", "2", *command], here, **ROOT_MPI)
    ranks = told(here / "told", 2)
    assert [rank["before"] for rank in ranks] == [said(rank, 2, local=rank, beside=2) for rank in range(2)]


def said(rank: int, world_size: int, local: int, beside: int | None) -> dict[str, str | None]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": None if beside is None else str(beside), "MASTER_ADDR": None,
    }  # fmt: skip


def test_a_script_that_asks_by_itself(here: Path) -> None:
    """activate() first; all that follows is the guide's, and one process needs no launcher."""
    text = (here / "train.py").read_text()
    (here / "train.py").write_text(
        text.replace("import deepspeed", "import hpc_ds.compat\nhpc_ds.compat.activate()\nimport deepspeed")
    )
    start([sys.executable, "train.py", "--steps", "2", "--deepspeed_config", "ds_config.json"], here)
    (only,) = told(here / "told", 1)
    assert (only["begun"], len(only["losses"])) == (0, 2)


def job(here: Path) -> Path:
    """A job of two ranks whose script says deepspeed."""
    file = here / "job.json"
    words = ["--steps", "2", "--deepspeed_config", "ds_config.json", "--told", str(here / "told")]
    resources = {"nodes": 1, "tasks_per_node": 2, "time": "10"}
    file.write_text(json.dumps({"script": "train.py", "args": words, "compat": "deepspeed", "resources": resources}))
    return file


@pytest.mark.local
def test_a_job_on_this_machine(here: Path) -> None:
    """Its command is the launcher's, of a guide: each rank that the job has started becomes the script."""
    file = job(here)
    told_of = json.loads(file.read_text())
    command = ["deepspeed", "--num_gpus=2", told_of.pop("script"), *told_of.pop("args")]
    file.write_text(json.dumps({**told_of, "command": command}))
    run = Runs(here, {**os.environ, "PYTHONPATH": str(REPOSITORY)}).submit(file, "--site", "local")
    assert run.wait_until_over()["state"] == "finished", run.story()
    told(here / "told", 2)


@pytest.mark.slurm
def test_a_job_on_slurm_and_a_step_of_its_own(here: Path, slurm_cluster: SlurmCluster) -> None:
    """srun says who the ranks are in words of its own; they meet in the run folder, or that of the step."""
    environ = {**slurm_cluster.env, "PYTHONPATH": str(REPOSITORY)}
    run = Runs(here, environ).submit(job(here), "--site", "slurm", "--nodes", "2", "--tasks-per-node", "1")
    assert run.wait_until_over()["state"] == "finished", run.story()
    ranks = told(here / "told", 2)
    assert [rank["before"] for rank in ranks] == [said(rank, 2, local=0, beside=1) for rank in range(2)]

    shutil.rmtree(here / "told")
    command = [*WRAPPER, sys.executable, "train.py", "--steps", "2", "--deepspeed_config", "ds_config.json"]
    start(["srun", "-N1", "-n2", "--time=2", *command], here, **{**slurm_cluster.env, **ENVIRON})
    ranks = told(here / "told", 2)
    assert [rank["before"] for rank in ranks] == [said(rank, 2, local=rank, beside=2) for rank in range(2)]
