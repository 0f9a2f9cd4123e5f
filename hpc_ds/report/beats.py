"""Ranks that give no sign of life, or do not move: named from the beats that each rank writes.

A beat is ``logs/attempt-N/beats/rank-R.json``, one line that a thread of the rank writes again and again. A rank is
*silent* when its file gets older than those of its fellows: both times are the file system's, so no clocks of machines
are compared. Only where all are old this machine's clock has to say it; whoever watches for a while judges by the count
in the beat and by its own clock. A rank is *still* when it writes that its main thread has not moved: by its own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hpc_ds.run_dir import RunDir

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
    beats = [read for path in _files(run.beats(attempt)) if (read := _read(path)) is not None]
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
            silent_s = max(silent_s, pulse.quiet_s(beat["rank"], beat["count"], now))
        still_s = _number(beat, "still_s")
        if beat.get("phase") in _OVER:
            continue
        if silent_s > silent_from_s:
            found.append(_quiet(beat, "silent", silent_s))
        elif still_s > still_from_s:
            found.append(_quiet(beat, "still", still_s))
    return sorted(found, key=lambda one: (-one["seconds"], one["rank"]))


def _quiet(beat: Mapping[str, Any], how: str, seconds: float) -> dict[str, Any]:
    told = {key: beat.get(key) for key in ("rank", "host", "step", "phase", "where")}
    return {**told, "how": how, "seconds": round(seconds, 1)}


def _number(beat: Mapping[str, Any], key: str) -> float:
    value = beat.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.startswith("rank-"))
    except OSError:
        return []


def _read(path: Path) -> tuple[float, dict[str, Any]] | None:
    """When a beat was written, and what it says; None of one that is torn or gone."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        written = os.fstat(file.fileno()).st_mtime
        beat = json.loads(file.readline())
        if isinstance(beat, dict) and isinstance(beat.get("rank"), int) and isinstance(beat.get("count"), int):
            return written, beat
    return None
