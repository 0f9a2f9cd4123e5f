"""A sweep as one array: the folder, the script, one sbatch, and nothing left where it fails."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_resolved, load_site
from hpc_ds.config.model import check
from hpc_ds.config.sweep import jobs_of, read_points
from hpc_ds.errors import ConfigError, RunError, SchedulerError, SubmitError
from hpc_ds.run_dir import RunDir, read_object
from hpc_ds.script.sweep import Sweep, preview_sweep, queue_sweep, submit_sweep
from hpc_ds.script.waiting import Wait
from hpc_ds.sweep_dir import SweepDir, find_sweep, runs_named

if TYPE_CHECKING:
    from pathlib import Path

SLURM, LOCAL = load_site("slurm"), load_site("local")
CALLED = 'printf "%s\\n" "$*" >> $(dirname $0)/../called\n[ "$1" = --test-only ] && exit 0\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_program(tmp_path / "bin", "sbatch", f"{CALLED}echo 44")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def sweep_of(folder: Path, *texts: str, throttle: int | None = None, **data: Any) -> Sweep:
    job = {"name": "gpt", "command": ["true"], "workdir": str(folder), **data}
    base: JobConfig = check(JobConfig, job, "job.json")
    points = read_points(texts)
    return Sweep(base, points, jobs_of(base, points, "job.json"), throttle)


def test_a_sweep_is_one_array_whose_tasks_are_runs(folder: Path) -> None:
    wanted = sweep_of(folder, "env.A=x y,$Z", "steps=5,6", throttle=2)
    done = submit_sweep(wanted, SLURM, folder / "runs")
    calls = (folder / "called").read_text().splitlines()
    assert calls == [f"--test-only {done.sweep.script}", f"--parsable --array=1-4%2 {done.sweep.script}"]
    assert "#SBATCH --array=1-4%2" in done.sweep.script.read_text().splitlines()
    data = done.sweep.data()
    assert (data["job_id"], data["throttle"], len(data["tasks"])) == ("44", 2, 4)
    assert data["tasks"][2] == {"number": 3, "values": {"env.A": "$Z", "steps": 5}}
    runs = done.sweep.runs()
    assert [load_resolved(run.config) for run in runs] == list(wanted.jobs)
    assert [read_object(run.job)["job_id"] for run in runs] == ["44_1", "44_2", "44_3", "44_4"]
    assert runs[2].env.read_text() == "export A='$Z'\n"
    assert oct(runs[2].env.stat().st_mode)[-3:] == "600"
    assert str(runs[2].root) in runs[2].script.read_text()
    assert "--array" not in runs[2].script.read_text()


def test_runs_of_a_sweep_are_found_by_folder_and_job_id_and_the_sweep_as_all_of_them(folder: Path) -> None:
    sweep = submit_sweep(sweep_of(folder, "steps=1,2"), SLURM, folder / "runs").sweep
    runs, name = folder / "runs", sweep.root.name
    for text in ("44_2", f"{name}/2", str(sweep.root / "2")):
        assert RunDir.find(text, runs).root == sweep.root / "2"
    assert RunDir.find("44_1", folder / "elsewhere").root == sweep.root / "1", "it is remembered"
    for text in ("44", "gpt", name, str(sweep.root)):
        assert [run.label for run in runs_named(text, runs)] == [f"{name}/1", f"{name}/2"]
    assert [run.root for run in RunDir.all_in(runs)] == [run.root for run in sweep.runs()]
    with pytest.raises(RunError, match="a sweep; name one of its runs"):
        RunDir.find(name, runs)
    with pytest.raises(RunError, match="neither a run folder"):
        runs_named("2", runs)
    assert find_sweep("other", runs) is None


@pytest.mark.parametrize("name", ["plain", "a b", "it's $HOME", "per%cent %a"])
def test_the_script_of_an_array_names_the_folder_of_its_task(name: str, folder: Path) -> None:
    """Run by bash, as Slurm does: what would be supervised is the task's folder, byte for byte."""
    program = fake_program(folder / "venv" / "bin", "python", 'printf "%s|" "$@" > "$HPCDS_TEST"')
    wanted = sweep_of(folder, "steps=1,2,3", runtime={"kind": "venv", "path": str(program.parent.parent)})
    sweep = submit_sweep(wanted, SLURM, folder / name).sweep
    said = folder / "said"
    environ = {**os.environ, "SLURM_ARRAY_TASK_ID": "3", "HPCDS_TEST": str(said)}
    subprocess.run(["bash", str(sweep.script)], env=environ, check=True)
    assert said.read_text() == f"-m|hpc_ds|supervise|{sweep.root / '3'}|"
    (output,) = [line for line in sweep.script.read_text().splitlines() if line.startswith("#SBATCH --output=")]
    escaped = str(sweep.root).replace("%", "%%")
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {output.partition('=')[2]}"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"{escaped}/%a/logs/scheduler.log"


