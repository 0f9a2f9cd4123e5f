"""A program that starts agents: ssh, mpirun, srun, the agent itself; and the last it said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.errors import LaunchError
from hpc_ds.launch import start_agent
from hpc_ds.launch.failure import in_words

if TYPE_CHECKING:
    import re
    from collections.abc import Collection, Mapping, Sequence

PATIENCE_S = 60.0
"""How long a program may take to bring the first of its agents, and then each next."""

_LAST_LINES = 20
_LAST_BYTES = 1 << 14


def agent_command() -> list[str]:
    """The command that starts an agent, here or on a host with the same file system."""
    return [sys.executable, "-I", "-S", str(Path(start_agent.__file__).resolve())]


class Program:
    """One running program. It is in a session of its own, so that a terminal does not signal it, and dies with us.

    Attributes:
        what: as messages call it: ``ssh worker-1``.
        nodes: which hosts of the plan it brings, by their node rank; None: all.
        words: where what it says can be read, until it ends.
        spoken: the last that it said.
        missing: how many of its agents have not come.
        expected_by: when they must have come.
        ended_at: when it was seen to have ended.
        seen: its end has been dealt with.
        cure: what a person may try where it fails.
        alarm: a line that says that an agent will not come, though the program itself goes on.
    """

    def __init__(
        self,
        argv: Sequence[str],
        what: str,
        nodes: Collection[int] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        channel: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start a program.

        Args:
            argv: its command.
            what: as messages call it.
            nodes: which hosts it brings.
            env: its whole environment; None: ours.
            channel: its standard input and output; None: no input, and its output is words.
            pass_fds: more descriptors of ours that it needs.

        Raises:
            LaunchError: there is no such program.
        """
        self.what, self.nodes = what, nodes
        self.alarm: re.Pattern[str] | None = None
        self.spoken = self._unsaid = b""
        self.expected_by = time.monotonic() + PATIENCE_S
        self.missing = 0
        self.seen = False
        self.cure = "see what it says"
        self.ended_at: float | None = None
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.words = reader
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL if channel is None else channel,
                stdout=writer if channel is None else channel,
                stderr=writer,
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,
                preexec_fn=process.child_setup(die_with_parent=signal.SIGKILL),  # noqa: PLW1509 - see there
            )
        except OSError as error:
            os.close(reader)
            raise LaunchError(
                f"{what}: {argv[0]!r}: {error.strerror}; install it, or choose another launcher"
            ) from None
        finally:
            os.close(writer)

    @property
    def silent(self) -> bool:
        """Whether it can say nothing more."""
        return self.words < 0

    def read(self) -> bool:
        """Hear what it says; whether it may say more."""
        try:
            said = os.read(self.words, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            said = b""
        self.hear(said)
        return bool(said)

    def hear(self, said: bytes) -> None:
        """Keep the last of what it says."""
        self.spoken = (self.spoken + said)[-_LAST_BYTES:]
        self._unsaid = (self._unsaid + said)[-_LAST_BYTES:]

    def new_lines(self) -> list[str]:
        """The lines that were not asked for before."""
        whole, _, self._unsaid = self._unsaid.rpartition(b"\n")
        return [line for line in whole.decode(errors="replace").splitlines() if line.strip()]

    def alarmed(self) -> bool:
        """Whether it has said that an agent will not come."""
        return self.alarm is not None and any(self.alarm.search(line) for line in self.new_lines())

    def waited(self) -> None:
        """One of its agents has come: wait as long for the next."""
        self.expected_by = time.monotonic() + PATIENCE_S

    def hush(self) -> None:
        """Read no more of its words."""
        if self.words >= 0:
            os.close(self.words)
            self.words = -1

    def poll(self) -> bool:
        """Whether it has ended."""
        pid = self._process.pid
        if self.ended_at is None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what it has left behind; before it is reaped, the number is its own
            self._process.wait()
            self.ended_at = time.monotonic()
        return self.ended_at is not None

    def stop(self, number: signal.Signals) -> None:
        """Send it, and what it has in its process group, a signal."""
        if not self.poll():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def how(self) -> str:
        """How it ended: ``ssh worker-1: exit code 255: Permission denied``."""
        code = self._process.returncode
        ended = "still runs" if code is None else in_words(128 - code if code < 0 else code)
        lines = [line.strip() for line in self.spoken.decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if self.alarm is not None and self.alarm.search(line)]
        lines = list(dict.fromkeys(telling)) or lines  # what an MPI says around them is long, and says less
        return f"{self.what}: {ended}: {' / '.join(lines[-_LAST_LINES:]) or 'it said nothing'}"
