"""Which addresses this host has, and which of them others reach: of an interface that is named, or of the route to them.

The host's own name is no help: on Debian it resolves to 127.0.1.1, and the first of ``hostname -I`` can be a bridge of
containers. Interfaces are named as NCCL takes them: ``eth`` is every one that begins so, ``=eth0`` that one, ``^docker``
and ``^=lo`` all but those; commas between several. Agents on other hosts use this too: the standard library only.

Source: NCCL's user guide (NCCL_SOCKET_IFNAME); netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_NEW_ADDRESS, _GET_ADDRESS, _DONE, _ERROR = 20, 22, 3, 2
_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_ANY_PORT = 9  # of a datagram socket that sends nothing
_ASKED = 8  # a name that does not resolve can take seconds
_BRIDGES = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali")  # every host has the same addresses there

NAMING = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Variables that name interfaces; the first that is set counts."""


class Address(NamedTuple):
    """One address of this host, and the interface that has it."""

    interface: str
    address: str


def own_addresses() -> list[Address]:
    """All addresses of this host, in the kernel's order; those of a link only (169.254., fe80:) are left out."""
    names = dict(socket.if_nameindex())
    found = [Address(names.get(index, ""), address) for index, address in _told_by_kernel()]
    return [entry for entry in found if not ip_address(entry.address).is_link_local]


def reachable_addresses() -> list[str]:
    """Those that others may reach, the likely ones first; that of the loopback if there are none."""
    found = [entry for entry in own_addresses() if not ip_address(entry.address).is_loopback]
    found.sort(key=lambda entry: entry.interface.startswith(_BRIDGES))
    return list(dict.fromkeys(entry.address for entry in found)) or ["127.0.0.1"]


def own_address(others: Iterable[str], environ: Mapping[str, str], interfaces: Sequence[str] = ()) -> str | None:
    """An address of this host for other hosts to connect to.

    Args:
        others: names or addresses of other hosts; those that do not resolve are passed over.
        environ: the variables of ``NAMING`` are read.
        interfaces: those of the site, where neither is set.

    Returns:
        Of the interfaces that are named, the address of the route to the others if it is one of theirs, else the first.
        Where none is named, that of the route, else the first that is neither loopback nor a bridge of containers. None
        where there is none such.
    """
    named = named_interfaces(environ) or ",".join(interfaces)
    usable = own_addresses()
    if not named or named.startswith("^"):  # who names "lo" has all ranks on one host
        usable = [entry for entry in usable if not ip_address(entry.address).is_loopback]
    if named:
        usable = allowed(usable, named)
    route = route_source(others)
    if route is not None and (not named or route in {entry.address for entry in usable}):
        return route
    bridges = [] if named else [entry for entry in usable if entry.interface.startswith(_BRIDGES)]
    return next((entry.address for entry in usable if entry not in bridges), None)


def named_interfaces(environ: Mapping[str, str]) -> str:
    """What the variables of NCCL, else of gloo, name, in NCCL's form; "" where neither is set."""
    nccl, gloo = (environ.get(name, "").strip() for name in NAMING)
    return nccl or (f"={gloo}" if gloo else "")


def allowed(addresses: Sequence[Address], named: str) -> list[Address]:
    """Those on interfaces that are named in NCCL's form; where names are listed, in the order of the list."""
    but = named.startswith("^")
    exact = named.removeprefix("^").startswith("=")
    names = [name for name in named.removeprefix("^").removeprefix("=").split(",") if name]

    def fits(entry: Address, name: str) -> bool:
        return entry.interface == name if exact else entry.interface.startswith(name)

    if but:
        return [entry for entry in addresses if not any(fits(entry, name) for name in names)]
    chosen = [entry for name in names for entry in addresses if fits(entry, name)]
    return list(dict.fromkeys(chosen))


def route_source(others: Iterable[str]) -> str | None:
    """The address of this host that the first of the others which resolves would see; None where none does.

    Towards a name of this host itself it is a loopback address: that counts only where there is no other.
    """
    loopback = None
    for host in itertools.islice(others, _ASKED):
        for family, address in _resolved(host):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, _ANY_PORT))  # sends nothing: it asks for the route only
                source = str(probe.getsockname()[0])
                if not ip_address(source).is_loopback:
                    return source
                loopback = loopback or source
    return loopback


def interface_towards(host: str) -> str | None:
    """The interface that packets to a host leave by; None where there is no route, or it is this host itself."""
    source = route_source([host])
    if source is None:
        return None
    names = [entry.interface for entry in own_addresses() if entry.address == source]
    return names[0] if names and names[0] != "lo" else None


def is_own(host: str) -> bool:
    """Whether a name or address is one of this host's, and of no other's."""
    own = {entry.address for entry in own_addresses()}
    found = _resolved(host)
    return bool(found) and all(address in own or ip_address(address).is_loopback for _, address in found)


def network() -> str:
    """What two processes have in common that reach each other at 127.0.0.1."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return os.uname().nodename


def _resolved(host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return [(entry[0], str(entry[4][0])) for entry in found if entry[0] in {socket.AF_INET, socket.AF_INET6}]


def _told_by_kernel() -> Iterator[tuple[int, str]]:
    """Index of the interface, and address, of each; nothing where the kernel may not be asked."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel,
    ):
        kernel.send(struct.pack("=IHHIIBxxx", 20, _GET_ADDRESS, _REQUEST_DUMP, 1, 0, socket.AF_UNSPEC))
        while True:
            for kind, body in _parts(kernel.recv(1 << 16), "=IH", 16):
                if kind in {_DONE, _ERROR}:
                    return
                if kind == _NEW_ADDRESS:
                    yield from _read_address(body)


def _read_address(body: bytes) -> Iterator[tuple[int, str]]:
    family, index = struct.unpack_from("=BxxxI", body)
    values = dict(_parts(body[8:], "=HH", 4))
    packed = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS))  # of a tunnel, ADDRESS is the other end's
    if packed is not None and family in {socket.AF_INET, socket.AF_INET6}:
        yield index, socket.inet_ntop(family, packed)


def _parts(data: bytes, head: str, header_size: int) -> Iterator[tuple[int, bytes]]:
    """Kind and body of the messages, or of the attributes, that stand one after another, each at a multiple of four."""
    while len(data) >= header_size:
        size, kind = struct.unpack_from(head, data)
        if size < header_size:
            return
        yield kind, data[header_size:size]
        data = data[(size + 3) // 4 * 4 :]
