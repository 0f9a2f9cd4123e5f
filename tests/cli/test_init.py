"""``hpcds init`` and ``hpcds schema``: what is written can be submitted, and what is asked for in a terminal is taken."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from whole_runs import Runs

from hpc_ds.config.load import load_job_file, without_comments
from hpc_ds.config.new_job import new_job
from hpc_ds.config.schema import job_schema

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    (tmp_path / "train.py").write_text("")
    return Runs(tmp_path, {"PATH": "/nowhere", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"})


def test_the_file_is_a_job_with_a_comment_on_each_key(runs: Runs) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "4", "--time", "01:00:00", "--account", "me", "--site", "slurm")
    told = json.loads(runs.hpcds("init", "train.py", *options, "--json").stdout)
    written = json.loads((runs.folder / "job.json").read_text())
    assert told == {"file": "job.json", "job": written}
    assert all(f"// {key}" in written or isinstance(written[key], dict) for key in without_comments(written))
    job = load_job_file(runs.folder / "job.json")
    assert (job.name, job.script, job.site) == ("train", str(runs.folder / "train.py"), "slurm")
    resources = job.resources
    assert (resources.nodes, resources.gpus_per_node, resources.time, resources.account) == (2, 4, "01:00:00", "me")
    script = runs.hpcds("submit", "job.json", "--dry-run").stdout
    assert "#SBATCH --gpus-per-node=4\n" in script
    known = job_schema()["properties"]
    assert all(key in known or key.startswith("//") for key in written)


def test_a_file_that_is_there_is_kept(runs: Runs) -> None:
    (runs.folder / "job.json").write_text("mine")
    refused = runs.hpcds("init", "train.py", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "job file 'job.json': is there already; choose another with --output, or --force" in refused.stderr
    assert (runs.folder / "job.json").read_text() == "mine"
    runs.hpcds("init", "train.py", "--force")
    assert load_job_file(runs.folder / "job.json").site == "local"


WRONG = {
    ("train.py", "--time", "soon"): "job.json: resources.time 'soon': not a time limit",
    ("train.py", "--nodes", "0"): "job.json: resources.nodes 0: out of range",
    ("train.py", "--site", "nowhere"): "site 'nowhere': unknown",
    ("train.py", "-o", "none/job.json"): "job file 'none/job.json': cannot be written: No such file or directory",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_makes_no_job_is_not_written(words: tuple[str, ...], runs: Runs) -> None:
    refused = runs.hpcds("init", *words, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"hpcds: {WRONG[words]}")
    assert not (runs.folder / "job.json").exists()


def test_a_terminal_is_asked_what_the_options_do_not_say(runs: Runs) -> None:
    """On a Slurm cluster: script, nodes, GPUs and time; an empty answer takes the default."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "hpc_ds", "init", "--site", "slurm", "--nodes", "3"]
    asking = subprocess.Popen(words, cwd=runs.folder, env=runs.env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"train.py\n2\n\n")
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    assert asking.wait() == 0, said
    os.close(ours)
    job = load_job_file(runs.folder / "job.json")
    assert (job.resources.nodes, job.resources.gpus_per_node, job.resources.time) == (3, 2, "04:00:00")


@pytest.mark.parametrize("of", ["job", "site", "training"])
def test_schemas_are_schemas(of: str, runs: Runs) -> None:
    schema = json.loads(runs.hpcds("schema", of).stdout)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False


def test_a_comment_is_no_key() -> None:
    data = {"//": 1, "script": "x", "env": {"//": "kept"}, "resources": {"// nodes": "", "nodes": 2}, "$schema": "s"}
    assert without_comments(data) == {"script": "x", "env": {"//": "kept"}, "resources": {"nodes": 2}}


def test_what_is_not_given_is_left_out() -> None:
    assert "time" not in new_job({"script": "a.py", "resources.nodes": 1, "resources.time": None})["resources"]
