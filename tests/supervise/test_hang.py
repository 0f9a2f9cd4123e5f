"""Signs of life, a clock that the test turns, and what the supervisor makes of both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.supervise.hang import Beat, HangWatch, read_beat, read_beats

if TYPE_CHECKING:
    from pathlib import Path

BOUND_S = 1800.0


class Ranks:
    """Ranks that beat every few seconds of a clock that the test turns."""

    def __init__(self, folder: Path, size: int, bound_s: float | None = BOUND_S) -> None:
        self.now = 1000.0
        self.watch = HangWatch(folder, size, bound_s, clock=lambda: self.now)
        self._folder = folder
        self._beats = {rank: {"rank": rank, "host": f"n{rank}", "count": 0, "phase": "forward"} for rank in range(size)}
        self.silent: set[int] = set()
        self.still: set[int] = set()
        self.idle = False

    def say(self, rank: int, **fields: Any) -> None:
        self._beats[rank].update(fields)

    def forget(self, rank: int) -> None:
        del self._beats[rank]

    def pass_time(self, seconds: float, step_s: float | None = 1.0) -> tuple[float, str] | None:
        """When a hang is seen, and what is said of it; None while there is none."""
        end = self.now + seconds
        while self.now < end:
            self.now += 3.0
            for rank, beat in self._beats.items():
                if rank not in self.silent:
                    beat["count"] += 1
                    beat["still_s"] = beat.get("still_s", 0.0) + 3.0 if rank in self.still else 0.0
                    beat["idle_s"] = beat.get("idle_s", 0.0) + 3.0 if self.idle or rank in self.still else 0.0
                    (self._folder / f"rank-{rank}.json").write_text(json.dumps(beat).ljust(511) + "\n")
            if (hang := self.watch.look(step_s)) is not None:
                return seconds - (end - self.now), hang.detail
        return None


def test_ranks_that_move_do_not_hang(tmp_path: Path) -> None:
    assert Ranks(tmp_path, 4).pass_time(5000) is None


def test_one_rank_that_moves_is_enough(tmp_path: Path) -> None:
    """The others wait for it: an evaluation on rank 0, a data loader that is slow."""
    ranks = Ranks(tmp_path, 4)
    ranks.still = {1, 2, 3}
    assert ranks.pass_time(2500) is None


def test_all_that_stand_hang_after_ten_steps_or_a_minute(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.still = {0, 1}
    after, detail = ranks.pass_time(100, step_s=1.0) or (0.0, "")
    assert after == pytest.approx(63, abs=3)
    assert detail.startswith("every rank has stood still for 63 s")


def test_long_steps_are_given_ten_times_as_long(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.still = {0, 1}
    after, _ = ranks.pass_time(1000, step_s=50.0) or (0.0, "")
    assert after == pytest.approx(503, abs=3)


@pytest.mark.parametrize("phase", ["starting", "loading", "saving", "stopping", "finished"])
def test_what_takes_its_time_is_given_the_configured_bound(phase: str, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.say(1, phase=phase)
    ranks.still = {0, 1}
    after, _ = ranks.pass_time(3000) or (0.0, "")
    assert after == pytest.approx(BOUND_S + 3, abs=3)


def test_before_the_second_step_the_configured_bound_counts(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.still = {0, 1}
    after, _ = ranks.pass_time(3000, step_s=None) or (0.0, "")
    assert after == pytest.approx(BOUND_S + 3, abs=3)


def test_a_silent_rank_is_named_with_its_host(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 4)
    for rank in range(4):
        ranks.say(rank, where="agreement.py:52 agree")
    assert ranks.pass_time(30) is None
    ranks.still, ranks.silent = {0, 1, 3}, {2}
    _, detail = ranks.pass_time(100) or (0.0, "")
    assert "rank 2 on n2 gives no sign of life; 3 of 4 ranks are in agreement.py:52 agree" in detail


def test_a_rank_that_never_came_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.forget(1)
    ranks.still = {0, 2}
    _, detail = ranks.pass_time(3000, step_s=None) or (0.0, "")
    assert "rank 1 never came" in detail


def test_the_one_that_is_elsewhere_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    for rank, where in enumerate(["a.py:1 wait", "data.py:9 read", "a.py:1 wait"]):
        ranks.say(rank, where=where)
    ranks.still = {0, 1, 2}
    _, detail = ranks.pass_time(100) or (0.0, "")
    assert detail.endswith("2 of 3 ranks are in a.py:1 wait; rank 1 on n1 is in data.py:9 read")


def test_moving_without_training_hangs_after_the_configured_bound(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.idle = True
    after, detail = ranks.pass_time(3000) or (0.0, "")
    assert after == pytest.approx(BOUND_S + 3, abs=3)
    assert detail.startswith("nothing has been trained for")


def test_a_pause_of_the_supervisor_is_no_hang(tmp_path: Path) -> None:
    """A suspended job: ranks and supervisor stood still together, and go on together."""
    ranks = Ranks(tmp_path, 2)
    assert ranks.pass_time(30) is None
    ranks.now += 7200
    for rank in (0, 1):
        ranks.say(rank, still_s=7200.0, idle_s=7200.0)
    ranks.still = {0, 1}
    assert ranks.pass_time(30) is None
    assert ranks.pass_time(100) is not None, "it counts from then on"


@pytest.mark.parametrize(("size", "bound_s"), [(0, BOUND_S), (2, None)])
def test_who_gives_no_signs_or_wants_no_looks_is_left_alone(size: int, bound_s: float | None, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, size, bound_s)
    ranks.still = {0, 1}
    assert ranks.pass_time(2500) is None


def test_a_beat_is_read_to_its_line_end_and_torn_ones_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rank-3.json"
    assert read_beat(path) is None
    path.write_text('{"rank": 3, "host": "n1", "count": 7, "new": 1}   \n{"rest": ')
    assert read_beat(path) == Beat(rank=3, host="n1", count=7)
    (tmp_path / "rank-4.json").write_text('{"rank": 4, "ho')
    (tmp_path / "rank-5.json").write_text("[]\n")
    assert [beat.rank for beat in read_beats(tmp_path)] == [3]
    assert read_beats(tmp_path / "nothing") == []


def test_a_program_that_tells_of_nothing_may_take_its_time(tmp_path: Path) -> None:
    """A loop of one's own after init_distributed, or an hour of preprocessing."""
    ranks = Ranks(tmp_path, 2)
    for rank in (0, 1):
        ranks.say(rank, phase="starting")
    ranks.idle = True
    assert ranks.pass_time(8000, step_s=None) is None


def test_silence_says_nothing_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, 2)
    assert ranks.pass_time(30) is None
    ranks.silent = {0, 1}
    monkeypatch.setattr(HangWatch, "_can_be_written", lambda _self: False)
    assert ranks.pass_time(3000) is None
    monkeypatch.undo()
    assert ranks.pass_time(30) is not None
