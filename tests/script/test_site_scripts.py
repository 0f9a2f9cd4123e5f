"""A job on every shipped site, compared whole with tests/golden/sites/: what a user of that cluster would queue.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/script, and read the difference.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site_rules import check_job, fitted
from hpc_ds.launch.srun import site_options, srun_command, step_command
from hpc_ds.run_dir import RunDir
from hpc_ds.script.render import environment_file, render
from hpc_ds.shipped import shipped

if TYPE_CHECKING:
    from hpc_ds.config.site import SiteConfig

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "sites"
RUN = RunDir(Path("/scratch/runs/gpt-20260131-120000"))
GPUS = {"nodes": 2, "gpus_per_node": 4, "time": "2:00:00"}

# What a job has to say on each site to train on two whole nodes there.
JOBS: dict[str, dict[str, Any]] = {
    "alliance-canada": {**GPUS, "account": "def-ada"},
    "alps-clariden": {**GPUS, "account": "g42", "partition": "normal"},
    "archer2": {**GPUS, "account": "e42", "qos": "gpu-exc"},
    "delta": {**GPUS, "account": "abcd-delta-gpu", "partition": "gpuA100x4,gpuA100x4-preempt"},
    "frontier": {**GPUS, "gpus_per_node": 8, "account": "abc123"},
    "jean-zay": {**GPUS, "account": "abc@h100", "partition": "gpu_p6", "qos": "qos_gpu_h100-t3"},
    "juwels-booster": {**GPUS, "account": "proj"},
    "leonardo": {**GPUS, "account": "IscrC_ADA"},
    "local": {},
    "lumi-g": {**GPUS, "gpus_per_node": 8, "account": "project_465000001", "partition": "standard-g"},
    "marenostrum5": {**GPUS, "account": "ehpc42", "qos": "acc_ehpc"},
    "perlmutter": {**GPUS, "account": "m42_g", "qos": "regular"},
    "slurm": GPUS,
    "snellius": {**GPUS, "partition": "gpu_a100"},
}


def job_on(site: str, **changes: Any) -> JobConfig:
    data = {
        "name": "gpt",
        "script": "/home/ada/gpt/train.py",
        "workdir": "/home/ada/gpt",
        "runtime": {"kind": "venv", "path": "/home/ada/venv"},
        "resources": {**JOBS[site], **changes},
    }
    job: JobConfig = check(JobConfig, data, "job.json")
    return job


def site_named(name: str) -> SiteConfig:
    return load_site(str(shipped("site_configs") / f"{name}.json"))


def everything(site: SiteConfig) -> str:
    """The script, the variables beside it, and the srun that the supervisor starts the ranks with."""
    job = job_on(site.name)
    texts = [render(job, site, RUN), "\n# env.sh\n", environment_file(job, site, {})]
    if site.scheduler == "slurm":
        srun = step_command(job, site, RUN)
        texts += ["\n# the ranks\n", "# ", " ".join(srun[: srun.index("/bin/sh")]), "\n"]
    return "".join(texts)


@pytest.mark.parametrize("name", JOBS)
def test_the_job_of_a_site_is_the_golden_one(name: str) -> None:
    path, text = GOLDEN / f"{name}.sbatch", everything(site_named(name))
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_site_has_a_golden_job_and_nothing_else_has() -> None:
    sites = sorted(path.stem for path in shipped("site_configs").iterdir())
    assert sites == sorted(JOBS)
    assert sites == sorted(path.stem for path in GOLDEN.iterdir())


@pytest.mark.parametrize("name", JOBS)
def test_the_job_of_a_site_is_allowed_there(name: str) -> None:
    warnings = check_job(job_on(name), site_named(name))
    assert [warning for warning in warnings if "knows only" in warning or "not verified" in warning] == []


def test_gpus_are_asked_for_in_each_way() -> None:
    def gpus(name: str) -> list[str]:
        lines = render(job_on(name), site_named(name), RUN).splitlines()
        return [line.removeprefix("#SBATCH --") for line in lines if "gpus" in line or "gres" in line]

    assert gpus("slurm") == ["gpus-per-node=4"]
    assert gpus("leonardo") == ["gres=gpu:4"]
    assert gpus("frontier") == ["gpus-per-task=1"]
    assert gpus("archer2") == ["gpus=8"], "of the whole job"


def test_what_sbatch_refuses_srun_is_told() -> None:
    job, site = job_on("archer2"), site_named("archer2")
    text = render(job, site, RUN)
    assert "ntasks" not in text
    assert "cpus" not in text
    assert {"--ntasks-per-node=4", "--cpus-per-task=8"} <= set(srun_command(["x"], fitted(job, site), []))


def test_options_for_a_full_node_are_left_out_of_others() -> None:
    site = site_named("lumi-g")
    assert any("mask_cpu" in option for option in site_options(job_on("lumi-g"), site))
    assert site_options(job_on("lumi-g", gpus_per_node=2), site) == []
    assert site_options(job_on("lumi-g", tasks_per_node=4), site) == []


def test_the_word_of_the_job_is_heard_on_every_site() -> None:
    own = {"cpus_per_task": 3, "constraint": "mine", "sbatch": {"hint": "compute_bound"}}
    text = render(job_on("perlmutter", **own), site_named("perlmutter"), RUN)
    assert {"#SBATCH --cpus-per-task=3", "#SBATCH --constraint=mine"} <= set(text.splitlines())
    text = render(job_on("perlmutter", sbatch={"constraint": False}), site_named("perlmutter"), RUN)
    assert "constraint" not in text
    assert "#SBATCH --hint=compute_bound" in render(job_on("jean-zay", **own), site_named("jean-zay"), RUN)
