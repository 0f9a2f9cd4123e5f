"""The run a rank belongs to, as its folder describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.run_dir import RunDir, append_line, read_lines, write_json
from hpc_ds.runtime.run import CurrentRun

if TYPE_CHECKING:
    from pathlib import Path


def test_outside_of_a_run_there_is_none() -> None:
    assert CurrentRun.from_environment() is None


def test_a_run_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = {"dir": "/saves", "every_steps": 5, "every_minutes": None, "keep": 2}
    write_json(RunDir(tmp_path).config, {"checkpoint": checkpoint, "training": {"train_batch_size": 4}})
    monkeypatch.setenv("HPCDS_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("HPCDS_ATTEMPT", "3")
    run = CurrentRun.from_environment()
    assert run is not None
    assert (run.attempt, str(run.checkpoints)) == (3, "/saves")
    assert (run.every_steps, run.every_minutes, run.keep) == (5, None, 2)
    assert run.training == {"train_batch_size": 4}


def test_saves_are_in_the_run_folder_unless_the_job_says_where(tmp_path: Path) -> None:
    write_json(RunDir(tmp_path).config, {"checkpoint": {"dir": None}, "training": None})
    run = CurrentRun(tmp_path, 1)
    assert run.checkpoints == tmp_path / "checkpoints"
    assert run.training is None


def test_a_run_folder_without_a_config_is_a_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDS_RUN_DIR", str(tmp_path))
    run = CurrentRun.from_environment()
    assert run is not None
    assert (run.attempt, run.checkpoints) == (0, tmp_path / "checkpoints")


def test_events_are_lines_with_attempt_and_time(tmp_path: Path) -> None:
    run = CurrentRun(tmp_path, 2)
    run.record("step", step=1, loss=0.5)
    run.record("saved", step=1)
    lines = read_lines(tmp_path / "events.jsonl")
    assert [(line["event"], line["attempt"], line["step"]) for line in lines] == [("step", 2, 1), ("saved", 2, 1)]
    assert lines[0]["time"] <= lines[1]["time"]
    assert lines[0]["loss"] == pytest.approx(0.5)


def attempt(run: CurrentRun, number: int, begin: float, end: float | None = None, cause: str = "crashed") -> None:
    append_line(run.files.ledger, {"event": "opened", "number": number, "opened": begin})
    if end is not None:
        append_line(run.files.ledger, {"event": "closed", "number": number, "closed": end, "cause": cause})


@pytest.mark.parametrize(
    ("attempts", "wanted"),
    [
        ([], None),
        ([(0, None, "")], None),
        ([(0, 100, "walltime"), (200, 300, "preempted"), (400, 500, "cancelled")], None),
        ([(0, 100, "crashed")], 100),
        ([(0, 100, "walltime"), (1000, 1300, "lost")], 400),  # what lies between attempts was spent in the queue
        ([(0, 100, "node_failure"), (100, 200, "requeued"), (200, 210, "stopped"), (300, None, "")], 105),
    ],
)
def test_the_time_between_failures_is_that_of_the_ledger(
    tmp_path: Path, attempts: list[tuple[float, float | None, str]], wanted: float | None
) -> None:
    run = CurrentRun(tmp_path, 1)
    for number, (begin, end, cause) in enumerate(attempts, 1):
        attempt(run, number, begin, end, cause)
    assert run.failures_every_s() == wanted


@pytest.mark.parametrize(
    "line",
    [
        {"event": "opened", "number": 7},
        {"event": "closed", "number": 7, "closed": 9.0, "cause": "crashed"},
        {"event": "closed", "number": 1, "cause": "crashed"},
        {"event": "noted"},
    ],
)
def test_lines_of_the_ledger_that_lack_something_count_for_nothing(tmp_path: Path, line: dict[str, Any]) -> None:
    run = CurrentRun(tmp_path, 1)
    append_line(run.files.ledger, line)
    attempt(run, 1, 0.0)
    append_line(run.files.ledger, line)
    with run.files.ledger.open("ab") as file:
        file.write(b'{"event": "closed", "number": 1, "clo')  # torn; the next line ends it
    append_line(run.files.ledger, {"event": "closed", "number": 1, "closed": 50.0, "cause": "lost"})
    assert run.failures_every_s() == 50.0
