"""Ranks that are silent or still: by the beats that they leave, whose times the test sets."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeShell
from runs_on_disk import made, opened, steps

from hpc_ds.cluster.queue import Queue
from hpc_ds.report.beats import Pulse, quiet_ranks
from hpc_ds.report.status import statuses_of
from hpc_ds.report.summary import quiet_lines

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.run_dir import RunDir

MOVING = {"still_s": 0.1, "idle_s": 0.2, "phase": "forward", "step": 12, "told": None, "where": "model.py:7 forward"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return made(tmp_path)


NEWEST = time.time() + 3600  # however slow the test is, this machine's clock does not find all of them old
LONG_AGO_S = 2 * 3600.0


def beat(run: RunDir, rank: int, *, age_s: float = 1.0, count: int = 5, **said: Any) -> None:
    """What a rank wrote so many seconds ago, padded as the rank pads it."""
    path = run.beats(1) / f"rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"rank": rank, "host": f"n{rank}", "pid": 1, "count": count, **MOVING, **said}) + "\n"
    path.write_bytes(line.encode().ljust(512))
    os.utime(path, (NEWEST - age_s,) * 2)


def quiet(run: RunDir, step_s: float | None = 1.0, pulse: Pulse | None = None) -> list[tuple[int, str]]:
    return [(one["rank"], one["how"]) for one in quiet_ranks(run, 1, step_s, pulse)]


def test_ranks_that_beat_and_move_are_not_named(run: RunDir) -> None:
    assert quiet(run) == []
    for rank in range(4):
        beat(run, rank)
    assert quiet(run) == []


def test_a_rank_whose_fellows_still_beat_is_silent(run: RunDir) -> None:
    for rank in range(4):
        beat(run, rank, age_s=400.0 if rank == 2 else 1.0)
    (one,) = quiet_ranks(run, 1, 1.0)
    assert (one["rank"], one["host"], one["how"]) == (2, "n2", "silent")
    assert one["seconds"] == pytest.approx(399)


def test_ranks_that_all_went_silent_together_are_named(run: RunDir) -> None:
    for rank in range(2):
        beat(run, rank, age_s=LONG_AGO_S)
    assert quiet(run) == [(0, "silent"), (1, "silent")]


def test_a_rank_that_does_not_move_is_still(run: RunDir) -> None:
    beat(run, 0, still_s=300.0)
    beat(run, 1, still_s=900.0)
    beat(run, 2, still_s=60.0)
    assert quiet(run) == [(1, "still"), (0, "still")]
    assert quiet(run, step_s=50.0) == [(1, "still")], "a step takes nearly a minute here"


def test_a_rank_that_has_finished_is_done(run: RunDir) -> None:
    beat(run, 0, age_s=900.0, phase="finished")
    beat(run, 1)
    assert quiet(run) == []


def test_whoever_watches_judges_by_the_count_and_its_own_clock() -> None:
    pulse = Pulse()
    assert pulse.quiet_s(0, 5, 100.0) == 0
    assert pulse.quiet_s(0, 5, 160.0) == 60
    assert pulse.quiet_s(0, 6, 161.0) == 0
    assert pulse.quiet_s(0, 6, 163.0) == 2
    assert pulse.quiet_s(1, 6, 163.0) == 0


def test_torn_beats_and_other_files_are_passed_over(run: RunDir) -> None:
    beat(run, 0, age_s=900.0)
    beat(run, 1)
    folder = run.beats(1)
    (folder / "rank-2.json").write_bytes(b'{"rank": 2, "cou')
    (folder / "rank-3.json").write_bytes(b"[]\n")
    (folder / "rank-4.json").write_bytes(b"")
    (folder / ".rank-5").write_bytes(b"\xff")
    assert quiet(run) == [(0, "silent")]


def test_quiet_ranks_are_in_the_status_of_a_running_run(tmp_path: Path) -> None:
    run = made(tmp_path, "gpt-2", steps=100)
    opened(run, 1, 1000.0)
    steps(run, 1, 1000.0, range(1, 13), 1.0)
    for rank in range(8):
        beat(run, rank, still_s=600.0 + rank)
    shell = FakeShell({"squeue": ["25|25|RUNNING|7|N/A|N/A|n1|None\n", "25|25|PENDING|7|N/A|N/A||None\n"]})
    (found,) = statuses_of([run], Queue(shell))
    assert (found.steps_per_s, found.eta_s) == (1.0, None), "it would not be in time"
    lines = quiet_lines(found)
    assert lines[0] == "rank 7 on n7: still for 10 min, forward at step 12 (model.py:7 forward)"
    assert lines[-1] == "and 3 more ranks"
    (found,) = statuses_of([run], Queue(shell))
    assert (found.state, found.quiet_ranks) == ("waiting", [])
