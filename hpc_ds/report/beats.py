"""Ranks that give no sign of life, or do not move: named from the beats that each rank writes.

A beat is ``logs/attempt-N/beats/rank-R.json``, one line that a thread of the rank writes again and again. A rank is
*silent* when its file gets older than those of its fellows: both times are the file system's, so no clocks of machines
are compared. Only where all are old this machine's clock has to say it; whoever watches for a while judges by the count
in the beat and by its own clock. A rank is *still* when it writes that its main thread has not moved: by its own clock.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.supervise.hang import read_beat

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.hang import Beat

_SHORTEST_PERIOD_S, _LONGEST_PERIOD_S, _RANKS_PER_S = 2.0, 30.0, 50
_SILENT_PERIODS, _SILENT_S, _ALL_SILENT_S = 3, 30.0, 120.0
_STILL_S, _STILL_STEPS = 120.0, 10
_OVER = {"finished"}


@dataclass(slots=True)
class Pulse:
    """What a watcher has seen of the beats of one attempt: rank -> count, and when it saw that first by its own clock."""

    seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def quiet_s(self, rank: int, count: int, now: float) -> float:
        """For how long the count of a rank has been what it is, as far as was watched."""
        before = self.seen.get(rank)
        if before is None or before[0] != count:
            self.seen[rank] = (count, now)
            return 0.0
        return now - before[1]


def quiet_ranks(run: RunDir, attempt: int, step_s: float | None, pulse: Pulse | None = None) -> list[dict[str, Any]]:
    """Ranks of an attempt that are silent or still for long, the longest first.

    Args:
        run: its run.
        attempt: which one.
        step_s: what a step takes; None where that is not known.
        pulse: what was seen before, of whoever looks again and again.
    """
    beats = _read(run.beats(attempt))
    if not beats:
        return []
    period_s = min(max(_SHORTEST_PERIOD_S, len(beats) / _RANKS_PER_S), _LONGEST_PERIOD_S)
    silent_from_s = _SILENT_S + _SILENT_PERIODS * period_s
    still_from_s = max(_STILL_S, _STILL_STEPS * (step_s or 0.0))
    newest, now = max(written for written, _ in beats), time.monotonic()
    all_old_s = time.time() - newest if time.time() - newest > _ALL_SILENT_S + period_s else 0.0
    found = []
    for written, beat in beats:
        silent_s = newest - written + all_old_s
        if pulse is not None:
            silent_s = max(silent_s, pulse.quiet_s(beat.rank, beat.count, now))
        if beat.phase in _OVER:
            continue
        if silent_s > silent_from_s:
            found.append(_quiet(beat, "silent", silent_s))
        elif beat.still_s > still_from_s:
            found.append(_quiet(beat, "still", beat.still_s))
    return sorted(found, key=lambda one: (-one["seconds"], one["rank"]))


def _quiet(beat: Beat, how: str, seconds: float) -> dict[str, Any]:
    told = {key: getattr(beat, key) for key in ("rank", "host", "step", "phase", "where")}
    return {**told, "how": how, "seconds": round(seconds, 1)}


def _read(folder: Path) -> list[tuple[float, Beat]]:
    """When each beat was written, and what it says; without those that are torn."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            beat = read_beat(path)
            if beat is not None:
                found.append((path.stat().st_mtime, beat))
    return found
