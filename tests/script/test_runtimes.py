"""A job in every runtime, on a site that has it, compared whole with tests/golden/runtimes/: script, srun and rank.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/script, and read the difference.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from hpc_ds.config.job import CONTAINERS, JobConfig, Runtime
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site_rules import check_job
from hpc_ds.errors import ConfigError
from hpc_ds.launch.container import environment_definition, rank_command
from hpc_ds.launch.srun import step_command
from hpc_ds.run_dir import RunDir
from hpc_ds.script.render import render
from hpc_ds.shipped import shipped

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "runtimes"
RUN = RunDir(Path("/scratch/runs/gpt-20260131-120000"))

# kind -> the site, and what the job says of it
RUNTIMES: dict[str, tuple[str, dict[str, Any]]] = {
    "current": ("slurm", {}),
    "venv": ("slurm", {"path": "/home/ada/venv"}),
    "conda": ("frontier", {"path": "/home/ada/conda envs/torch"}),
    "apptainer": (
        "alliance-canada",
        {"image": "/home/ada/torch 2.sif", "options": ["--writable-tmpfs"], "binds": ["/data", "/a b:/b"]},
    ),
    "pyxis": ("slurm", {"image": "nvcr.io#nvidia/pytorch:25.01-py3", "options": ["--no-container-mount-home"]}),
    "shifter": ("perlmutter", {"image": "nersc/pytorch:ngc-25.01", "binds": ["/data:/inputs"]}),
    "edf": ("alps-clariden", {"image": "/home/ada/torch.toml", "binds": ["/capstor/data"]}),
}
GPUS = {"frontier": 8}
ACCOUNTS = {"frontier": "abc123", "alliance-canada": "def-ada", "perlmutter": "m42_g", "alps-clariden": "g42"}


def job_in(kind: str, **changes: Any) -> JobConfig:
    site, runtime = RUNTIMES[kind]
    resources = {"nodes": 2, "gpus_per_node": GPUS.get(site, 4), "time": "60", "account": ACCOUNTS.get(site)}
    data = {
        "name": "gpt",
        "script": "/home/ada/gpt/train.py",
        "args": ["--lr", "1e-3", "it's $HOME"],
        "workdir": "/home/ada/gpt",
        "resources": resources,
        "runtime": {"kind": kind, **runtime},
        **changes,
    }
    job: JobConfig = check(JobConfig, data, "job.json")
    return job


def everything(kind: str) -> str:
    job, site = job_in(kind), load_site(str(shipped("site_configs") / f"{RUNTIMES[kind][0]}.json"))
    argv, srun = rank_command(job, site, RUN), step_command(job, site, RUN)
    assert srun[-len(argv) :] == argv
    texts = [render(job, site, RUN), "\n# srun\n# ", shlex.join(srun[: srun.index("/bin/sh")])]
    texts += ["\n\n# a rank\n# ", shlex.join(argv), "\n"]
    if kind == "edf":
        texts += ["\n# environment.toml\n", *(f"# {line}\n" for line in environment_definition(job, RUN).splitlines())]
    # The Python that made this test is another one elsewhere.
    return "".join(texts).replace(sys.executable, "/usr/bin/python3")


@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_job_of_a_runtime_is_the_golden_one(kind: str) -> None:
    path, text = GOLDEN / f"{kind}.sbatch", everything(kind)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_runtime_has_a_golden_job() -> None:
    kinds = set(get_args(Runtime.model_fields["kind"].annotation))
    assert kinds == set(RUNTIMES) == {path.stem for path in GOLDEN.iterdir()}
    assert set(CONTAINERS) == kinds - {"current", "venv", "conda"}


@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_job_of_a_runtime_is_allowed_there(kind: str) -> None:
    site = load_site(str(shipped("site_configs") / f"{RUNTIMES[kind][0]}.json"))
    assert [warning for warning in check_job(job_in(kind), site) if "runtime" in warning] == []


def test_a_runtime_that_a_site_does_not_have_is_said_or_refused() -> None:
    assert "runtime.kind 'pyxis': the file of site 'perlmutter' knows only shifter" in check_job(
        job_in("pyxis", resources={"qos": "regular", "account": "m42_g"}), load_site("perlmutter")
    )
    for kind in ("pyxis", "edf"):
        with pytest.raises(
            ConfigError, match=f"runtime.kind '{kind}': an option of srun, which site 'local' does not have"
        ):
            check_job(job_in(kind), load_site("local"))
    assert check_job(job_in("apptainer"), load_site("local")) == []


# Programs that conda is made of: what its hook prints is run by the shell.
HOOK = r"""conda() { [ "$1" = activate ] && [ "$2" = "$WANTED" ] && export SEEN="$2" || return 1; }"""


@pytest.mark.parametrize(("wanted", "code"), [("/home/ada/conda envs/torch", 0), ("another", 1)])
def test_conda_is_activated_after_modules_and_setup(wanted: str, code: int, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    job = job_in("conda", workdir=str(tmp_path), setup=["LOADED=1"])
    text = render(job, load_site("slurm"), run)
    run.env.write_text(f"""WANTED='{wanted}'\nconda() {{ [ "$1" = shell.bash ] && echo '{HOOK}'; }}\n""")
    script = "\n".join(text.partition("\n# Python looks")[0].splitlines()) + '\necho "$LOADED $SEEN"\n'
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ("1 /home/ada/conda envs/torch\n" if code == 0 else "")


def test_without_conda_the_job_ends_and_says_so(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.env.write_text("")
    run.script.write_text(render(job_in("conda", workdir=str(tmp_path)), load_site("slurm"), run))
    ran = subprocess.run(
        ["/bin/bash", str(run.script)], capture_output=True, text=True, check=False, env={"PATH": "/nowhere"}
    )
    assert ran.returncode == 1
    assert "conda: " in ran.stderr
    assert "not found" in ran.stderr
