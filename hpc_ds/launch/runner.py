"""What the supervisor asks of whatever starts the ranks."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

CHECKPOINTED = 75
"""Exit code of a rank that saved because it was asked to: start me again (EX_TEMPFAIL of sysexits.h)."""

LAST_WORDS = 20


@dataclass(frozen=True, slots=True)
class Failure:
    """The rank that failed first.

    Attributes:
        rank: its number; None where the launcher itself failed.
        exit_code: 128 + n for signal n.
        how: the manner in words, such as ``killed by SIGKILL (out of memory?)``.
        last_lines: the end of its log.
    """

    rank: int | None
    host: str
    exit_code: int
    how: str
    last_lines: list[str]


class Runner(Protocol):
    """Ranks that are started together and end together.

    Attributes:
        failure: the rank that failed first, if one did.
        due_to: why the scheduler ended them, in its words, where it said so: ``PREEMPTION``, ``NODE FAILURE`` ...
    """

    failure: Failure | None
    due_to: str | None

    def start(self) -> None:
        """Start all ranks."""

    def poll(self) -> int | None:
        """The exit code of all ranks together, once all have ended: 0, 75, or that of the first failure."""

    def terminate(self) -> None:
        """End all ranks now."""


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


def rank_log(folder: Path, rank: int) -> Path:
    """The log of one rank in the log folder of an attempt."""
    return folder / f"rank-{rank}.log"
