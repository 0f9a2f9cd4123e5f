"""The agent: started on every host, or once for every rank, by ssh, mpirun, srun ...; it starts ranks as it is told.

| the launcher says           | the agent                                                  | and answers           |
|-----------------------------|------------------------------------------------------------|-----------------------|
| (connected)                 |                                                            | hello                 |
| welcome                     | knows that it has found its launcher                       |                       |
| reserve                     | keeps a port for rank 0, finds an address for it           | reserved, or refused  |
| start                       | starts its ranks                                           | refused, if it cannot |
|                             | passes on what they write, and how they end                | output, ended         |
| signal                      | passes it on; one that asks to end arms SIGKILL            |                       |
| kill                        | SIGKILL to all ranks                                       |                       |
| finish                      | ends what ranks have left behind: TERM, five seconds, KILL | done; then it ends    |
| (end of the channel)        | the launcher is dead: as TERM and finish                   |                       |

Signals that an agent itself gets are its ranks'; those of Slurm they have got already.
Each agent has a parent that does nothing but wait for it, and ends all that is left when it has ended, however that was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster import process
from hpc_ds.errors import LaunchError
from hpc_ds.launch.address import named_interfaces, network, own_address, reachable_addresses
from hpc_ds.launch.allocation import is_task
from hpc_ds.launch.channel import LAUNCHER, NODE, TOKEN, Channel, Frame, from_wire
from hpc_ds.launch.cores import Slice, slices
from hpc_ds.launch.guardian import guarded, reap_orphans
from hpc_ds.launch.pump import Pump
from hpc_ds.launch.ranks import MERGED, TO_GROUP, RankGroup, RankSpec
from hpc_ds.launch.reserved_port import ReservedPort
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_MUCH = 1 << 20  # bytes in the queue to the launcher from which ranks must wait
_PATIENCE_S, _LAST_PATIENCE_S = 5.0, 10.0
_LOOK_EVERY_S = 0.05
_CONNECT_S, _WELCOME_S = 5.0, 30.0


_CURES = {
    errno.ENOENT: "see whether it is there, and the program that its first line names",
    errno.EACCES: "make it executable, and its folders readable",
    errno.ENOEXEC: "give it a first line with #!, or let it be started by a program",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class Agent:
    """One agent, from its hello to its end."""

    def __init__(self, channel: Channel, heard: list[Frame], environ: Mapping[str, str]) -> None:
        self._channel = channel
        self._heard = heard
        self._environ = {name: value for name, value in environ.items() if name not in {LAUNCHER, TOKEN, NODE}}
        self._ranks = RankGroup()
        self._pump = Pump(self._output, lambda: channel.queued < _MUCH)
        self._port: ReservedPort | None = None
        self._grace_s = 30.0
        self._finish_at: float | None = None  # when what is left is killed
        self._alone = self._terminated = False  # the launcher is dead; ranks were sent SIGTERM
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._child_ended = self._has_children = self._writing = False
        self._pumped: int | None = None
        self._on: dict[str, Callable[[dict[str, Any], bytes], None]] = {
            "welcome": lambda _head, _body: None,
            "reserve": self._reserve,
            "start": self._start,
            "signal": self._signal,
            "kill": lambda _head, _body: self._ranks.kill(),
            "finish": lambda _head, _body: self._finish(),
        }

    def run(self) -> int:
        """Do as the launcher says until all is done; returns an exit status."""
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)  # noqa: FBT003 - not ours
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._selector.register(woken, selectors.EVENT_READ, lambda: self._signals(woken.recv(4096)))
        self._selector.register(self._channel.reader, selectors.EVENT_READ, self._hear)
        self._obey(self._heard)
        while not self._over or (self._channel.queued and not self._alone):
            self._watch()
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._channel.flush()
            self._look()
        return 0

    def _watch(self) -> None:
        """Watch what matters now: whether the channel can be written to, and the ranks' pipes while there is room."""
        if self._writing != (self._channel.queued > 0):
            self._writing = not self._writing
            if self._writing:
                self._selector.register(self._channel.writer, selectors.EVENT_WRITE, self._channel.flush)
            else:
                self._selector.unregister(self._channel.writer)
        pumped = self._pump.watched if self._channel.queued < _MUCH else None
        if pumped != self._pumped:
            if self._pumped is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(self._pumped)
            if pumped is not None:
                self._selector.register(pumped, selectors.EVENT_READ, self._pump.read)
            self._pumped = pumped

    def _pause(self) -> float | None:
        waits = [self._ranks.look_at_the_clock(), self._pump.look_at_the_clock()]
        if self._finish_at is not None:
            waits.append(_LOOK_EVERY_S)
        return min((wait for wait in waits if wait is not None), default=None)

    def _hear(self) -> None:
        self._obey(self._channel.receive())
        if self._channel.ended and not self._alone:
            self._alone = True
            self._selector.unregister(self._channel.reader)
            if self._writing:
                self._selector.unregister(self._channel.writer)
                self._writing = False
            self._channel.close()
            if not self._terminated:  # by who has killed the launcher
                self._pass_on(signal.SIGTERM)

    def _obey(self, frames: list[Frame]) -> None:
        for head, body in frames:
            try:
                self._on[head["say"]](head, body)
            except LaunchError as error:
                self._channel.send({"say": "refused", "why": str(error)})

    def _reserve(self, head: dict[str, Any], _body: bytes) -> None:
        self._port = ReservedPort(head["port"])
        environ = {**self._environ, **head["env"]}
        answer = {"port": self._port.number, "address": own_address(head["peers"], environ)}
        self._channel.send({"say": "reserved", **answer, "interfaces": named_interfaces(environ)})

    def _start(self, head: dict[str, Any], body: bytes) -> None:
        common = json.loads(body)
        self._grace_s = common["grace_s"]
        left = [told["rank"] for told in head["ranks"]]
        process.allow_files(64 + 2 * len(left))
        try:
            parts = self._parts(head, common)
            for told in head["ranks"]:
                self._start_rank(told, common, parts[told["local_rank"]] if parts else None)
                left.remove(told["rank"])
        except LaunchError as error:
            self._channel.send({"say": "refused", "why": str(error), "ranks": left})
        self._look()

    def _parts(self, head: dict[str, Any], common: dict[str, Any]) -> list[Slice]:
        """The cores of each rank of this host; none where ranks are not bound."""
        if not common["bind_cores"]:
            return []
        if self._environ.get("KMP_AFFINITY") or "KMP_AFFINITY" in common["env"]:
            value = common["env"].get("KMP_AFFINITY") or self._environ["KMP_AFFINITY"]
            raise LaunchError(f"KMP_AFFINITY {value!r}: it binds threads too; unset it, or do not bind ranks to cores")
        return slices(os.sched_getaffinity(0), head["ranks_here"], common["core_list"])

    def _start_rank(self, told: dict[str, Any], common: dict[str, Any], part: Slice | None) -> None:
        env = {os.fsencode(name): os.fsencode(value) for name, value in self._environ.items()}
        env[b"PYTHONUNBUFFERED"] = b"1"
        threads = {} if part is None else {"OMP_NUM_THREADS": str(part.threads)}
        for name, value in {**common["env"], **told["env"], **threads}.items():
            env[from_wire(name)] = from_wire(value)
        spec = RankSpec(
            rank=told["rank"],
            argv=[from_wire(word) for word in told["argv"]],
            env=env,
            cwd=from_wire(common["cwd"]),
            cores=None if part is None else part.cores,
        )
        opened: list[int] = []
        try:
            opened += self._outputs(told["rank"], common)
            self._ranks.start(spec, opened[0], opened[1] if len(opened) > 1 else MERGED)
        except OSError as error:
            what = os.fsdecode(error.filename) if error.filename else os.fsdecode(spec.argv[0])
            cure = _CURES.get(error.errno or 0, "see what it is")
            raise LaunchError(
                f"rank {told['rank']} on {os.uname().nodename}: {what!r}: {error.strerror}; {cure}"
            ) from None
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _outputs(self, rank: int, common: dict[str, Any]) -> list[int]:
        """Where a rank writes to: its log, or two pipes."""
        if common["log_dir"] is None:
            return [self._pump.pipe(rank, 1), self._pump.pipe(rank, 2)]
        folder = Path(os.fsdecode(from_wire(common["cwd"])), os.fsdecode(from_wire(common["log_dir"])))
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{common['stamp']}_rank{rank}.log"
        return [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)]

    def _signal(self, head: dict[str, Any], _body: bytes) -> None:
        self._pass_on(signal.Signals(head["number"]))

    def _pass_on(self, number: signal.Signals) -> None:
        self._terminated |= number == signal.SIGTERM
        if number in TO_GROUP:
            self._ranks.end(number, self._grace_s)
        else:
            self._ranks.send(number)

    def _signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                self._child_ended = True
                continue
            # Slurm signals every process of a step; a rank that is leaving because of it must not be hit again.
            if not is_task(self._environ):
                self._pass_on(signal.Signals(number))
            if number in TO_GROUP and not self._ranks.pids:  # nothing was started: there is nobody to wait for
                self._over = True
                self._alone = True

    def _look(self) -> None:
        """See who has ended, and what is left to do."""
        if self._child_ended or self._finish_at is not None:
            self._child_ended = False
            for end in self._ranks.ended():
                self._channel.send({"say": "ended", "rank": end.rank, "exit_code": end.exit_code})
            self._has_children = reap_orphans(set(self._ranks.pids.values()) if self._ranks.living else set())
        if self._alone and not self._ranks.living:
            self._finish()
        if self._finish_at is not None and not self._over:
            self._sweep()

    def _finish(self) -> None:
        if self._finish_at is None:
            self._finish_at = time.monotonic() + _PATIENCE_S
            process.send(process.descendants(os.getpid()), signal.SIGTERM, signal.SIGCONT)

    def _sweep(self) -> None:
        """End what ranks have left; when that is done, and all that they wrote is passed on, say so."""
        late_s = time.monotonic() - (self._finish_at or 0.0)
        if self._has_children and late_s < _LAST_PATIENCE_S:
            if late_s > 0:
                process.send(process.descendants(os.getpid()), signal.SIGKILL)
            return
        self._pump.read_the_rest()
        if self._pump.empty:
            self._over = True
            self._channel.send({"say": "done"})

    def _output(self, rank: int, stream: int, piece: bytes, *, goes_on: bool) -> None:
        self._channel.send({"say": "output", "rank": rank, "stream": stream, "goes_on": goes_on}, piece)


