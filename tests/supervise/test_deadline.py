"""When ranks must begin to save: from the limit, and from what steps and saves were seen to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.config.job import JobConfig
from hpc_ds.config.model import check
from hpc_ds.run_dir import RunDir
from hpc_ds.supervise.deadline import Deadline, longest, measured_lead_s

if TYPE_CHECKING:
    from pathlib import Path


def job(**restart: Any) -> JobConfig:
    asked: JobConfig = check(
        JobConfig, {"command": ["x"], "resources": {"time": "01:00:00"}, "restart": restart}, "job.json"
    )
    return asked


# step and save in seconds, restart.lead -> seconds before the limit.
LEADS: list[tuple[float | None, float | None, int | str, float]] = [
    (None, None, "auto", 180),
    (1.0, None, "auto", 180),
    (None, 10.0, "auto", 180),
    (1.0, 10.0, "auto", 37),
    (0.01, 0.1, "auto", 20.17),
    (60.0, 400.0, "auto", 740),
    (60.0, 4000.0, "auto", 1800),
    (1.0, 10.0, 300, 300),
]


@pytest.mark.parametrize(("step_s", "save_s", "asked", "lead"), LEADS)
def test_the_lead_is_measured_unless_the_user_gave_one(
    step_s: float | None, save_s: float | None, asked: int | str, lead: float
) -> None:
    assert measured_lead_s(job(lead=asked), step_s, save_s) == pytest.approx(lead)


def test_the_file_says_begin_end_and_the_lead_of_the_signal(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    deadline = Deadline(run, job())
    assert deadline.earliest_begin is None
    deadline.ends_at(10_000.0)
    assert run.deadline.read_text() == "9820.0 10000.0 - 180\n"
    deadline.learn(step_s=1.0, save_s=10.0)
    assert run.deadline.read_text() == "9963.0 10000.0 - 180\n"
    assert deadline.earliest_begin == 9820.0, "a stop on the signal is one for the limit too"
    deadline.learn(step_s=60.0, save_s=400.0)
    assert deadline.earliest_begin == 9260.0


def test_what_the_scheduler_says_while_it_ends_the_job_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    deadline = Deadline(run, job())
    deadline.ends_at(10_000.0)
    deadline.ends_at(500.0, final=True)
    deadline.ends_at(10_000.0)
    assert run.deadline.read_text() == "320.0 500.0 final 180\n"


def test_without_a_limit_there_is_no_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    deadline = Deadline(run, job())
    deadline.ends_at(10_000.0)
    deadline.ends_at(None)
    assert not run.deadline.exists()
    deadline.learn(step_s=1.0, save_s=1.0)
    assert not run.deadline.exists()


def test_the_longest_of_what_is_known() -> None:
    assert longest([None, 3.0, 5.0, None]) == 5.0
    assert longest([None]) is None
