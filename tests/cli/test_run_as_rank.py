"""``hpcds run`` in a process that is a rank already, as in a job whose command is ``deepspeed train.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_ds.cli.run import run
from hpc_ds.cluster.process import start_time
from hpc_ds.errors import ConfigError, LaunchError, RankError

REPOSITORY = Path(__file__).resolve().parent.parent.parent

RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n1",
}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}

RANKS = {
    "hpcds": RANK,
    "torchrun": {**RANK, "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "h", "MASTER_PORT": "7"},
    "srun": STEP,
    "srun in a run": {**STEP, "HPCDS_RUN_DIR": "/run"},
    "mpirun": MPI,
    "mpirun of the wrapper": {**MPI, **RANK},
}
LAUNCHERS = {
    "nothing": {},
    "a job of one task": {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "HPCDS_RUN_DIR": "/run"},
    "a step of one task": {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    "mpirun -n 1": {**MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    "a cloud that counts hosts": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "7"},
    "what a rank has started": {
        **RANK,
        "HPCDS_RANK_PROCESS": json.dumps({"pid": os.getppid(), "started": start_time(os.getppid()), "told": RANK}),
    },
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.py").write_text("")
    return tmp_path


def asked(
    words: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    """What ``--dry-run`` prints, and what is said besides."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert run(["--dry-run", "--json", *words.split()]) == 0
    said = capsys.readouterr()
    found: dict[str, Any] = json.loads(said.out)
    return found, said.err


@pytest.mark.parametrize("case", RANKS)
def test_it_becomes_the_script(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / ".deepspeed_env").write_text("A=of the file\nB=1\n")
    found, said = asked("--num_gpus 2 -H none --env A=2 train.py --x", RANKS[case], monkeypatch, capsys)
    assert found["command"] == [sys.executable, "-u", "train.py", "--local_rank=1", "--x"]
    assert (found["rank"], found["world_size"], found["cwd"]) == (1, 2, str(here))
    assert {"A": "2", "B": "1"}.items() <= found["environment"].items()
    assert {**RANKS[case], **found["environment"]}.items() >= RANK.items()
    assert (found["notes"], said) == ([], "")  # the first rank speaks for all


@pytest.mark.parametrize("case", LAUNCHERS)
def test_what_is_no_rank_of_several_launches(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = asked("--num_gpus 3 train.py", LAUNCHERS[case], monkeypatch, capsys)
    assert (found["world_size"], len(found["hosts"])) == (3, 1), here


def test_one_launcher_a_host_launches(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "hosts").write_text("w1.invalid slots=2\nw2.invalid slots=2\n")
    words = "-H hosts --no_ssh --node_rank 1 train.py"
    found, _ = asked(words, RANK, monkeypatch, capsys)
    assert [rank["rank"] for rank in found["hosts"][0]["ranks"]] == [2, 3]


FORMS = {
    "--module pkg.train a": ["-u", "-m", "pkg.train", "--local_rank=1", "a"],
    "--no_local_rank train.py a": ["-u", "train.py", "a"],
    "--as-deepspeed train.py": ["-m", "hpc_ds.compat", sys.executable, "-u", "train.py", "--local_rank=1"],
}


@pytest.mark.parametrize("words", FORMS)
def test_what_is_run_is_what_a_launcher_would_run(
    words: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = asked(words, RANK, monkeypatch, capsys)
    assert found["command"] == [sys.executable, *FORMS[words]], here
    (here / "activate").write_text("")
    found, _ = asked(f"--venv_script activate {words}", RANK, monkeypatch, capsys)
    assert found["command"][:1] + found["command"][4:] == ["bash", sys.executable, *FORMS[words]]


def test_a_place_that_nobody_names_is_not_made_up(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = asked("--no_python ./prog", {"PMI_RANK": "1", "PMI_SIZE": "2"}, monkeypatch, capsys)
    assert found["command"] == ["./prog"], here


def test_the_first_rank_says_what_it_passes_over(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {**RANK, "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    notes = ["this is rank 0 of 2 already: it becomes 'train.py', and starts no others"]
    found, said = asked("train.py", first, monkeypatch, capsys)
    assert (found["notes"], said) == (notes, f"hpcds run: {notes[0]}\n"), here
    found, _ = asked("--num_gpus 2 --hostfile h --prefix train.py", first, monkeypatch, capsys)
    assert found["notes"] == [f"{notes[0]}; passed over, for the job has chosen: --hostfile, --num_gpus, --prefix"]
    found, said = asked("-q --num_gpus 8 train.py", first, monkeypatch, capsys)
    assert found["notes"][1] == "--num_gpus 8: the job has started 2 on this host; ask it for as many tasks a node"
    assert said == ""
    assert run(["--dry-run", "-q", "--env", "MY_TOKEN=1", "train.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[1]) == (f"rank 0 of 2, in {here}, with", "  MY_TOKEN='***'")
    assert lines[-1] == f"{sys.executable} -u train.py --local_rank=0"


def test_what_is_wrong_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"script 'none\.py': no such file"):
        run(["none.py"])
    with pytest.raises(ConfigError, match="script: missing"):
        run([])
    with pytest.raises(LaunchError, match=r"rank 1: './none': No such file or directory; see whether it is there"):
        run(["--no_python", "./none"])
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for name, value in {**STEP, "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="RANK 1: contradicts SLURM_PROCID 0; unset RANK before srun"):
        run([str(here / "train.py")])


def test_a_job_s_ranks_start_no_others(here: Path) -> None:
    """For real: each process is the same from the launcher to the script, and there are as many as before."""
    (here / "train.py").write_text(
        "import deepspeed, os, pathlib, sys\n"
        "pathlib.Path(f'is-{os.getpid()}').write_text(' '.join([os.environ['RANK'], deepspeed.__version__, *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-m", "hpc_ds.compat", "deepspeed", "--num_gpus=4", "train.py", "--x"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), **RANK, "HPCDS_RUN_DIR": str(here)}
    ranks = [
        subprocess.Popen(command, env={**environ, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert len(said[0].splitlines()) == 1
    assert "passed over, for the job has chosen: --num_gpus" in said[0]
    assert said[1] == ""
    told = {path.name: path.read_text() for path in here.glob("is-*")}
    assert told == {
        f"is-{process.pid}": f"{rank} 0.19.8+hpcds --local_rank={rank} --x" for rank, process in enumerate(ranks)
    }
