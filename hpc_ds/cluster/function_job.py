"""What ``hpc_ds.submit`` returns: a function that runs as a job, seen from where it was submitted.

Results are files, one a rank: they are looked for every second. The scheduler is asked seldom, every 2 s at first and
every 30 s in the end: only it knows of a job that has ended without a result.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Protocol

from hpc_ds.cluster.callables import paths_of, read_result
from hpc_ds.cluster.slurm import Slurm
from hpc_ds.errors import FunctionError, SchedulerError, UnfinishedError

if TYPE_CHECKING:
    from pathlib import Path

_FIRST_LOOK_S, _LOOK_S = 0.1, 1.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S, _GROWTH = 2.0, 30.0, 1.5
_FILES_COME_WITHIN_S = 5.0  # of a job's end, on a file system that several machines see


class Life(Protocol):
    """What the scheduler knows of the job.

    Attributes:
        near: it costs nothing to ask, and nobody else ends the job where a rank has raised.
    """

    near: bool

    def state(self) -> tuple[str, bool]:
        """Its state in Slurm's words, and whether something will still become of it."""

    def cancel(self) -> None:
        """End it for good."""


class OnSlurm:
    """Of a job of Slurm's."""

    near = False

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id

    def state(self) -> tuple[str, bool]:
        """Its state; of a job that slurmctld has forgotten what sacct says, if anything."""
        try:
            job = Slurm().show(self._job_id)
        except SchedulerError:
            return "UNKNOWN", True
        if job is not None:
            return job.state, job.active
        accounts = Slurm().accounts([self._job_id])
        return (accounts[-1].state if accounts else "UNKNOWN"), False

    def cancel(self) -> None:
        """End it for good."""
        Slurm().cancel(self._job_id)


class OnThisMachine:
    """Of processes that submitit watches."""

    near = True

    def __init__(self, job: Any) -> None:
        self._job = job

    def state(self) -> tuple[str, bool]:
        """Whether they are there."""
        state = str(self._job.state)
        return {"FINISHED": "COMPLETED", "INTERRUPTED": "CANCELLED"}.get(state, state), state == "RUNNING"

    def cancel(self) -> None:
        """End them."""
        self._job.cancel()