def test_some_runs_of_a_sweep_are_queued_again(folder: Path) -> None:
    sweep = submit_sweep(sweep_of(folder, "steps=1,2,3,4,5", throttle=3), SLURM, folder / "runs").sweep
    fake_program(folder / "bin", "sbatch", f"{CALLED}echo 50")
    assert queue_sweep(sweep, SLURM, [5, 1, 2]) == "50"
    assert (folder / "called").read_text().splitlines()[-1] == f"--parsable --array=1-2,5%3 {sweep.script}"
    assert read_object(sweep.run(5).job)["job_id"] == "50_5"
    assert read_object(sweep.run(5).job)["earlier"] == ["44_5"]
    assert read_object(sweep.run(3).job)["job_id"] == "44_3"
    assert [run.root.name for run in runs_named("50", folder / "runs")] == ["1", "2", "3", "4", "5"]


def test_a_sweep_waits_for_other_runs(folder: Path) -> None:
    sweep = submit_sweep(sweep_of(folder, "steps=1"), SLURM, folder / "runs", waits=[Wait(folder, "7", "ok")]).sweep
    assert (folder / "called").read_text().splitlines()[
        -1
    ] == f"--parsable --array=1 --dependency=afterok:7 {sweep.script}"


FAILURES: dict[str, tuple[str, type[Exception], str]] = {
    "refused first": (
        "echo 'allocation failure: Invalid job array specification' >&2; exit 1",
        SubmitError,
        "Invalid job array",
    ),
    "refused": (f"{CALLED}echo no >&2; exit 1", SubmitError, "refused the job: no"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_sweep_that_is_not_queued_leaves_nothing_behind(name: str, folder: Path) -> None:
    answer, error, words = FAILURES[name]
    fake_program(folder / "bin", "sbatch", answer)
    with pytest.raises(error, match=words):
        submit_sweep(sweep_of(folder, "steps=1,2"), SLURM, folder / "runs")
    assert list((folder / "runs").iterdir()) == []
    assert not (folder / "state").exists()


def test_a_sweep_that_may_be_queued_keeps_its_folder(folder: Path) -> None:
    fake_program(folder / "bin", "sbatch", f"{CALLED}echo welcome")
    with pytest.raises(SchedulerError, match="is kept"):
        submit_sweep(sweep_of(folder, "steps=1,2"), SLURM, folder / "runs")
    assert len(list((folder / "runs").iterdir())) == 1


def test_what_is_missing_is_refused_before_anything_is_made(folder: Path) -> None:
    for wanted in (sweep_of(folder, 'inputs=[["/none"]]'), sweep_of(folder, "steps=1", env_from=["NOT_THERE"])):
        with pytest.raises(ConfigError):
            submit_sweep(wanted, SLURM, folder / "runs")
    assert not (folder / "runs").exists()


def test_a_preview_makes_nothing(folder: Path) -> None:
    text, plan = preview_sweep(sweep_of(folder, "steps=1,2,3"), SLURM, folder / "runs")
    assert text.splitlines()[1] == "#SBATCH --array=1-3"
    assert (plan.tasks, plan.as_data()["tasks"]) == (3, 3)
    text, _ = preview_sweep(sweep_of(folder, "steps=1,2,3"), LOCAL, folder / "runs")
    assert "/1" in text
    assert not (folder / "runs").exists()


def test_a_thousand_runs_are_one_sbatch(folder: Path) -> None:
    wanted = sweep_of(folder, f"steps={','.join(map(str, range(1, 1001)))}", throttle=20)
    sweep = submit_sweep(wanted, SLURM, folder / "runs").sweep
    assert len((folder / "called").read_text().splitlines()) == 2
    assert read_object(SweepDir(sweep.root).run(1000).job)["job_id"] == "44_1000"
