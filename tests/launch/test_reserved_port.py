"""Ports that are kept for rank 0."""

from __future__ import annotations

import socket

import pytest

from hpc_ds.errors import LaunchError
from hpc_ds.launch.reserved_port import ReservedPort


def test_a_reserved_port_can_be_listened_on_but_is_given_to_nobody_else() -> None:
    ports = [ReservedPort(0) for _ in range(50)]
    assert len({port.number for port in ports}) == 50
    for port in ports:
        with socket.create_server(("127.0.0.1", port.number)) as server:
            socket.create_connection(server.getsockname()).close()
        with pytest.raises(LaunchError, match=rf"master port {port.number}: in use on .*; choose another"):
            ReservedPort(port.number)
        port.close()


def test_a_port_that_is_listened_on_is_refused() -> None:
    with socket.create_server(("", 0)) as server, pytest.raises(LaunchError, match="in use on"):
        ReservedPort(server.getsockname()[1])
