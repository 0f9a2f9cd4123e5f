"""From a job to a run folder and a queued job: all of it, or nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import stat
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_resolved, load_site
from hpc_ds.config.model import check
from hpc_ds.errors import ConfigError, RunError, SchedulerError, SiteError, SubmitError
from hpc_ds.run_dir import RunDir, read_object
from hpc_ds.script.submit import preview, queue, submit

if TYPE_CHECKING:
    from pathlib import Path

SLURM = load_site("slurm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on whose PATH there is an sbatch that gives the ids 101, 102, ..."""
    count = tmp_path / "count"
    fake_program(
        tmp_path / "bin",
        "sbatch",
        f'[ "$1" = --test-only ] && exit 0\nprintf "%s\\n" "$@" > {tmp_path}/called\nenv > {tmp_path}/environment\n'
        f"echo x >> {count}\necho $((100 + $(wc -l < {count})))",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def job_of(folder: Path, **data: Any) -> JobConfig:
    job: JobConfig = check(JobConfig, {"name": "gpt", "command": ["true"], "workdir": str(folder), **data}, "job.json")
    return job


def test_everything_a_run_needs_is_in_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    job = job_of(folder, env={"A": "1"}, env_from=["SECRET"])
    done = submit(job, SLURM, folder / "runs")
    run = done.run
    assert (done.job_id, done.warnings) == ("101", [])
    assert (folder / "called").read_text() == f"--parsable\n{run.script}\n"
    assert load_resolved(run.config) == job
    assert load_site(str(run.site)) == SLURM
    without_stamp = re.compile(r"gpt-\d{8}-\d{6}")
    previewed, _ = preview(job, SLURM, folder / "runs")
    assert without_stamp.sub("RUN", run.script.read_text()) == without_stamp.sub("RUN", previewed)
    assert run.env.read_text() == "export SECRET=hunter2\nexport A=1\n"
    assert stat.S_IMODE(run.env.stat().st_mode) == 0o600
    assert os.access(run.script, os.X_OK)
    written = read_object(run.job)
    assert (written["job_id"], written["site"], written["earlier"]) == ("101", "slurm", [])
    assert RunDir.find("101", folder / "nowhere").root == run.root


def test_where_a_run_comes_from_is_written_down_without_a_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    run = submit(job_of(folder, env={"KEY": "sesame"}, env_from=["SECRET"]), SLURM, folder / "runs").run
    written = read_object(run.provenance)
    assert written["environment"] == ["KEY", "SECRET"]
    assert (written["host"], written["python"]) == (platform.node(), sys.executable)
    assert written["versions"]["python"] == platform.python_version()
    assert written["git_commit"] is None
    holders = [path for path in run.root.rglob("*") if path.is_file() and "hunter2" in path.read_text()]
    assert holders == [run.env]


def test_an_enclosing_job_does_not_reach_the_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPU_BIND", "mask")
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SLURM_CONF", "/etc/mine.conf")
    submit(job_of(folder), SLURM, folder / "runs")
    seen = (folder / "environment").read_text()
    assert "SLURM_CONF=/etc/mine.conf" in seen
    assert "SLURM_CPU_BIND" not in seen
    assert "SBATCH_PARTITION" not in seen


def test_a_run_that_goes_on_remembers_its_earlier_jobs(folder: Path) -> None:
    run = submit(job_of(folder), SLURM, folder / "runs").run
    assert [queue(run, SLURM), queue(run, SLURM)] == ["102", "103"]
    assert read_object(run.job)["job_id"] == "103"
    assert read_object(run.job)["earlier"] == ["101", "102"]


def test_a_preview_makes_nothing(folder: Path) -> None:
    text, _ = preview(job_of(folder), SLURM, folder / "runs")
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=gpt\n")
    assert str(folder / "runs" / "gpt-") in text
    assert not (folder / "runs").exists()
    assert not (folder / "called").exists()


# What keeps a job from being queued -> the error, and words of it.
FAILURES: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "refused": (
        'echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2; exit 1',
        {},
        SubmitError,
        "sbatch: refused the job: Batch job submission failed: Invalid partition name specified; change the job",
    ),
    "silent": ("exit 1", {}, SubmitError, "sbatch: refused the job: it said nothing"),
    "too short": ("echo 1", {"resources": {"time": "0:10"}}, ConfigError, "resources.time '0:10'"),
    "variable": ("echo 1", {"env_from": ["NOT_THERE"]}, ConfigError, "env_from 'NOT_THERE'"),
    "half a letter": ("echo 1", {"args": ["\ud800"]}, ConfigError, "args"),
}


