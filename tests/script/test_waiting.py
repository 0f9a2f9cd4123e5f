"""What a run waits for, in Slurm's words and in files; and that it goes on waiting when the other gets another job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import FakeScheduler

from hpc_ds.cluster.local_wait import verdict
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.errors import RefusedError
from hpc_ds.run_dir import RunDir, write_json
from hpc_ds.script.waiting import Wait, dependency, read_waits, redirect, write_waits

if TYPE_CHECKING:
    from pathlib import Path


def run_in(folder: Path, job_id: str) -> RunDir:
    run = RunDir(folder)
    run.local.mkdir(parents=True)
    write_json(run.job, {"job_id": job_id})
    return run


def test_waits_are_told_in_slurms_words(tmp_path: Path) -> None:
    waits = [
        Wait(tmp_path, job_id, when)
        for job_id, when in [("7", "any"), ("5", "ok"), ("6_1", "ok"), ("5", "ok"), ("8", "notok")]
    ]
    assert dependency(waits) == "afterok:5:6_1,afterany:7,afternotok:8"
    assert dependency([]) is None


def test_a_run_goes_on_waiting_for_the_job_with_which_the_other_goes_on(tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "first", "5"), run_in(tmp_path / "second", "6")
    write_waits(second, [Wait(first.root, "5", "ok"), Wait(tmp_path, "4", "any")])
    waiting = FakeScheduler([JobState("PENDING")])
    assert redirect(first, "5", "9", waiting) == []
    assert waiting.requests == ["depend 6 afterok:9,afterany:4"]
    assert [wait.job_id for wait in read_waits(second)] == ["9", "4"]
    assert redirect(first, "5", "10", waiting) == [], "it waits for 9 now"
    assert len(waiting.requests) == 1


@pytest.mark.parametrize("state", [None, JobState("RUNNING")])
def test_a_run_that_waits_no_more_is_left_alone(tmp_path: Path, state: JobState | None) -> None:
    first, second = run_in(tmp_path / "first", "5"), run_in(tmp_path / "second", "6")
    write_waits(second, [Wait(first.root, "5", "ok")])
    scheduler = FakeScheduler([state])
    assert redirect(first, "5", "9", scheduler) == []
    assert scheduler.requests == []


def test_a_run_that_cannot_be_told_is_named(tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "first", "5"), run_in(tmp_path / "second", "6")
    write_waits(second, [Wait(first.root, "5", "ok")])
    scheduler = FakeScheduler([JobState("PENDING")], depend=RefusedError("no"))
    (problem,) = redirect(first, "5", "9", scheduler)
    assert problem == f"run {str(second.root)!r}, job 6, waits for job 5, which is now 9: no"
    assert [wait.job_id for wait in read_waits(second)] == ["5"]


# State of the other on site local, what is waited for -> what a keeper makes of it.
VERDICTS = {
    ("COMPLETED", "ok"): "go",
    ("COMPLETED", "any"): "go",
    ("COMPLETED", "notok"): "never",
    ("FAILED", "ok"): "never",
    ("CANCELLED", "any"): "go",
    ("TIMEOUT", "notok"): "go",
    ("SPECIAL_EXIT", "ok"): "wait",
    ("SPECIAL_EXIT", "notok"): "go",
    (None, "ok"): "never",
    (None, "any"): "go",
}


@pytest.mark.parametrize(("state", "when"), VERDICTS)
def test_a_keeper_looks_at_the_other_run(tmp_path: Path, state: str | None, when: str) -> None:
    first, second = run_in(tmp_path / "first", "5"), run_in(tmp_path / "second", "6")
    assert verdict(second) == "go", "it waits for nothing"
    write_waits(second, [Wait(first.root, "5", when)])
    if state is not None:
        job = {"state": state, "held": state == "SPECIAL_EXIT"}
        write_json(first.local / "state.json", {"job_id": "5", "pid": 1, "started": 0, "job": job})
    assert verdict(second) == VERDICTS[state, when]
