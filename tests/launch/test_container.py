"""Ranks in containers: every word arrives, and the folders of the run are mounted once, under their own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_ds.config.job import JobConfig
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.errors import ConfigError, RunError
from hpc_ds.launch.container import container_options, environment_definition, mounts, prepare_container, rank_command
from hpc_ds.run_dir import RunDir

RUN = RunDir(Path("/scratch/runs/r1"))
HOSTILE = ["a b", "it's", "$HOME", "`x`", "", "a\nb", "é", "--", "-n"]


def job_of(runtime: dict[str, Any], **data: Any) -> JobConfig:
    asked = {"script": "/home/ada/gpt/train.py", "workdir": "/home/ada/gpt", "runtime": runtime, **data}
    job: JobConfig = check(JobConfig, asked, "job.json")
    return job


def site_of(**data: Any) -> SiteConfig:
    site: SiteConfig = check(SiteConfig, {"name": "s", "description": "d", "scheduler": "slurm", **data}, "site.json")
    return site


KINDS = ["apptainer", "pyxis", "shifter", "edf"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_the_program_arrives(kind: str) -> None:
    runtime = {"kind": kind, "image": "torch"}
    argv = rank_command(job_of(runtime, args=HOSTILE), site_of(), RUN)
    assert argv[-len(HOSTILE) - 3 :] == ["python", "-u", "/home/ada/gpt/train.py", *HOSTILE]
    command = job_of(runtime, script=None, command=["./a out", "x"], args=HOSTILE)
    assert rank_command(command, site_of(), RUN)[-len(HOSTILE) - 2 :] == ["./a out", "x", *HOSTILE]
    other = job_of({**runtime, "python": "/opt/py/bin/python3"})
    assert "/opt/py/bin/python3" in rank_command(other, site_of(), RUN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_deepspeed_is_asked_for_within(kind: str) -> None:
    job = job_of({"kind": kind, "image": "torch", "python": "/py"}, compat="deepspeed")
    assert rank_command(job, site_of(), RUN)[-6:] == [
        "/py",
        "-m",
        "hpc_ds.compat",
        "/py",
        "-u",
        "/home/ada/gpt/train.py",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_of_the_site_come_before_those_of_the_job(kind: str) -> None:
    site = site_of(container_options={kind: ["--of-site"], "shifter" if kind != "shifter" else "edf": ["--other"]})
    job = job_of({"kind": kind, "image": "torch", "options": ["--of-job"]})
    words = [*container_options(job, site, RUN), *rank_command(job, site, RUN)]
    assert [word for word in words if word.startswith(("--of", "--other"))] == ["--of-site", "--of-job"]


def test_apptainer_is_told_whose_gpus_there_are() -> None:
    def first(gpus: int, vendor: str | None) -> str:
        job = job_of({"kind": "apptainer", "image": "x.sif"}, resources={"gpus_per_node": gpus})
        return rank_command(job, site_of(gpu_vendor=vendor), RUN)[2]

    assert [first(4, "nvidia"), first(4, "amd"), first(4, None)] == ["--nv", "--rocm", "--nv"]
    assert first(0, "amd").startswith("--bind=")


def test_without_a_container_nothing_is_around_the_program() -> None:
    job = job_of({"kind": "venv", "path": "/venv"})
    assert rank_command(job, site_of(), RUN) == ["/venv/bin/python", "-u", "/home/ada/gpt/train.py"]
    assert container_options(job, site_of(container_options={"pyxis": ["--x"]}), RUN) == []
    named = job_of({"kind": "venv", "path": "/venv"}, script=None, command=["accelerate", "launch"], compat="deepspeed")
    wrapped = ["/venv/bin/python", "-m", "hpc_ds.compat", "accelerate", "launch"]
    assert rank_command(named, site_of(), RUN) == wrapped
    assert mounts(job, RUN) == []


def test_each_folder_is_mounted_once() -> None:
    runtime = {"kind": "pyxis", "image": "x", "binds": ["/data", "/a:/b"]}
    assert mounts(job_of(runtime), RUN) == ["/scratch/runs/r1", "/home/ada/gpt", "/data", "/a:/b"]
    inside = job_of(runtime, script="/home/ada/gpt/src/train.py", checkpoint={"dir": "/scratch/runs/r1/checkpoints"})
    assert mounts(inside, RUN) == ["/scratch/runs/r1", "/home/ada/gpt", "/data", "/a:/b"]
    outside = job_of(runtime, script="/opt/train.py", checkpoint={"dir": "/big/ckpt"}, workdir="/scratch")
    assert mounts(outside, RUN) == ["/scratch", "/opt", "/big/ckpt", "/data", "/a:/b"]
    options = container_options(job_of(runtime), site_of(), RUN)
    assert (
        "--container-mounts=/scratch/runs/r1:/scratch/runs/r1,/home/ada/gpt:/home/ada/gpt,/data:/data,/a:/b" in options
    )


@pytest.mark.parametrize("name", ["a:b", "a,b", "a;b", "$a"])
def test_a_folder_that_cannot_be_mounted_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be mounted, for its name has one of : , ; ") as caught:
        mounts(job_of({"kind": "apptainer", "image": "x"}, workdir=f"/home/{name}"), RUN)
    assert caught.value.key == "runtime.kind"
    assert mounts(job_of({"kind": "venv", "path": "/venv"}, workdir=f"/home/{name}"), RUN) == []


def test_an_environment_file_builds_on_that_of_the_user(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run é")
    run.root.mkdir()
    job = job_of({"kind": "edf", "image": "torch"}, checkpoint={"dir": str(tmp_path / "ckpt" / "deep")})
    prepare_container(job, run)
    path = run.root / "environment.toml"
    assert container_options(job, site_of(), run) == [f"--environment={path}"]
    lines = dict(line.split(" = ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    assert {key: json.loads(value) for key, value in lines.items()} == {
        "base_environment": ["torch"],
        "workdir": "/home/ada/gpt",
        "mounts": [f"{folder}:{folder}" for folder in (run.root, "/home/ada/gpt", tmp_path / "ckpt" / "deep")],
    }
    assert path.read_text(encoding="utf-8") == environment_definition(job, run)
    assert (tmp_path / "ckpt" / "deep").is_dir(), "what is not there cannot be mounted"


def test_what_cannot_be_prepared_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = job_of({"kind": "apptainer", "image": "x"}, checkpoint={"dir": str(tmp_path / "file" / "ckpt")})
    with pytest.raises(RunError, match="Not a directory; check it"):
        prepare_container(job, RunDir(tmp_path))
