"""Ranks as processes of this machine: started, watched, signalled, and ended for certain.

Each is the leader of a session, and dies with the process that started it. What it starts itself stays in its session,
unless it leaves that on purpose; the process that owns a group is to adopt orphans (``cluster/process.py``), so that
those are found too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.cluster import process

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of a launch that are its ranks'."""

TO_GROUP = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that ask to end: all that a rank has in its process group gets them, as from a terminal."""

MERGED: int = subprocess.STDOUT
"""In place of a rank's standard error: where its standard output goes."""


class RankSpec(NamedTuple):
    """How one rank is started.

    Attributes:
        env: its whole environment.
        cwd: its working folder; None: that of the process that starts it.
        cores: those it may use; None: all that its starter may use.
    """

    rank: int
    argv: Sequence[str | bytes]
    env: Mapping[str, str] | Mapping[bytes, bytes]
    cwd: str | bytes | None = None
    cores: frozenset[int] | None = None


class RankEnd(NamedTuple):
    """How a rank ended: 128 + n is signal n."""

    rank: int
    exit_code: int


class RankGroup:
    """The ranks that one process has started."""

    def __init__(self) -> None:
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._living: dict[int, subprocess.Popen[bytes]] = {}
        self._kill_at: float | None = None

    @property
    def pids(self) -> dict[int, int]:
        """Rank -> process, of those that were started, ended or not."""
        return {rank: process.pid for rank, process in self._ranks.items()}

    @property
    def living(self) -> list[int]:
        """The ranks that were not seen to end."""
        return list(self._living)

    def start(self, spec: RankSpec, stdout: int, stderr: int) -> None:
        """Start one rank; its output goes to two open files, or to one with ``MERGED``.

        Raises:
            OSError: there is no such program, or no such folder.
        """
        self._living[spec.rank] = self._ranks[spec.rank] = subprocess.Popen(
            spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=spec.env,
            cwd=spec.cwd,
            close_fds=False,  # those of MPI are the rank's; Python's own do not pass an exec
            start_new_session=True,
            preexec_fn=_child_setup(spec.cores),  # noqa: PLW1509 - see process.child_setup
        )

    def ended(self) -> list[RankEnd]:
        """The ranks that have ended since this was asked last."""
        codes = {rank: running.poll() for rank, running in self._living.items()}
        ends = [RankEnd(rank, 128 - code if code < 0 else code) for rank, code in codes.items() if code is not None]
        for end in ends:
            del self._living[end.rank]
        return ends

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all ranks; one that asks to end goes to all of their groups, and wakes the stopped."""
        for running in self._living.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number in TO_GROUP:
                    os.killpg(running.pid, number)
                    os.killpg(running.pid, signal.SIGCONT)
                else:
                    running.send_signal(number)

    def end(self, number: signal.Signals, grace_s: float) -> None:
        """Ask all ranks to end, and kill those that are still there some time later."""
        self.send(number)
        kill_at = time.monotonic() + grace_s
        self._kill_at = kill_at if self._kill_at is None else min(self._kill_at, kill_at)

    def kill(self) -> None:
        """SIGKILL to all ranks and their groups."""
        for running in self._living.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)

    def look_at_the_clock(self) -> float | None:
        """Kill what was given time and has used it; the seconds until this must be called again, if it must."""
        if self._kill_at is None or not self._living:
            return None
        left_s = self._kill_at - time.monotonic()
        if left_s > 0:
            return left_s
        self.kill()
        self._kill_at = time.monotonic() + 1.0
        return 1.0

    def left(self) -> list[int]:
        """Processes below this one that are still in the sessions of ranks, the ranks among them."""
        sessions = {running.pid for running in self._ranks.values()}
        return [pid for pid in process.descendants(os.getpid()) if _session_of(pid) in sessions]


def _child_setup(cores: frozenset[int] | None) -> Callable[[], None]:
    set_up = process.child_setup(die_with_parent=signal.SIGKILL)

    def set_up_and_bind() -> None:
        set_up()
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return set_up_and_bind


def _session_of(pid: int) -> int | None:
    """The session of a process that lives; None: it does not."""
    if process.start_time(pid) is None:
        return None
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None
