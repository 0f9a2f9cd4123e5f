"""The port at which ranks will meet, kept for rank 0."""

from __future__ import annotations

import errno
import os
import socket

from hpc_ds.errors import LaunchError


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
