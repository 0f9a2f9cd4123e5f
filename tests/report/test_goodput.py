"""Where the time of a run went, added up by hand for runs of a few steps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program
from runs_on_disk import closed, event, made, opened, steps

from hpc_ds.report.goodput import IN_ALLOCATION, Goodput, goodput_of
from hpc_ds.run_dir import write_json

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fake_program(tmp_path / "bin", "squeue", "exit 0")
    fake_program(tmp_path / "bin", "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")


def seconds(found: Goodput, attempt: int | None = None) -> dict[str, float]:
    told = found.total.as_data() if attempt is None else found.attempts[attempt - 1]["seconds"]
    return {name: value for name, value in told.items() if value}


def test_a_run_that_nothing_disturbed(tmp_path: Path) -> None:
    """Submitted at 1000, begun at 1010, first step from 1020 to 1022, ten steps of 2 s, a save of 3 s at the end."""
    run = made(tmp_path)
    opened(run, 1, 1010.0)
    end = steps(run, 1, 1020.0, range(1, 11), 2.0)
    event(run, "saved", 1, end + 3, 10, stall_s=3.0, seconds=9.0)
    closed(run, 1, end + 5, "finished", action="finish")
    found = goodput_of(run)
    whole = {"allocated": 35.0, "training": 20.0, "start_up": 10.0, "saving": 3.0, "other": 2.0, "queueing": 10.0}
    assert seconds(found) == whole == seconds(found, 1)
    assert found.goodput == pytest.approx(20 / 35)
    assert (found.unit, found.state, found.sacct_allocated) == ("rank", "finished", None)
    assert found.hours["training"] == pytest.approx(20 / 3600, abs=1e-6)
    assert json.loads(json.dumps(found.as_data()))["goodput"] == found.goodput


def test_what_a_save_costs_is_taken_from_the_step_after_it(tmp_path: Path) -> None:
    """A save behind the training: it is durable long after the steps stood still for it."""
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    at = steps(run, 1, 1000.0, range(1, 5), 1.0)
    event(run, "step", 1, at + 1.5, 5, loss=1.0, seconds=1.5)
    at = steps(run, 1, at + 1.5, range(6, 9), 1.0)
    event(run, "saved", 1, at - 0.5, 4, stall_s=0.5, seconds=3.0)
    closed(run, 1, at, "finished")
    assert seconds(goodput_of(run)) == {"allocated": 8.5, "training": 8.0, "saving": 0.5}


def test_steps_beyond_what_the_next_attempt_went_on_from_are_lost(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    closed(run, 1, steps(run, 1, 1004.0, range(1, 11), 1.0) + 2, "crashed", action="requeue", saved_step=6)
    opened(run, 2, 1030.0)
    closed(run, 2, steps(run, 2, 1034.0, range(7, 13), 1.0), "finished")
    found = goodput_of(run)
    assert seconds(found, 1) == {"allocated": 16.0, "training": 6.0, "start_up": 4.0, "lost": 4.0, "other": 2.0}
    assert seconds(found, 2) == {"allocated": 10.0, "training": 6.0, "start_up": 4.0, "queueing": 14.0}
    assert found.by_cause["crashed"]["attempts"] == 1
    assert found.by_cause["crashed"]["lost"] == pytest.approx(4 / 3600, abs=1e-6)
    assert found.total.training == 12, "every step counts once"


def test_an_attempt_that_got_less_far_loses_the_steps_before_it_too(tmp_path: Path) -> None:
    run = made(tmp_path)
    for number, taken in enumerate((range(1, 11), range(6, 8), range(3, 12)), start=1):
        opened(run, number, 1000.0 * number)
        end = steps(run, number, 1000.0 * number, taken, 1.0)
        closed(run, number, end, "finished" if number == 3 else "crashed", action="requeue")
    found = goodput_of(run)
    assert [one["seconds"]["training"] for one in found.attempts] == [2.0, 0.0, 9.0]
    assert found.total.training == 11


def test_of_a_run_that_is_held_what_was_not_saved_is_lost(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    closed(run, 1, steps(run, 1, 1000.0, range(1, 11), 1.0), "crashed", action="hold", saved_step=8)
    assert seconds(goodput_of(run)) == {"allocated": 10.0, "training": 8.0, "lost": 2.0}


def test_an_attempt_without_a_step_is_all_start_up(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    closed(run, 1, 1030.0, "crashed", action="hold")
    found = goodput_of(run)
    assert seconds(found) == {"allocated": 30.0, "start_up": 30.0}
    assert found.goodput == 0.0


def test_before_anything_was_allocated_there_is_no_goodput(tmp_path: Path) -> None:
    fake_program(tmp_path / "bin", "squeue", "echo '25|25|PENDING|7|N/A|N/A||Priority'")
    found = goodput_of(made(tmp_path), now=1060.0)
    assert (found.goodput, seconds(found), found.attempts) == (None, {"queueing": 60.0}, [])


def test_a_run_that_goes_on_is_added_up_until_now(tmp_path: Path) -> None:
    fake_program(tmp_path / "bin", "squeue", "echo '25|25|RUNNING|7|N/A|N/A|n1|None'")
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    steps(run, 1, 1005.0, range(1, 11), 1.0)
    found = goodput_of(run, now=1016.0)
    assert seconds(found) == {"allocated": 16.0, "training": 10.0, "start_up": 5.0, "other": 1.0}
    assert list(found.by_cause) == ["running"]


def test_time_until_a_person_resumed_is_not_queueing(tmp_path: Path) -> None:
    run = made(tmp_path, job_id="26")
    write_json(run.job, {"job_id": "26", "earlier": ["25"], "queued": {"25": 1000.0, "26": 1900.0}})
    opened(run, 1, 1000.0)
    closed(run, 1, 1100.0, "cancelled", action="leave")
    opened(run, 2, 2000.0, job_id="26")
    closed(run, 2, 2100.0, "finished")
    assert seconds(goodput_of(run), 2) == {"allocated": 100.0, "start_up": 100.0, "queueing": 100.0, "stopped": 800.0}


@pytest.mark.parametrize(("job_id", "part"), [("25", "queueing"), ("26", "stopped")])
def test_slurm_may_have_queued_a_lost_attempt_again_itself(job_id: str, part: str, tmp_path: Path) -> None:
    run = made(tmp_path, job_id=job_id)
    opened(run, 1, 1000.0)
    closed(run, 1, 1100.0, "lost", action="leave")
    opened(run, 2, 1150.0, job_id=job_id)
    closed(run, 2, 1200.0, "finished")
    assert seconds(goodput_of(run), 2) == {"allocated": 50.0, "start_up": 50.0, part: 50.0}


def test_hours_are_of_gpus_where_there_are_some_and_of_each_attempt_s_own_size(tmp_path: Path) -> None:
    run = made(tmp_path, resources={"nodes": 1, "gpus_per_node": 4})
    write_json(run.config_before(2), {"resources": {"nodes": 2, "gpus_per_node": 4}})
    for number in (1, 2):
        opened(run, number, 10_000.0 * number)
        closed(run, number, 10_000.0 * number + 3600, "preempted" if number == 1 else "finished", action="requeue")
    found = goodput_of(run)
    assert ([one["devices"] for one in found.attempts], found.unit) == ([8, 4], "GPU")
    assert found.hours["allocated"] == pytest.approx(12.0)
    assert {cause: one["allocated"] for cause, one in found.by_cause.items()} == {"preempted": 8.0, "finished": 4.0}


def test_what_sacct_counts_stands_beside(tmp_path: Path) -> None:
    fake_program(
        tmp_path / "bin", "sacct", "echo '25|PREEMPTED|61|2026-01-31T13:45:00|n1'; echo '25|COMPLETED|9|Unknown|n1'"
    )
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    closed(run, 1, 1030.0, "finished")
    assert goodput_of(run).sacct_allocated == 70.0


@pytest.mark.parametrize("cause", ["finished", "crashed", "preempted", "hang", "lost"])
@pytest.mark.parametrize("seconds_a_step", [0.001, 1.0, 7.5])
def test_no_second_is_counted_twice(cause: str, seconds_a_step: float, tmp_path: Path) -> None:
    run = made(tmp_path)
    end, allocated = 1000.0, 0.0
    for number, taken in enumerate((range(1, 9), range(5, 7), range(0), range(6, 12)), start=1):
        begin = end + 10
        opened(run, number, begin)
        end = steps(run, number, begin + 3, taken, seconds_a_step) + 1
        for step in taken:
            event(run, "saved", number, end, step, stall_s=2.0)
        closed(run, number, end, cause, action="requeue")
        allocated += end - begin
    found = goodput_of(run)
    data: dict[str, Any] = found.total.as_data()
    assert data["allocated"] == pytest.approx(allocated, abs=0.01)
    assert sum(data[name] for name in IN_ALLOCATION) == pytest.approx(allocated, abs=0.01)
    assert found.goodput is not None
    assert 0 <= found.goodput <= 1
