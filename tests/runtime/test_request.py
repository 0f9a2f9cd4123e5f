"""What one rank makes of a signal and of the deadline: whether it stops, when, and how long it has."""

from __future__ import annotations

import math
import signal
import time
from typing import TYPE_CHECKING

import pytest

from hpc_ds.runtime import request as room
from hpc_ds.runtime.request import Deadline, Request

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the supervisor writes; it is not there yet."""
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    return tmp_path / "deadline"


DEADLINES = {
    "past": (lambda: f"{time.time() - 1} {time.time() + 9}", "deadline"),
    "past, with a line end": (lambda: f"{time.time() - 1} {time.time() + 9}\n", "deadline"),
    "to come": (lambda: f"{time.time() + 100} {time.time() + 110}", None),
    "nothing": (lambda: "", None),
    "one number": (lambda: str(time.time() - 1), None),
    "no number": (lambda: "soon later", None),
    "no time": (lambda: "nan nan", None),
}


@pytest.mark.parametrize(("text", "by"), DEADLINES.values(), ids=DEADLINES)
def test_a_deadline_that_has_passed_is_a_request(text: object, by: str | None, deadline: Path) -> None:
    deadline.write_text(text())  # type: ignore[operator]
    request = Request()
    request.look_at_the_clock()
    assert request.by == by


def test_a_deadline_that_is_not_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request()
    request.look_at_the_clock()
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "none"))
    request.look_at_the_clock()
    assert request.by is None


def test_the_clock_is_looked_at_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    request = Request()
    request.look_at_the_clock()
    (tmp_path / "deadline").write_text("0 1")
    request.look_at_the_clock()
    assert request.by is None, "it was looked at a moment ago"
    clock[0] += 5.1
    request.look_at_the_clock()
    assert request.by == "deadline"


def test_a_signal_is_not_overruled_by_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadline").write_text("0 1")
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    request = Request()
    request.hear(15, None)
    request.look_at_the_clock()
    assert request.by == "SIGTERM"


def test_the_time_left_is_known_from_what_told_the_rank(deadline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request()
    assert request.seconds_left() == math.inf
    deadline.write_text(f"{time.time() - 1} {time.time() + 600}")
    assert 500 < request.seconds_left() <= 600
    request.hear(signal.SIGUSR2)
    assert 500 < request.seconds_left() <= 600
    request.hear(signal.SIGTERM)  # the scheduler ends the job now, whatever its time limit
    assert 0 < request.seconds_left() <= 30
    now = time.time()
    monkeypatch.setattr(room.time, "time", lambda: now + 100)
    request.hear(signal.SIGTERM)
    assert request.seconds_left() == 0, "the first one counts"


def test_what_the_scheduler_says_while_it_ends_the_job_is_better_than_a_guess(deadline: Path) -> None:
    request = Request()
    request.hear(signal.SIGTERM)
    deadline.write_text(f"{time.time() + 100} {time.time() + 120} - 60")
    assert request.seconds_left() <= 30
    deadline.write_text(f"{time.time() + 100} {time.time() + 120} final 60\n")
    assert 90 < request.seconds_left() <= 120
    deadline.write_text(f"{time.time() + 1} {time.time() + 3} final\n")
    assert request.seconds_left() <= 3


# The warning signal comes up to a minute before it was asked for. Seconds from now until saving should begin and until the
# end, the words after them, the signal -> whether the rank stops at once.
WARNINGS = {
    "no file": (None, "SIGUSR2", True),
    "nobody says when it was asked for": ((60, 100, ""), "SIGUSR2", True),
    "nor here": ((60, 100, "-"), "SIGUSR2", True),
    "early": ((60, 100, "- 30"), "SIGUSR2", False),
    "as early as can be": ((110, 119, "- 30"), "SIGUSR2", False),
    "too early for that": ((110, 122, "- 30"), "SIGUSR2", True),
    "long before the end": ((3000, 3600, "- 60"), "SIGUSR2", True),
    "in time": ((-1, 100, "- 60"), "SIGUSR2", True),
    "early, of a job that is being ended": ((60, 100, "final 30"), "SIGUSR2", False),
    "another signal": ((60, 100, "- 30"), "SIGTERM", True),
    "no number": ((60, 100, "- soon"), "SIGUSR2", True),
    "no time": ((math.nan, math.nan, "- 30"), "SIGUSR2", True),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(("told", "name", "stops"), WARNINGS.values(), ids=WARNINGS)
def test_a_warning_that_comes_early_leaves_time_for_training(
    told: tuple[float, float, str] | None, name: str, stops: bool, watched: bool, deadline: Path
) -> None:
    if told is not None:
        deadline.write_text(f"{time.time() + told[0]} {time.time() + told[1]} {told[2]}\n")
    request = Request()
    request.watched = watched
    request.hear(signal.Signals[name])
    assert request.is_due() is stops
    assert request.by == name


@pytest.mark.parametrize("end", ["the time to begin", "an earlier limit", "no file", "SIGTERM"])
def test_training_goes_on_after_an_early_warning_until_something_else_is_said(
    end: str, deadline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [5000.0]
    monkeypatch.setattr(room.time, "time", lambda: clock[0])
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    deadline.write_text("5060 5100 - 30")
    request = Request()
    request.hear(signal.SIGUSR2)
    for _ in range(20):
        assert not request.is_due()
        request.hear(signal.SIGUSR2)
        clock[0] += 2
    if end == "the time to begin":
        clock[0] = 5060.0
    elif end == "an earlier limit":
        deadline.write_text("5030 5070 - 30")
    elif end == "no file":
        deadline.unlink()
    else:
        request.hear(signal.SIGTERM)
    assert request.is_due()
    assert request.by == ("SIGTERM" if end == "SIGTERM" else "SIGUSR2")
    deadline.write_text("6000 7000 - 30")
    assert request.is_due(), "what was decided stays"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1 2\n", Deadline(1, 2)),
        ("1 2 final\n", Deadline(1, 2, final=True)),
        ("1 2 -\n", Deadline(1, 2)),
        ("1.5 2 - 60\n", Deadline(1.5, 2, lead_s=60)),
        ("1 2 final 60\n", Deadline(1, 2, final=True, lead_s=60)),
        ("1 2 final 60 more\n", Deadline(1, 2, final=True, lead_s=60)),
        ("1 2 final soon\n", None),
        ("1\n", None),
        ("", None),
    ],
)
def test_the_words_of_a_deadline(text: str, read: Deadline | None, deadline: Path) -> None:
    deadline.write_text(text)
    assert Deadline.read() == read


def test_with_a_watcher_a_look_without_news_reads_no_file(deadline: Path) -> None:
    deadline.write_text("0 1")
    request = Request()
    request.watched = True
    assert not request.is_due()
    request.look_at_the_clock()
    assert request.is_due()
