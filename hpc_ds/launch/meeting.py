"""Where the ranks meet: a port that is nobody else's, on an address of this machine that the others reach."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SIOCGIFADDR = 0x8915
_GLOBAL_SCOPE = "00"
_BRIDGES = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali")  # every machine has the same addresses there


class ReservedPort:
    """A TCP port that is bound but not listened on.

    Rank 0 can bind it too, for both ask for SO_REUSEADDR, and listen on it; Linux gives it to nobody who asks for any
    port, and takes it for no outgoing connection. Two launches that ask for the same port by its number meet at a
    name that belongs to the network of this machine.

    Attributes:
        number: the port.
    """

    def __init__(self, number: int) -> None:
        """Reserve a port; 0: any that is free.

        Raises:
            LaunchError: it is in use.
        """
        self._sockets: list[socket.socket] = []
        try:
            self._sockets.append(_bound(number))
            self.number = int(self._sockets[0].getsockname()[1])
            claim = socket.socket(socket.AF_UNIX)
            self._sockets.append(claim)
            claim.bind(f"\0hpcds-port-{self.number}")
        except OSError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise LaunchError(f"master port {number}: in use on {os.uname().nodename}; choose another") from None
            raise LaunchError(f"master port {number}: {error.strerror}; choose another") from None

    def close(self) -> None:
        """Give the port back."""
        for one in self._sockets:
            one.close()
        self._sockets = []


def _bound(number: int) -> socket.socket:
    """A socket bound to a port on all addresses of IPv6 and IPv4; only of IPv4 where there is no other."""
    try:
        both = socket.socket(socket.AF_INET6)
    except OSError:
        both = None
    if both is not None:
        try:
            both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            both.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            both.bind(("::", number))
        except OSError as error:
            both.close()
            if error.errno != errno.EADDRNOTAVAIL:
                raise
        else:
            return both
    old = socket.socket(socket.AF_INET)
    old.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    old.bind(("0.0.0.0", number))  # noqa: S104 - as rank 0 will
    return old


def address_for(peers: Iterable[str], interface: str) -> str | None:
    """An address of this machine that its peers reach; None: there is none.

    Args:
        peers: names and addresses of the other machines, the best first.
        interface: as NCCL_SOCKET_IFNAME is written: ``eth``, ``=eth0``, ``^lo,docker``; empty: any, by the route.
    """
    if interface:
        return next((address for name, address in interface_addresses() if _chosen(name, interface)), None)
    loopback = None
    for peer in peers:
        for source in _sources(peer):
            if not source.startswith(("127.", "fe80:")) and source != "::1":
                return source
            loopback = source
    return loopback


def _chosen(name: str, rule: str) -> bool:
    names = rule.lstrip("^=").split(",")
    exact = rule.lstrip("^").startswith("=")
    found = name in names if exact else any(name.startswith(one) for one in names)
    return found != rule.startswith("^")


def _sources(peer: str) -> Iterator[str]:
    """The addresses from which this machine would speak to a peer."""
    try:
        found = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return
    for family, kind, protocol, _, where in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # of UDP: nothing is sent
            yield str(probe.getsockname()[0]).partition("%")[0]


def own_addresses() -> list[str]:
    """The addresses of this machine that others may reach, the likely ones first; those of the loopback if none."""
    found = [(name, address) for name, address in interface_addresses() if name != "lo"]
    found.sort(key=lambda one: one[0].startswith(_BRIDGES))
    return list(dict.fromkeys(address for _, address in found)) or ["127.0.0.1"]


def interface_addresses() -> list[tuple[str, str]]:
    """(interface, address) of this machine: the IPv4 address of each, and the IPv6 ones that are not of the link."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope == _GLOBAL_SCOPE:
                found.append((name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))))
    return found


def machine() -> str:
    """What two processes have in common that reach each other at 127.0.0.1."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return os.uname().nodename
