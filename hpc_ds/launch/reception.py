"""Where agents come in: over a socket that their launcher made for them, or to a port that the launcher listens on."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any, Protocol

from hpc_ds.errors import LaunchError
from hpc_ds.launch.address import reachable_addresses
from hpc_ds.launch.channel import LAUNCHER, TOKEN, Channel
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hpc_ds.launch.plan import LaunchPlan
    from hpc_ds.launch.program import Program

_HELLO_S = 30.0
_MOST_GUESTS = 1024


class Starter(Protocol):
    """A way to start agents.

    Attributes:
        per_rank: whether there is an agent for every rank; else for every host.
    """

    per_rank: bool

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterable[Program]:
        """Start the programs that start agents; where there are many, one whenever the next is asked for.

        Raises:
            LaunchError: a program is missing.
        """


class Guest:
    """A connection whose hello has not come.

    Attributes:
        node: which host it belongs to, where that is known.
    """

    def __init__(self, channel: Channel, node: int | None) -> None:
        self.channel, self.node = channel, node
        self.since = time.monotonic()


class Reception:
    """The door of one launch.

    Attributes:
        token: the secret that an agent must know that comes to the port.
        guests: connections by their descriptor, from the moment they are made to their hello.
        new: descriptors of guests that nobody watches yet.
        listener: what the port listens with; None: nobody has asked for it.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(32)
        self.guests: dict[int, Guest] = {}
        self.new: list[int] = []
        self.listener: socket.socket | None = None

    @property
    def port(self) -> int:
        """The port that agents connect to; from now on it is listened on."""
        if self.listener is None:
            try:
                dual = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if dual else socket.AF_INET
                self.listener = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
            except OSError as error:
                raise LaunchError(f"launcher: cannot listen for agents: {error.strerror}; see ss -tln") from None
            self.listener.setblocking(False)  # noqa: FBT003 - not ours
        return int(self.listener.getsockname()[1])

    @property
    def addresses(self) -> list[str]:
        """The addresses of this machine that agents may try."""
        return reachable_addresses()

    @property
    def variables(self) -> dict[str, str]:
        """What an agent must find in its environment to come to the port; TOKEN is a secret."""
        return {LAUNCHER: f"{','.join(self.addresses)}:{self.port}", TOKEN: self.token}

    def attach(self, connection: socket.socket, node: int) -> None:
        """Expect the hello of a host's agent on our end of a socket whose other end a program has."""
        self._add(connection, node)

    def accept(self) -> None:
        """Let in who is at the port."""
        while self.listener is not None and len(self.guests) < _MOST_GUESTS:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 8)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            self._add(connection, None)

    def _add(self, connection: socket.socket, node: int | None) -> None:
        descriptor = connection.detach()
        channel = Channel(descriptor, descriptor, from_agent=True)
        channel.trusted = node is not None
        self.guests[descriptor] = Guest(channel, node)
        self.new.append(descriptor)

    def hello(self, guest: Guest) -> dict[str, Any] | None:
        """What a guest says of itself; None: nothing yet, or nothing that is for us: then its channel has ended.

        Raises:
            LaunchError: it is an agent of another version.
        """
        frames = guest.channel.receive()
        if not frames:
            return None
        said = frames[0].head
        token = str(said.get("token")).encode("ascii", "replace")
        known = guest.node is not None or hmac.compare_digest(token, self.token.encode("ascii"))
        if said["say"] != "hello" or not known:
            guest.channel.ended = True
            return None
        if said.get("version") != __version__:
            raise LaunchError(
                f"host {said.get('host')!r}: its hpc_ds is version {said.get('version')}, that of the launcher is "
                f"{__version__}; install the same on both"
            )
        guest.channel.trusted = True
        guest.channel.send({"say": "welcome"})
        return said

    def expired(self) -> list[Guest]:
        """Strangers at the port who have said nothing for long."""
        before = time.monotonic() - _HELLO_S
        return [guest for guest in self.guests.values() if guest.node is None and guest.since < before]

    def close(self) -> None:
        """Let nobody in any more."""
        for guest in self.guests.values():
            guest.channel.close()
        self.guests.clear()
        if self.listener is not None:
            with contextlib.suppress(OSError):
                self.listener.close()
            self.listener = None
