"""Which rank failed first, and what it said: of many dying ranks one is the cause and the others are its victims.

What the launcher reports first is not what failed first: a rank that raises takes a second to end, and its neighbours,
whose connections broke, may be gone before it. So two sources are read together: the ends that the launcher reported,
and what each rank wrote when its exception reached the top (``failures/rank-R.json``).
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.launch.runner import rank_log
from hpc_ds.run_dir import read_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LAST_WORDS = 20
# What a rank says that has lost another: a victim, unless nobody says anything else.
_VICTIM = re.compile(
    r"closed by peer|connection reset|connection closed|broken pipe|gloo|nccl|processgroup|timed out|timeout|"
    r"did not call it within|recvvalue|sendbytes|store|remote process exited",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"memoryerror|out of memory|cannot allocate memory|oom[-_ ]kill|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """A rank that ended badly, as the launcher saw it, before anybody ended it on purpose.

    Attributes:
        exit_code: 128 + n for signal n.
        at: seconds since the epoch at which that was seen.
    """

    rank: int
    host: str
    exit_code: int
    at: float


@dataclass(frozen=True, slots=True)
class Failure:
    """The rank that failed first.

    Attributes:
        rank: its number; None where the launcher itself failed.
        exit_code: 128 + n for signal n.
        how: the manner in words, such as ``killed by SIGKILL (out of memory?)``.
        last_lines: the end of its log.
        traceback: the exception that ended it; empty where it ended otherwise.
    """

    rank: int | None
    host: str
    exit_code: int
    how: str
    last_lines: list[str]
    traceback: list[str] = field(default_factory=list)

    def in_a_sentence(self) -> str:
        """Who failed, how, and the last thing it said."""
        if self.rank is None:
            return self.how
        said = self.traceback or [line.removeprefix(f"[rank{self.rank}]: ") for line in self.last_lines]
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        where = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{where}: {self.how}" + (f", {last[:200]}" if last else "")


@dataclass(frozen=True, slots=True)
class _Raised:
    rank: int
    host: str
    at: float
    message: str
    traceback: list[str]

    @property
    def victim(self) -> bool:
        return _VICTIM.search(self.message) is not None


def first_failure(ends: Sequence[TaskEnd], raised: Path, logs: Path) -> Failure | None:
    """The rank that failed first; None where none did.

    A rank that was killed comes before those that raised after that; an exception that tells of a lost neighbour comes
    last; of several alike the earliest counts.

    Args:
        ends: bad ends, in the order in which they were seen.
        raised: the folder in which ranks wrote what they raised.
        logs: the folder with the logs of the ranks.
    """
    told = _read(raised)
    killed = next((end for end in ends if end.exit_code > 128 and end.exit_code != 128 + signal.SIGABRT), None)
    causes = [one for one in told if not one.victim and (killed is None or one.at < killed.at)]
    exit_codes = {end.rank: end.exit_code for end in ends}
    first = causes[0] if causes else None
    if first is None and killed is None and told:
        first = told[0]
    if first is not None:
        return _failure(first.rank, first.host, exit_codes.get(first.rank, 1), first, logs)
    end = killed or next(iter(ends), None)
    if end is None:
        return None
    own = next((one for one in told if one.rank == end.rank), None)
    return _failure(end.rank, end.host, end.exit_code, own, logs)


def only_victims(ends: Sequence[TaskEnd], raised: Path) -> bool:
    """Whether all that failed so far has failed because it lost another rank."""
    victims = {one.rank for one in _read(raised) if one.victim}
    return all(end.rank in victims or end.exit_code == 128 + signal.SIGABRT for end in ends)


def _failure(rank: int, host: str, exit_code: int, raised: _Raised | None, logs: Path) -> Failure:
    said = last_lines(rank_log(logs, rank))
    traceback = raised.traceback if raised is not None else _traceback_in(said)
    words = [raised.message] if raised is not None else said
    how = in_words(exit_code)
    if exit_code < 128 and any(_NO_MEMORY.search(line) for line in words):
        how += " (out of memory)"
    return Failure(rank, host, exit_code, how, said, traceback)


def _read(folder: Path) -> list[_Raised]:
    """What ranks raised, the earliest first."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        data: dict[str, Any] = read_object(path)
        if isinstance(data.get("rank"), int):
            message = f"{data.get('type', '')}: {data.get('message', '')}"
            lines = [str(line) for line in data.get("traceback", [])]
            found.append(_Raised(data["rank"], str(data.get("host", "")), float(data.get("time", 0.0)), message, lines))
    return sorted(found, key=lambda one: one.at)


def _traceback_in(lines: list[str]) -> list[str]:
    """The last traceback among lines of a log; empty where there is none."""
    starts = [place for place, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return lines[starts[-1] :] if starts else []


def in_words(exit_code: int) -> str:
    """An exit code as a person reads it; 128 + n is signal n."""
    if exit_code <= 128 or exit_code - 128 not in {int(number) for number in signal.Signals}:
        return f"exit code {exit_code}"
    hint = " (out of memory?)" if exit_code == 128 + signal.SIGKILL else ""
    return f"killed by {signal.Signals(exit_code - 128).name}{hint}"


def last_lines(log: Path) -> list[str]:
    """The end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - 16384, 0))
            return file.read().decode(errors="replace").splitlines()[-LAST_WORDS:]
    except OSError:
        return []
