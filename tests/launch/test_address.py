"""Addresses of this host, by interface and by route; what Linux itself says is the oracle."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hpc_ds.launch.address import (
    Address,
    allowed,
    interface_towards,
    is_own,
    named_interfaces,
    network,
    own_address,
    own_addresses,
    reachable_addresses,
    route_source,
)  # fmt: skip

ADDRESSES = [
    Address("lo", "127.0.0.1"), Address("eth0", "10.0.0.1"), Address("eth01", "10.0.1.1"), Address("ib0", "10.1.0.1"),
    Address("docker0", "172.17.0.1"), Address("eth0", "fd00::1"),
]  # fmt: skip

NAMED = {
    "eth": ["10.0.0.1", "10.0.1.1", "fd00::1"],
    "=eth0": ["10.0.0.1", "fd00::1"],
    "eth0": ["10.0.0.1", "10.0.1.1", "fd00::1"],
    "ib0,=eth0": ["10.1.0.1"],  # "=" and "^" stand in front of the whole list, or are part of a name
    "ib0,eth01": ["10.1.0.1", "10.0.1.1"],
    "=ib0,lo": ["10.1.0.1", "127.0.0.1"],
    "^lo,docker": ["10.0.0.1", "10.0.1.1", "10.1.0.1", "fd00::1"],
    "^=lo,docker,eth0": ["10.0.1.1", "10.1.0.1", "172.17.0.1"],
    "hsn0": [],
    "eth01,eth": ["10.0.1.1", "10.0.0.1", "fd00::1"],
}


@pytest.mark.parametrize(("named", "expected"), NAMED.items(), ids=NAMED)
def test_interfaces_are_named_as_nccl_takes_them(named: str, expected: list[str]) -> None:
    assert [entry.address for entry in allowed(ADDRESSES, named)] == expected


def test_what_the_variables_name() -> None:
    assert named_interfaces({}) == named_interfaces({"NCCL_SOCKET_IFNAME": " ", "GLOO_SOCKET_IFNAME": ""}) == ""
    assert named_interfaces({"NCCL_SOCKET_IFNAME": "^lo", "GLOO_SOCKET_IFNAME": "eth1"}) == "^lo"
    assert named_interfaces({"GLOO_SOCKET_IFNAME": "eth0,eth1"}) == "=eth0,eth1"


def test_all_addresses_that_ip_lists_are_found() -> None:
    try:
        shown = subprocess.run(["ip", "-json", "address"], capture_output=True, check=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("ip: not installed; run tests/install_system_packages.sh")
    expected = {
        (link["ifname"], entry["local"])
        for link in json.loads(shown)
        for entry in link.get("addr_info", ())
        if entry["scope"] != "link" and not entry["local"].startswith("169.254.")
    }
    assert set(own_addresses()) == expected


def test_loopback_is_no_address_for_others_unless_it_is_named() -> None:
    assert (
        own_address([], {"NCCL_SOCKET_IFNAME": "=lo"}) == own_address([], {"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    )
    assert own_address([], {"NCCL_SOCKET_IFNAME": "no-such-interface"}) is None
    assert own_address([], {}, ["no-such-interface"]) is None
    assert own_address([], {}) not in {"127.0.0.1", "::1"}


def test_the_route_decides_where_no_interface_is_named() -> None:
    """Every route from this host to itself is loopback: all that a machine without a network can show."""
    assert route_source(["127.0.0.1"]) == own_address(["127.0.0.1"], {}) == "127.0.0.1"
    assert route_source(["no-such-host.invalid", "127.0.0.1"]) == "127.0.0.1"
    assert route_source(["no-such-host.invalid"]) is route_source([]) is None
    assert interface_towards("127.0.0.1") is interface_towards("no-such-host.invalid") is None


def test_a_host_knows_its_own_names() -> None:
    assert is_own("localhost")
    assert is_own("127.0.1.1")
    assert not is_own("no-such-host.invalid")
    assert not is_own("192.0.2.254")  # of no host at all: RFC 5737
    for entry in own_addresses():
        assert is_own(entry.address)
    assert not is_own("x" * 300)


def test_the_addresses_that_others_may_try() -> None:
    assert [entry for entry in reachable_addresses() if entry.startswith("127.")] in ([], ["127.0.0.1"])
    assert len(set(reachable_addresses())) == len(reachable_addresses()) > 0


def test_processes_of_one_network_have_one_name_for_it() -> None:
    theirs = [sys.executable, "-c", "from hpc_ds.launch.address import network; print(network())"]
    assert subprocess.run(theirs, capture_output=True, check=True, text=True).stdout.rstrip("\n") == network()
