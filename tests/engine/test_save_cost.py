"""How often to save, and what to do when the end is near: arithmetic, and the clock that asks it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.engine import saving
from hpc_ds.engine.save_cost import FINISH, FINISH_AND_SAVE, SAVE, SaveCost, best_interval_s, choice
from hpc_ds.engine.saving import Saving
from hpc_ds.run_dir import RunDir, append_line, write_json
from hpc_ds.runtime.run import CurrentRun

if TYPE_CHECKING:
    from pathlib import Path

positive = st.floats(0.01, 1e4)


@pytest.mark.parametrize(
    ("remaining_s", "save_s", "left_s", "wanted"),
    [
        (10.0, 20.0, 31.0, FINISH_AND_SAVE),
        (10.0, 20.0, 29.0, SAVE),
        (10.0, 20.0, 19.0, FINISH),
        (30.0, 20.0, 19.0, SAVE),  # neither fits: what lacks less
        (10.0, 20.0, math.inf, FINISH_AND_SAVE),
        (10.0, 20.0, 0.0, FINISH),
        (None, 20.0, 5.0, FINISH_AND_SAVE),  # there is nothing to lose by trying
        (0.0, 0.0, 0.0, FINISH_AND_SAVE),  # nobody knows yet
    ],
)
def test_the_newest_step_that_can_be_durable(
    remaining_s: float | None, save_s: float, left_s: float, wanted: str
) -> None:
    assert choice(remaining_s, save_s, left_s) == wanted


@given(positive, positive, positive)
def test_what_is_chosen_fits_where_anything_does(remaining_s: float, save_s: float, left_s: float) -> None:
    takes = {FINISH_AND_SAVE: remaining_s + save_s, SAVE: save_s, FINISH: remaining_s}
    chosen = choice(remaining_s, save_s, left_s)
    newer = [what for what in (FINISH_AND_SAVE, SAVE) if takes[what] <= left_s]
    assert takes[chosen] <= left_s or min(takes.values()) > left_s
    assert chosen in newer or not newer


@given(positive, positive)
def test_the_interval_is_where_saving_and_repeating_cost_least(stall_s: float, failures_every_s: float) -> None:
    def lost(interval_s: float) -> float:  # of a second of work: to saves, and to what is repeated after a failure
        return stall_s / interval_s + interval_s / 2 / failures_every_s

    best = best_interval_s(stall_s, failures_every_s)
    assert best == pytest.approx(math.sqrt(2 * stall_s * failures_every_s))
    assert all(lost(best) <= lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


class Clock:
    """Time that stands until it is told, and an engine's saves as far as the clock asks about them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, **checkpoint: Any) -> None:
        self.now = 1000.0
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: self.now))
        write_json(RunDir(root).config, {"checkpoint": checkpoint})
        self.is_running = False
        self.checkpoints: Any = SimpleNamespace(cost=SaveCost(), saved_at=self.now, running=lambda: self.is_running)
        self.saving = Saving(cast("Any", None), self.checkpoints, CurrentRun(root, 1))

    def first_due_s(self, below_s: int = 10_000) -> int | None:
        """After so many whole seconds a save is due."""
        for seconds in range(below_s):
            self.now = self.checkpoints.saved_at + seconds
            if self.saving.due_by_the_clock():
                return seconds
        return None


@pytest.mark.parametrize(("minutes", "wanted"), [(1, 61), (0.5, 31), (None, None)])
def test_every_so_many_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minutes: float | None, wanted: int | None
) -> None:
    clock = Clock(monkeypatch, tmp_path, every_minutes=minutes)
    assert clock.first_due_s() == wanted
    clock.checkpoints.saved_at += 10.0
    assert clock.first_due_s() == wanted


def test_outside_of_a_run_no_save_is_due(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path, every_minutes=1)
    clock.saving = Saving(cast("Any", None), clock.checkpoints, None)
    assert clock.first_due_s() is None


def test_while_a_save_is_written_none_is_due(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, tmp_path, every_minutes=1)
    clock.is_running = True
    assert clock.first_due_s() is None
    clock.is_running = False
    assert clock.saving.due_by_the_clock()


@pytest.mark.parametrize(
    ("stall_s", "failures_every_s", "bounds", "wanted_s"),
    [
        (None, 3600, {}, 120),  # the first save tells what one costs
        (2.0, 3600, {}, 120),  # exactly the shortest: sqrt(2 * 2 * 3600)
        (8.0, 3600, {}, 240),
        (0.001, 3600, {}, 120),
        (5000.0, 3600, {}, 3600),
        (8.0, 3600, {"shortest_minutes": 5}, 300),
        (8.0, 3600, {"longest_minutes": 3}, 180),
        (0.5, None, {}, 293.9),  # a day, while the run has not failed yet
    ],
)
def test_auto_follows_from_what_a_save_costs_and_how_often_the_run_fails(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stall_s: float | None,
    failures_every_s: int | None,
    bounds: dict[str, float],
    wanted_s: float,
) -> None:
    if failures_every_s is not None:
        append_line(RunDir(tmp_path).ledger, {"event": "opened", "number": 1, "opened": 0.0})
        closed = {"event": "closed", "number": 1, "closed": failures_every_s, "cause": "crashed"}
        append_line(RunDir(tmp_path).ledger, closed)
    clock = Clock(monkeypatch, tmp_path, every_minutes="auto", **bounds)
    clock.checkpoints.cost.stall_s = stall_s
    assert clock.first_due_s() == math.floor(wanted_s) + 1