@pytest.mark.parametrize("answer", ["echo welcome to the cluster", "true"])
def test_a_job_that_may_be_queued_keeps_its_folder(answer: str, folder: Path) -> None:
    """sbatch said yes, but not which job: it will want its script."""
    fake_program(folder / "bin", "sbatch", answer)
    with pytest.raises(SchedulerError, match=r"no job id in it; .* is kept"):
        submit(job_of(folder), SLURM, folder / "runs")
    (run,) = (folder / "runs").iterdir()
    assert (run / "script.sbatch").is_file()


@pytest.mark.parametrize("name", FAILURES)
def test_a_job_that_is_not_queued_leaves_nothing_behind(name: str, folder: Path) -> None:
    answer, data, error, words = FAILURES[name]
    fake_program(folder / "bin", "sbatch", answer)
    with pytest.raises(error) as caught:
        submit(job_of(folder, **data), SLURM, folder / "runs")
    assert words in str(caught.value)
    assert not (folder / "runs").exists() or list((folder / "runs").iterdir()) == []
    assert not (folder / "state").exists()


def test_without_sbatch_nothing_is_left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / "empty"))
    with pytest.raises(SubmitError, match=r"sbatch: no such program on PATH; is this a machine of the cluster?"):
        submit(job_of(folder), SLURM, folder / "runs")
    assert list((folder / "runs").iterdir()) == []


def test_without_a_template_nothing_is_left_behind(folder: Path) -> None:
    site = SLURM.model_copy(update={"template": "none.j2"})
    with pytest.raises(SiteError):
        submit(job_of(folder), site, folder / "runs")
    assert list((folder / "runs").iterdir()) == []


def test_runs_below_a_file_are_refused(folder: Path) -> None:
    (folder / "runs").write_text("")
    with pytest.raises(RunError, match="no run can be made in it"):
        submit(job_of(folder), SLURM, folder / "runs")


def test_a_variable_of_bytes_that_are_no_text_is_taken_or_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable is bytes; env.sh can hold them, but not as UTF-8."""
    monkeypatch.setenv("RAW", os.fsdecode(b"\xff"))
    try:
        run = submit(job_of(folder, env_from=["RAW"]), SLURM, folder / "runs").run
    except ConfigError:
        assert not (folder / "runs").exists()
    else:
        assert b"\xff" in run.env.read_bytes()


def test_a_runs_folder_whose_name_is_no_text_is_taken_or_refused(folder: Path) -> None:
    runs = folder / os.fsdecode(b"r\xff")
    try:
        run = submit(job_of(folder), SLURM, runs).run
    except ConfigError:
        assert not runs.exists() or list(runs.iterdir()) == []
    else:
        assert os.fsencode(run.root) in run.script.read_bytes()


def test_a_runs_folder_with_a_line_break_is_refused(folder: Path) -> None:
    """It would end the line of an #SBATCH option."""
    with pytest.raises(ConfigError):
        submit(job_of(folder), SLURM, folder / "a\nb")


def test_a_user_whom_no_password_file_knows_can_submit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is in many containers."""

    def unknown(_uid: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    run = submit(job_of(folder), SLURM, folder / "runs").run
    assert "user" in read_object(run.provenance)


def test_json_in_the_folder_is_json(folder: Path) -> None:
    run = submit(job_of(folder, training={"gradient_clipping": 0.5}), SLURM, folder / "runs").run
    for path in run.root.glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)
