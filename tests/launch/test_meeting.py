"""Ports that are kept, and addresses that others reach."""

from __future__ import annotations

import socket

import pytest

from hpc_ds.errors import LaunchError
from hpc_ds.launch.meeting import ReservedPort, _chosen, address_for, interface_addresses, own_addresses


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


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("eth", ["eth0", "eth10"]),
        ("=eth0", ["eth0"]),
        ("eth1,ib", ["eth10", "ib0"]),
        ("^lo,docker", ["eth0", "eth10", "ib0"]),
        ("^=eth0,lo,docker0", ["eth10", "ib0"]),
    ],
)
def test_interfaces_are_chosen_as_nccl_does(rule: str, names: list[str]) -> None:
    assert [name for name in ("lo", "eth0", "eth10", "ib0", "docker0") if _chosen(name, rule)] == names


def test_an_address_is_that_of_the_interface_or_of_the_route() -> None:
    assert ("lo", "127.0.0.1") in interface_addresses()
    assert address_for([], "=lo") == "127.0.0.1"
    assert address_for([], "=nosuch0") is None
    assert address_for(["127.0.0.2"], "") == "127.0.0.1"
    assert address_for(["no such host.invalid", "127.0.0.2"], "") == "127.0.0.1"
    assert address_for([], "") is None
    for address in own_addresses():
        assert address_for([address], "") == (address if not address.startswith("127.") else "127.0.0.1")
