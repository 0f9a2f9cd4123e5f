"""What the ranks of a run wrote, as it is or as it comes."""

from __future__ import annotations

import codecs
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.cluster.queue import Queue
from hpc_ds.errors import RunError
from hpc_ds.launch.runner import rank_log
from hpc_ds.report.status import status_of
from hpc_ds.supervise.ledger import read_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hpc_ds.run_dir import RunDir

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which logs.

    Attributes:
        rank: whose; None: of all ranks.
        attempt: which; None: the last, and with ``follow`` those after it.
        follow: go on until the run is over.
        lines: hand out whole lines, each by itself, for those who put something before them.
    """

    rank: int | None = 0
    attempt: int | None = None
    follow: bool = False
    lines: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """Some text of one rank (None: the scheduler) in one attempt (None: all of them)."""

    attempt: int | None
    rank: int | None
    text: str


def read_logs(run: RunDir, wanted: Wanted, queue: Queue | None = None) -> Iterator[Said]:
    """The text of logs.

    Raises:
        RunError: there is no such log; those that there are are named.
    """
    queue = queue or Queue()
    number = wanted.attempt or max(len(read_ledger(run)), 1)
    readers: dict[int, _Reader] = {}
    while True:
        # Looked at before the logs are read: what was written until the end is then seen.
        later = len(read_ledger(run)) > number and wanted.attempt is None
        over = later or not wanted.follow or status_of(run, queue).over
        ranks = _ranks(run.attempt_logs(number)) if wanted.rank is None else [wanted.rank]
        for rank in ranks:
            readers.setdefault(rank, _Reader(rank_log(run.attempt_logs(number), rank), lines=wanted.lines))
        if not wanted.follow and not any(reader.path.exists() for reader in readers.values()):
            raise _no_log(run, wanted.rank, number)
        for rank, reader in readers.items():
            for text in reader.new(last=over):
                yield Said(number, rank, text)
        if later:
            number, readers = number + 1, {}
            queue.expect_news()
        elif over:
            return
        else:
            time.sleep(_LOOK_EVERY_S)


def read_scheduler_log(run: RunDir, wanted: Wanted, queue: Queue | None = None) -> Iterator[Said]:
    """What the job script and the supervisor wrote, over all attempts.

    Raises:
        RunError: nothing was written yet.
    """
    queue, reader = queue or Queue(), _Reader(run.scheduler_log, lines=wanted.lines)
    if not wanted.follow and not reader.path.exists():
        raise RunError(f"log {str(reader.path)!r}: no such file yet; the job has not started, look at `hpcds status`")
    while True:
        over = not wanted.follow or status_of(run, queue).over
        for text in reader.new(last=over):
            yield Said(None, None, text)
        if over:
            return
        time.sleep(_LOOK_EVERY_S)


class _Reader:
    """The text that came to a log since the last look."""

    def __init__(self, path: Path, *, lines: bool) -> None:
        self.path = path
        self._lines = lines
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""

    def new(self, *, last: bool) -> list[str]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                fresh = file.read()
        except OSError:
            fresh = b""
        self._offset += len(fresh)
        text = self._rest + self._decoder.decode(fresh, final=last)
        self._rest = ""
        if not self._lines:
            return [text] if text else []
        *lines, rest = text.split("\n")
        if last and rest:
            lines.append(rest)
        else:
            self._rest = rest
        return lines


def _ranks(folder: Path) -> list[int]:
    found = [re.fullmatch(r"rank-(\d+)\.log", path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def _no_log(run: RunDir, rank: int | None, attempt: int) -> RunError:
    who = "any rank" if rank is None else f"rank {rank}"
    numbers = [one.number for one in read_ledger(run)]
    ranks = _ranks(run.attempt_logs(attempt))
    if ranks:
        there = (
            f"there are those of ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"there is rank {ranks[0]}'s"
        )
    elif numbers and attempt not in numbers:
        there = f"there are attempts 1 to {numbers[-1]}" if len(numbers) > 1 else "there is attempt 1"
    elif numbers:
        there = "no rank has written anything; look at --scheduler"
    else:
        there = "no attempt has begun; look at `hpcds status`"
    return RunError(f"log of {who} in attempt {attempt} of run {str(run.root)!r}: not there; {there}")