def hello(environ: Mapping[str, str]) -> dict[str, Any]:
    """What an agent says of itself first."""
    rank = next((environ[name] for name in _RANK_VARIABLES if environ.get(name, "").isdigit()), None)
    node = environ.get(NODE, "")
    return {
        "say": "hello",
        "token": environ.get(TOKEN, ""),
        "host": process.node_name(),
        "network": network(),
        "addresses": reachable_addresses(),
        "pid": os.getpid(),
        "rank": None if rank is None else int(rank),
        "node": int(node) if node.isdigit() else None,
        "python": sys.executable,
        "version": __version__,
    }


def _channel(environ: Mapping[str, str]) -> tuple[Channel, list[Frame]]:
    """The way to the launcher, and what it said already: standard input and output, or a connection to it."""
    if LAUNCHER not in environ:
        reader, writer = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(2, 1)  # what is printed by mistake is no frame
        os.close(nothing)
        channel = Channel(reader, writer, from_agent=False)
        channel.mark()
        channel.send(hello(environ))
        return channel, []
    names, _, port = environ[LAUNCHER].rpartition(":")
    said: list[str] = []
    for name in names.split(","):
        try:
            connection = socket.create_connection((name, int(port)), _CONNECT_S)
        except OSError as error:
            said.append(f"{name}: {error}")
            continue
        welcomed = _welcomed(connection, environ)
        if welcomed is not None:
            return welcomed
        said.append(f"{name}: it is another program that listens there")
    raise LaunchError(f"launcher {environ[LAUNCHER]!r}: not reached from {os.uname().nodename}: {'; '.join(said)}")


def _welcomed(connection: socket.socket, environ: Mapping[str, str]) -> tuple[Channel, list[Frame]] | None:
    """A channel over a connection, if it is the launcher that answers; it is told apart by its first frame."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 8)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    descriptor = connection.detach()
    channel = Channel(descriptor, os.dup(descriptor), from_agent=False)
    channel.mark()
    channel.send(hello(environ))
    with selectors.DefaultSelector() as selector:
        selector.register(channel.reader, selectors.EVENT_READ)
        until = time.monotonic() + _WELCOME_S
        while not channel.ended and time.monotonic() < until:
            channel.flush()
            if selector.select(1.0) and (frames := channel.receive()):
                return channel, frames
    channel.close()
    return None


def main() -> int:
    """Be an agent, under a guardian; returns an exit status."""
    environ = dict(os.environ)
    return guarded(lambda: _be_agent(environ), close=() if LAUNCHER in environ else (0, 1))


def _be_agent(environ: Mapping[str, str]) -> int:
    try:
        return Agent(*_channel(environ), environ).run()
    except LaunchError as error:
        os.write(2, f"hpcds agent: {error}\n".encode(errors="backslashreplace"))
        return 1
