"""Python functions as jobs: what each site is asked for, what is refused, and calls in processes of this machine.

On a real Slurm: tests/slurm/test_functions_on_slurm.py.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from test_site_scripts import GOLDEN, JOBS, RUN, site_named

import hpc_ds
from hpc_ds.cluster.function_job import in_words
from hpc_ds.errors import ConfigError, FunctionError, RunError, SiteError, SubmitError, UnfinishedError
from hpc_ds.script.functions import job_of, script_of, submit

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _pickled_whole() -> Iterator[None]:
    """Take functions along by value: the job does not have this folder on its path."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def where(base: int) -> tuple[int, str | None, str | None]:
    print("called with", base)
    return base + int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), os.environ.get("TOKEN"), os.environ.get("ODD")


def fail() -> None:
    raise ValueError("first line\nsecond line")


def sleep() -> None:
    time.sleep(600)


class Twice:
    """Is told to stop in its first start, and returns what it knows in its second."""

    def __init__(self) -> None:
        self.starts = 1

    def __call__(self) -> int:
        import signal

        if self.starts == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return self.starts

    def checkpoint(self) -> Any:
        import submitit

        self.starts += 1
        return submitit.helpers.DelayedSubmission(self)


def asks(file: str) -> str:
    """Saves where it is asked to, and goes on from there."""
    import signal

    from hpc_ds import preemption

    if Path(file).exists():
        return Path(file).read_text()
    preemption.requested()
    os.kill(os.getpid(), signal.SIGUSR2)
    while not preemption.requested():
        pass
    Path(file).write_text("saved")
    raise preemption.Preempted


def job_for(site: str) -> Any:
    further = {"name": "gpt", "workdir": "/home/ada/gpt", "runtime": {"kind": "venv", "path": "/home/ada/venv"}}
    return job_of(where, JOBS[site], further)


@pytest.mark.parametrize("name", [name for name in JOBS if name != "local"])
def test_a_site_is_asked_for_the_same_as_by_hpcds_submit(name: str, tmp_path: Path) -> None:
    golden = (GOLDEN / f"{name}.sbatch").read_text().splitlines()
    text = script_of(job_for(name), site_named(name), RUN)
    lines = text.splitlines()
    requests = [line for line in golden if line.startswith("#SBATCH")]
    assert len(requests) > 5
    assert [line for line in lines if line.startswith("#SBATCH")] == requests
    end = golden.index("# Python looks for modules in the current folder first: not in the job's own.")
    assert lines[: len(golden[:end])] == golden[:end]  # modules, setup lines, env.sh
    srun = next(line for line in golden if line.startswith("# srun")).split()[1:]
    expected = [word.replace("--kill-on-bad-exit=0", "--kill-on-bad-exit=1") for word in srun]
    assert lines[-1].split()[1 : len(expected) + 1] == expected
    assert lines[-1].endswith(f"/home/ada/venv/bin/python -u -m submitit.core._submit {RUN.root}")
    (tmp_path / "script").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "script")], check=True)


def test_the_rules_of_a_site_hold_for_functions_too(tmp_path: Path) -> None:
    def refused(site: str, words: str, **resources: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            submit(where, 1, site=site, resources=resources, folder=tmp_path)

    refused("juwels-booster", "resources.account: missing")
    refused("frontier", "resources.time '13:00:00': partition 'batch'", account="abc123", time="13:00:00")
    refused("snellius", "resources.gpus_per_node 2: site 'snellius'", partition="gpu_a100", nodes=2, gpus_per_node=2)
    refused("marenostrum5", "resources.mem '4G': site 'marenostrum5' gives memory by cores", account="ehpc42", mem="4G")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "description": "of me", "scheduler": "slurm", "max_nodes": 2}))
    refused(str(path), "resources.nodes 3: site 'mine' gives a job at most 2", nodes=3)
    assert [one.name for one in tmp_path.iterdir()] == ["mine.json"]