class FunctionJob:
    """A function that runs as a job.

    Attributes:
        name: of the function.
        folder: with its script, its environment, its pickles and logs.
        job_id: the scheduler's.
        ranks: how many processes call it.
        warnings: what was worth a look when it was submitted.
    """

    def __init__(self, name: str, folder: Path, job_id: str, ranks: int, life: Life) -> None:
        self.name = name
        self.folder = folder
        self.job_id = job_id
        self.ranks = ranks
        self.warnings: list[str] = []
        self._life = life
        self._over = False
        self._ended_as = ""
        self._ended_at: float | None = None
        self._ask_at = time.monotonic() + _SHORTEST_PAUSE_S
        self._pause_s = _SHORTEST_PAUSE_S

    def __repr__(self) -> str:
        return f"FunctionJob({self.name!r}, job_id={self.job_id!r}, folder={str(self.folder)!r})"

    @property
    def state(self) -> str:
        """What the scheduler says: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED ..."""
        return self._ended_as or self._life.state()[0]

    def done(self) -> bool:
        """Whether every rank has returned, one has raised, or the job has ended without that."""
        if not self._over:
            self._over = self._is_over_here() if self._life.near else self._has_results() or self._has_ended()
        return self._over

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until it is done.

        Raises:
            UnfinishedError: it is not, in so many seconds.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = _FIRST_LOOK_S
        while not self.done():
            if end is not None and time.monotonic() >= end:
                raise UnfinishedError(f"{self._me()}: {self.state} after {timeout_s:g} s; wait longer")
            time.sleep(pause_s if end is None else max(0.0, min(pause_s, end - time.monotonic())))
            pause_s = min(pause_s * _GROWTH, _LOOK_S)

    def result(self, timeout_s: float | None = None) -> Any:
        """What rank 0 returned, once every rank has.

        Raises:
            FunctionError: a rank raised, or left no result; the traceback is in the message.
            UnfinishedError: it is not done in so many seconds.
        """
        return self.results(timeout_s)[0]

    def results(self, timeout_s: float | None = None) -> list[Any]:
        """What each rank returned.

        Raises:
            FunctionError, UnfinishedError: see ``result``.
        """
        self.wait(timeout_s)
        found = self._found()
        for rank, (outcome, value) in found.items():
            if outcome == "error":
                raise self._as_error(rank, str(value))
        for rank in range(self.ranks):
            if rank not in found:
                raise self._nothing_of(rank)
        return [found[rank][1] for rank in range(self.ranks)]

    def exception(self, timeout_s: float | None = None) -> FunctionError | None:
        """Why there is no result, once it is done; None where there is one.

        Raises:
            UnfinishedError: it is not done in so many seconds.
        """
        try:
            self.results(timeout_s)
        except FunctionError as error:
            return error
        return None

    def cancel(self) -> None:
        """End the job for good.

        Raises:
            SchedulerError: the scheduler could not be told.
        """
        self._life.cancel()
        self._ask_at, self._pause_s = time.monotonic(), _SHORTEST_PAUSE_S

    def stdout(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return _text_of(paths_of(self.folder, self.job_id, rank).stdout)

    def stderr(self, rank: int = 0) -> str:
        """What a rank has written to its stderr so far."""
        return _text_of(paths_of(self.folder, self.job_id, rank).stderr)

    def _me(self) -> str:
        return f"function {self.name!r}, job {self.job_id}"

    def _found(self) -> dict[int, tuple[str, Any]]:
        """The results that are there, by rank."""
        paths = {rank: paths_of(self.folder, self.job_id, rank).result_pickle for rank in range(self.ranks)}
        return {rank: read_result(path) for rank, path in paths.items() if path.exists()}

    def _is_over_here(self) -> bool:
        if not self._life.state()[1]:
            return True
        if not self._ended_at and self._has_raised():
            self._ended_at = time.monotonic()
            self._life.cancel()
        return False

    def _has_raised(self) -> bool:
        return any(outcome == "error" for outcome, _ in self._found().values())

    def _has_results(self) -> bool:
        with contextlib.suppress(OSError):  # makes a network file system look again
            self.folder.chmod(self.folder.stat().st_mode)
        paths = [paths_of(self.folder, self.job_id, rank).result_pickle for rank in range(self.ranks)]
        there = [path.exists() for path in paths]
        return all(there) or (any(there) and self._has_raised())

    def _has_ended(self) -> bool:
        """Whether the job is over, for so long that no result of it is on its way any more."""
        now = time.monotonic()
        if self._ended_at is None and now >= self._ask_at:
            state, active = self._life.state()
            if not active:
                self._ended_as, self._ended_at = state, now
            self._pause_s = min(self._pause_s * _GROWTH, _LONGEST_PAUSE_S)
            self._ask_at = now + self._pause_s
        return self._ended_at is not None and now - self._ended_at >= _FILES_COME_WITHIN_S

    def _as_error(self, rank: int, trace: str) -> FunctionError:
        words = in_words(trace)
        return FunctionError(
            f"{self._me()}, rank {rank}: {words}; its traceback follows\n{trace.rstrip()}",
            job_id=self.job_id,
            rank=rank,
            trace=trace,
        )

    def _nothing_of(self, rank: int) -> FunctionError:
        lines = self.stderr(rank).splitlines() or self.stdout(rank).splitlines() or ["nothing"]
        state = self.state
        return FunctionError(
            f"{self._me()}, rank {rank}: ended as {state} without a result, its last words: {lines[-1].strip()}; "
            f"see its logs in {str(self.folder)!r}",
            job_id=self.job_id,
            rank=rank,
        )


def in_words(trace: str) -> str:
    """The last sentence of a traceback."""
    lines = trace.rstrip().splitlines() or ["it raised"]
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] + 1 :] if frames else lines
    said = next((line for line in after if line and not line.startswith(" ")), lines[-1])
    _, not_again, why = said.partition("Job not requeued because: ")
    return f"stopped, and not queued again: {why.rstrip('.')}" if not_again else said.removeprefix("hpc_ds.errors.")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not yet
        return ""
