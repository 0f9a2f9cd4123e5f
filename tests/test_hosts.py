"""The harness of hosts itself: what the tests of launchers rely on, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hosts import Hosts, mark_of, network_of, processes_in, remove_stale

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.hosts

TESTS = Path(__file__).resolve().parent

# Starts hosts, says who holds them, and waits to be killed.
TO_BE_KILLED = """
import sys, time
from pathlib import Path
from hosts import Hosts
hosts = Hosts(Path(sys.argv[1]), 2)
hosts.start()
hosts.start_on(1, ["sleep", "600"])
while not any("sleep 600" in command for command in hosts.processes(1).values()):
    time.sleep(0.02)
print(*(anchor.pid for anchor in hosts._anchors), flush=True)
time.sleep(600)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", TO_BE_KILLED, str(tmp_path)]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(TESTS)}, stdout=subprocess.PIPE, text=True) as it:
        yield it
        it.kill()


def test_hosts_are_reached_by_ssh_and_pdsh_alone(hosts: Hosts) -> None:
    script = "hostname; ssh w2 'hostname; exit 7'; echo $?; pdsh -R ssh -w w[2-3] hostname | sort; cd /; pwd"
    assert hosts.run_on(0, ["sh", "-c", script]).stdout.split() == ["w1", "w2", "7", "w2:", "w2", "w3:", "w3", "/"]
    assert hosts.run_on(2, ["getent", "ahostsv4", "w3"]).stdout.split()[0] == "127.0.1.1"
    assert hosts.run_on(2, ["getent", "ahostsv4", "w1"]).stdout.split()[0] == hosts.address(0)
    home = hosts.run_on(0, ["ssh", "w3", "echo $HOME; pwd; cd; pwd; echo $0"]).stdout.split()
    assert home == [str(hosts.home)] * 3 + ["sh"], "no file of this machine's root is read there"
    outside = subprocess.run(
        ["ssh", "-F", hosts.ssh_config, "-oConnectTimeout=1", "w1"], check=False, capture_output=True
    )
    assert outside.returncode == 255, "from outside there is no such host"


def test_faults_are_what_they_say(hosts: Hosts) -> None:
    hosts.stop_sshd(1)
    assert "Connection refused" in hosts.run_on(0, ["ssh", "w2", "true"]).stderr
    hosts.start_sshd(1)
    assert hosts.run_on(0, ["ssh", "w2", "true"]).returncode == 0

    sleeping = hosts.start_on(0, ["ssh", "w2", "sleep 600"])
    try:
        while not any("sleep 600" in command for command in hosts.processes(1).values()):
            assert sleeping.poll() is None
        hosts.kill_host(1)
        assert sleeping.wait(timeout=60) == 255
    finally:
        sleeping.kill()
        sleeping.wait()

    hosts.set_link(1, up=False)
    assert hosts.run_on(0, ["ssh", "-oConnectTimeout=1", "w2", "true"]).returncode == 255
    hosts.set_link(1, up=True)
    assert hosts.run_on(0, ["ssh", "w2", "true"]).returncode == 0


def test_a_killed_harness_leaves_nothing(killed: subprocess.Popen[str]) -> None:
    assert killed.stdout is not None
    anchors = [int(word) for word in killed.stdout.readline().split()]
    networks = [network_of(anchor) for anchor in anchors]
    assert len(set(networks)) == 3
    assert network_of(os.getpid()) not in networks
    os.kill(anchors[1], signal.SIGKILL)  # nobody ends this one's sshd and sleep, but the next harness
    killed.kill()
    killed.wait()
    assert mark_of(killed.pid) == ""
    wait_until_empty(networks[0])
    assert processes_in(networks[1]) != []
    remove_stale()
    wait_until_empty(networks[1])
    wait_until_empty(networks[2])


def wait_until_empty(network: str) -> None:
    while processes_in(network):
        time.sleep(0.02)