def test_a_function_runs_on_every_rank_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    further = {"name": "try", "env": {"ODD": "a b'$x\nü"}, "env_from": ["TOKEN"]}
    resources = {"tasks_per_node": 2, "time": "2"}
    job = hpc_ds.submit(where, 10, site="local", resources=resources, job=further, folder=tmp_path)
    assert job.results(120) == [(10, "s3cret", "a b'$x\nü"), (11, "s3cret", "a b'$x\nü")]
    assert job.result() == job.results()[0]
    assert job.done()
    assert job.exception() is None
    assert "called with 10" in job.stdout(1)
    assert job.stderr() == ""
    env = job.folder / "env.sh"
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    others = [path for path in job.folder.rglob("*") if path.is_file() and path != env and "result" not in path.name]
    assert len(others) > 3
    assert [path.name for path in others if b"s3cret" in path.read_bytes()] == []


def test_functions_end_badly_on_this_machine(tmp_path: Path) -> None:
    failing = submit(fail, site="local", folder=tmp_path)
    sleeping = submit(sleep, site="local", folder=tmp_path)
    with pytest.raises(FunctionError) as caught:
        failing.result(120)
    first, rest = str(caught.value).split("\n", 1)
    assert first == f"function 'fail', job {failing.job_id}, rank 0: ValueError: first line; its traceback follows"
    assert rest.startswith("Traceback")
    assert "second line" in rest
    assert (caught.value.rank, caught.value.job_id) == (0, failing.job_id)
    with pytest.raises(UnfinishedError, match=r"function 'sleep', job \d+: RUNNING after 0 s; wait longer"):
        sleeping.result(0)
    while not sleeping.stdout():  # the rank is there
        time.sleep(0.05)
    sleeping.cancel()
    assert "ended as CANCELLED without a result" in str(sleeping.exception(120))


def test_functions_go_on_on_this_machine(tmp_path: Path) -> None:
    jobs = [submit(Twice(), site="local", folder=tmp_path)]
    jobs.append(submit(asks, str(tmp_path / "state"), site="local", folder=tmp_path))
    assert [job.result(120) for job in jobs] == [2, "saved"]
    once = submit(Twice(), site="local", job={"restart": {"max_restarts": 0}}, resources={"time": "1"}, folder=tmp_path)
    assert "stopped, and not queued again: timed-out too many times" in str(once.exception(120))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"resources": {"node": 2}}, ConfigError, "resources: node: unknown key; did you mean 'nodes'"),
    ({"resources": {"nodes": "2"}}, ConfigError, "resources: nodes '2': not a whole number"),
    ({"site": "moon"}, SiteError, "site 'moon': unknown"),
    ({"job": {"script": "x.py"}}, ConfigError, "job: script: not a key of a function's job; known: env, env_from"),
    ({"job": {"envs": {}}}, ConfigError, "job: envs: not a key of a function's job; did you mean 'env'"),
    ({"job": {"name": "a b"}}, ConfigError, "job: name 'a b': not a run name"),
    ({"job": {"restart": {"signal": "TERM"}}}, ConfigError, "job: restart.signal: not of a function's job"),
    ({"job": {"restart": []}}, ConfigError, r"job: restart \[\]: not a section"),
    ({"job": {"runtime": {"kind": "apptainer", "image": "a.sif"}}}, ConfigError, "functions run in no container"),
    ({"job": {"runtime": {"kind": "venv", "path": "/nowhere"}}}, ConfigError, "runtime.path '/nowhere': no bin/python"),
    ({"job": {"workdir": "/nowhere"}}, ConfigError, "workdir '/nowhere': no such folder"),
    ({"job": {"env_from": ["NOT_THERE"]}}, ConfigError, "env_from 'NOT_THERE': not set in this shell"),
    ({"folder": "/proc/functions"}, RunError, "runs folder '/proc/functions': no run can be made in it"),
    ({"folder": "50%j"}, RunError, "folder '50%j': has a % or"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_what_cannot_be_asked_for_is_refused(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        submit(where, 1, **{"site": "local", "folder": tmp_path / "runs", **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"function 'where': cannot be pickled: TypeError: .*lock.*; give it what can"
    ):
        submit(where, threading.Lock(), site="local", folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_slurm_says_so_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="is this a machine of the cluster"):
        submit(where, 1, site="slurm", folder=tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_last_sentence_of_a_traceback() -> None:
    trace = (
        'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n    ~^^\nx.Bad: why\n  indented\n'
    )
    assert in_words(trace) == "x.Bad: why"
    stopped = "submitit.core.utils.UncompletedJobError: Job not requeued because: timed-out and not checkpointable."
    assert in_words(stopped) == "stopped, and not queued again: timed-out and not checkpointable"
    assert in_words("") == "it raised"
