"""Launches for tests: a real launcher in a process of its own, which carries out one plan, and what is left of it.

Run as a program it is that launcher: what it conducts stands as JSON in its first argument.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import LaunchError
from hpc_ds.launch.channel import NODE
from hpc_ds.launch.conduct import conduct
from hpc_ds.launch.plan import HostPlan, LaunchPlan
from hpc_ds.launch.program import Program, agent_command
from hpc_ds.launch.starters import starter_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from typing_extensions import Self

    from hpc_ds.launch.reception import Reception

REPOSITORY = Path(__file__).resolve().parent.parent
MARK = "LAUNCH_OF_TEST"
LIMIT_S = 120.0

# What a rank written in Python begins with.
PRELUDE = """
import os, signal, sys, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def note(word):
    with open(f"notes-{rank}", "a") as file:
        file.write(f"{word}\\n")
def catch(*names, call=lambda: None):
    for name in names:
        signal.signal(signal.Signals["SIG" + name], lambda *_, name=name: (note(name), call()))
def meet():
    note("here")
    while not all(os.path.exists(f"notes-{other}") for other in range(size)):
        time.sleep(0.01)
"""


def python(text: str) -> list[str]:
    """The command of a rank that is a little Python."""
    return [sys.executable, "-S", "-c", PRELUDE + text]


def wait_until(true: Callable[[], object]) -> None:
    """Wait for something that must come true; how long it takes says nothing."""
    until = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)


class Launch:
    """One launcher; a ``with`` block at whose end nothing of it may be left.

    Attributes:
        folder: the working folder of its ranks.
        marks: values of a variable that its processes have.
        code, out, err: once ``finish`` has returned.
    """

    def __init__(self, folder: Path, command: Sequence[str], ranks: Sequence[int] = (2,), **fields: Any) -> None:
        """Start it.

        Args:
            folder: the working folder of ranks.
            command: what every rank runs.
            ranks: how many ranks each host has.
            fields: more of the plan; ``names`` of the hosts, ``starter`` of this file, ``stdout`` and ``python`` of the launcher.
        """
        self.folder = folder
        mark = uuid.uuid4().hex
        self.marks = [mark]
        stdout = fields.pop("stdout", subprocess.PIPE)
        environ = {**os.environ, MARK: mark, **fields.pop("environ", {})}
        plan = {"command": list(command), "ranks": list(ranks), "cwd": str(folder), "grace_s": 60.0, **fields}
        plan["env"] = {**plan.get("env", {}), MARK: mark}
        self.process = subprocess.Popen(
            [fields.pop("python", sys.executable), __file__, json.dumps(plan)],
            env={**environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        self.code: int | None = None
        self.out, self.err = b"", ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait()
        try:
            wait_until(lambda: not self.left())
        finally:
            for pid in self.left():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        """The processes that belong to it, whoever their parents are."""
        marks = [f"{MARK}={mark}".encode() for mark in self.marks]
        return [pid for pid in _processes() if any(mark in _environ_of(pid) for mark in marks)]

    def agents(self) -> list[int]:
        """The agents proper: those whose parent is an agent's guardian."""
        both = self.guardians_and_agents()
        return [pid for pid in both if _parent_of(pid) in both]

    def guardians_and_agents(self) -> list[int]:
        """The processes that run the agent's program."""
        return [pid for pid in self.left() if any(word.endswith(b"/start_agent.py") for word in _command_of(pid))]

    def finish(self) -> Launch:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        self.code, self.out, self.err = self.process.returncode, out or b"", err.decode(errors="replace")
        return self

    @property
    def last_line(self) -> str:
        """The last that it said."""
        return (self.err.splitlines() or [""])[-1]

    def notes(self, rank: int) -> list[str]:
        """What a rank has noted."""
        try:
            return (self.folder / f"notes-{rank}").read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return []

    def wait_for(self, word: str, ranks: int = 2) -> None:
        """Wait until each rank has noted a word."""
        wait_until(lambda: all(word in self.notes(rank) for rank in range(ranks)))


def launched(folder: Path, command: Sequence[str], ranks: Sequence[int] = (2,), **fields: Any) -> Launch:
    """A launch that has ended, and has left nothing."""
    with Launch(folder, command, ranks, **fields) as launch:
        launch.finish()
        # Whoever has the exit code may count on it: not even for a moment is anything left.
        assert launch.left() == []
    return launch


def _processes() -> Iterator[int]:
    return (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())


def _environ_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()  # empty where it is a zombie
    except OSError:
        return b""


def _command_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent_of(pid: int) -> int:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except OSError:
        return 0


class TcpStarter:
    """Agents that come to the launcher's port: one a host, or one a rank as MPI starts them."""

    def __init__(self, environs: Mapping[str, str], *, per_rank: bool) -> None:
        self._more = dict(environs)
        self.per_rank = per_rank

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        environ = {**os.environ, **reception.variables}
        if self.per_rank:
            each = f'PMI_RANK=${{PMI_RANK:-$rank}} {shlex.join(agent_command())} & pids="$pids $!"'
            script = f"for rank in $(seq 0 {plan.world_size - 1}); do {each}; done; for pid in $pids; do wait $pid || exit; done"
            yield Program(["sh", "-c", script], "agents", env={**environ, **self._more})
            return
        for host in plan.hosts:
            own = {NODE: str(host.node_rank)}
            name = f"agent of {host.name}"
            yield Program(agent_command(), name, [host.node_rank], env={**environ, **own, **self._more})


class ProgramStarter:
    """One program that is to bring all agents, and does not."""

    per_rank = False

    def __init__(self, command: Sequence[str], patience_s: float) -> None:
        self._command, self._patience_s = command, patience_s

    def start(self, _plan: LaunchPlan, _reception: Reception) -> Iterator[Program]:
        program = Program(self._command, "starter")
        program.expected_by = time.monotonic() + self._patience_s
        yield program


class SocketStarter:
    """A program whose standard input and output are a channel."""

    per_rank = False

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    def start(self, _plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        ours, theirs = socket.socketpair()
        reception.attach(ours, 0)
        with theirs:
            yield Program(self._command, "starter", channel=theirs.fileno())


def _plan_of(told: dict[str, Any]) -> LaunchPlan:
    ranks = told.pop("ranks")
    names = told.pop("names", ["localhost"] * len(ranks))
    hosts = tuple(HostPlan(name, sum(ranks[:node]), None, ranks[node], node) for node, name in enumerate(names))
    told["command"] = tuple(told["command"])
    told["launcher_args"] = tuple(told.get("launcher_args", ()))
    return LaunchPlan(hosts=hosts, **told)


def main() -> int:
    """Carry out the plan of the first argument."""
    told = json.loads(sys.argv[1])
    kind = told.pop("starter", None)
    options = told.pop("options", {})
    if "python" in told:  # which is gone when agents are to start by it
        Path(told.pop("python")).unlink()
    plan = _plan_of(told)
    starters = {"tcp": TcpStarter, "program": ProgramStarter, "socket": SocketStarter}
    starter = starters[kind](**options) if kind else starter_for(plan)
    try:
        return conduct(plan, starter)
    except LaunchError as error:
        print(f"hpcds: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    threading.current_thread().name = "launcher"
    sys.exit(main())
