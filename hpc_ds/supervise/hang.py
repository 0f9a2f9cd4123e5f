"""Whether the ranks of an attempt still move, from the signs of life that each of them gives.

Two rules, because there are two ways to stand still:

- Every rank stands: its main thread is at one and the same instruction, or it gives no sign of life at all. That is a
  hang after ten times the longest step, at least a minute. Before the second step, and while any rank saves, loads or
  ends, it is one after ``hang_minutes``.
- Something moves, but the engine does nothing: a data loader that asks for ever, an evaluation that never ends. That is
  a hang after ``hang_minutes``, once there is an engine or the program has told of a step.

Silence is judged by the supervisor's own clock, from a number that goes up with each sign of life; clocks of machines
are never compared. Where nothing can be written to the folder of the signs, silence says nothing. A pause of the
supervisor itself (a suspended job, a frozen machine) starts every count anew.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_STEPS = 10
_SHORTEST_S = 60.0
_PAUSED_S = 30.0
_BEAT_BYTES = 512
_QUIET_S = 4.0
_TAKE_THEIR_TIME = {"starting", "loading", "saving", "stopping", "finished"}


@dataclass(frozen=True, slots=True)
class Beat:
    """The last sign of life of a rank.

    Attributes:
        count: goes up with each.
        step: optimizer steps done; None before there is an engine.
        phase: what the engine does.
        idle_s: seconds since the engine last did something.
        still_s: seconds since the main thread was last seen at another instruction.
        told: what told it to stop; None while nothing has.
        where: file, line and function in which its main thread is.
    """

    rank: int
    host: str = ""
    pid: int = 0
    count: int = 0
    step: int | None = None
    phase: str = ""
    idle_s: float = 0.0
    still_s: float = 0.0
    told: str | None = None
    where: str = ""


def read_beat(path: Path) -> Beat | None:
    """The sign of life in a file; None where there is none, or it is just being written."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_BEAT_BYTES).partition(b"\n")[0])
        known = {name: data[name] for name in Beat.__dataclass_fields__ if name in data}
        return Beat(**known)
    except (OSError, ValueError, TypeError):
        return None


def read_beats(folder: Path) -> list[Beat]:
    """The signs of life of all ranks that have given one, by rank."""
    beats: list[Beat] = []
    with contextlib.suppress(OSError):
        beats = [beat for path in folder.iterdir() if (beat := read_beat(path)) is not None]
    return sorted(beats, key=lambda beat: beat.rank)


@dataclass(frozen=True, slots=True)
class Hang:
    """A run that stands still.

    Attributes:
        detail: one sentence: for how long, who, and where the others wait.
        rank, host: of the one that the others wait for; None and empty where that is not clear.
    """

    detail: str
    rank: int | None = None
    host: str = ""


class HangWatch:
    """Looks at the signs of life of one attempt now and then."""

    def __init__(
        self, beats: Path, world_size: int, bound_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._beats = beats
        self._world_size = world_size
        self._bound_s = bound_s
        self._clock = clock
        self._since = self._looked_at = clock()
        self._moved: dict[int, tuple[int, float]] = {}  # rank -> count, and when that was first seen

    def look(self, step_s: float | None) -> Hang | None:
        """Whether the run hangs.

        Args:
            step_s: the longest of the recent steps; None before the second one.
        """
        now = self._clock()
        if now - self._looked_at > _PAUSED_S:
            self._since = now
            self._moved.clear()
        beats = read_beats(self._beats) if self._bound_s is not None else []
        self._looked_at = self._clock()  # reading takes time too, where the file server is slow
        if self._bound_s is None or not beats:
            return None  # not asked for, or a program that does not know us
        silent = self._silence(beats, now)
        awake = now - self._since
        stands_s = min(min(beat.still_s, awake) + silent[beat.rank] for beat in beats)
        idle_s = min(min(beat.idle_s, awake) + silent[beat.rank] for beat in beats)
        learned_s = self._bound_s
        if step_s is not None and not any(beat.phase in _TAKE_THEIR_TIME for beat in beats):
            learned_s = min(max(_STEPS * step_s, _SHORTEST_S), self._bound_s)
        trains = any(beat.step is not None or beat.phase != "starting" for beat in beats)  # it tells of what it does
        what = ""
        if stands_s > learned_s:
            what = f"every rank has stood still for {stands_s:.0f} s"
        elif trains and idle_s > self._bound_s:
            what = f"nothing has been trained for {idle_s:.0f} s"
        return self._hang(what, beats, silent) if what and self._can_be_written() else None

    def _can_be_written(self) -> bool:
        """Whether ranks could give signs of life: not on a full disk, nor on a file server that is away."""
        try:
            probe = self._beats / ".probe"
            probe.write_bytes(b" " * _BEAT_BYTES)
            probe.unlink()
        except OSError:
            return False
        return True

    def _silence(self, beats: list[Beat], now: float) -> dict[int, float]:
        for beat in beats:
            if self._moved.get(beat.rank, (-1, now))[0] != beat.count:
                self._moved[beat.rank] = beat.count, now
        return {beat.rank: now - self._moved[beat.rank][1] for beat in beats}

    def _hang(self, what: str, beats: list[Beat], silent: dict[int, float]) -> Hang:
        bound = max(min(silent.values()) + _QUIET_S, max(silent.values()) / 2)
        quiet = [beat for beat in beats if silent[beat.rank] >= bound]
        waiting = [beat for beat in beats if beat not in quiet]
        absent = sorted(set(range(self._world_size)) - {beat.rank for beat in beats})
        words = [what]
        if absent:
            words.append(f"rank {absent[0]} never came")
        if quiet and waiting:
            words.append(f"rank {quiet[0].rank} on {quiet[0].host} gives no sign of life")
        places = Counter(beat.where for beat in waiting or beats)
        place, count = places.most_common(1)[0]
        words.append(f"{count} of {self._world_size} ranks are in {place or 'an unknown place'}")
        culprit = quiet[0] if quiet and waiting else None
        if culprit is None and not absent:
            odd = [beat for beat in beats if beat.where != place]
            if len(odd) == 1 and len(beats) > 2:
                culprit = odd[0]
                words.append(f"rank {culprit.rank} on {culprit.host} is in {culprit.where}")
        return Hang("; ".join(words), *((culprit.rank, culprit.host) if culprit is not None else (None, "")))
