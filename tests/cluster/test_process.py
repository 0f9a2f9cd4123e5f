"""Processes of this machine: who lives, who descends from whom, who dies with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from hpc_ds.cluster import process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def wait_until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def python(text: str, *args: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", text, *args], **options)  # type: ignore[call-overload, no-any-return]


def test_a_process_lives_under_its_number_and_start() -> None:
    child = python("import time; time.sleep(60)")
    started = process.start_time(child.pid)
    assert started is not None
    assert process.is_alive(child.pid, started)
    assert not process.is_alive(child.pid, started + 1), "another process with the same number"
    child.kill()
    wait_until(lambda: process.start_time(child.pid) is None)  # a zombie counts as ended
    assert not process.is_alive(child.pid, started)
    child.wait()
    assert process.start_time(child.pid) is None


def test_a_name_full_of_brackets_and_spaces_confuses_nobody(tmp_path: Path) -> None:
    odd = tmp_path / ") R 1 (x"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "60"])
    try:
        wait_until(lambda: child.pid in process.descendants(os.getpid()))
        assert process.start_time(child.pid) is not None
    finally:
        child.kill()
        child.wait()


NESTED = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_descendants_are_children_and_theirs_parents_first() -> None:
    child = python(NESTED, stdout=subprocess.PIPE)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        assert process.descendants(child.pid) == [grandchild]
        found = process.descendants(os.getpid())
        assert found.index(child.pid) < found.index(grandchild)
    finally:
        process.send([grandchild, child.pid], signal.SIGKILL)
        child.wait()
        child.stdout.close()
    wait_until(lambda: process.start_time(grandchild) is None)
    assert process.descendants(child.pid) == []


def test_signals_to_processes_that_ended_are_passed_over() -> None:
    child = python("")
    child.wait()
    other = python("import time; time.sleep(60)")
    process.send([child.pid, other.pid], signal.SIGCONT, signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL


PARENT = """
import signal, subprocess, sys, time
from hpc_ds.cluster import process
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
signal.signal(signal.SIGHUP, signal.SIG_IGN)
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], preexec_fn=process.child_setup(signal.Signals(int(sys.argv[2])))
)
print(child.pid, flush=True)
time.sleep(60)
"""

WITNESS = """
import signal, sys, time
print("blocked", sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), signal.getsignal(signal.SIGHUP), flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("TERM", flush=True), sys.exit()))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_gets_its_signal_when_its_parent_is_killed(number: signal.Signals) -> None:
    parent = python(PARENT, WITNESS, str(int(number)), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == f"blocked [] {signal.SIG_DFL}\n".encode()
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.wait()
    wait_until(lambda: process.start_time(child) is None)
    assert parent.stdout.read() == (b"TERM\n" if number == signal.SIGTERM else b"")
    parent.stdout.close()


ADOPTER = """
import os, subprocess, sys, time
from hpc_ds.cluster import process
process.adopt_orphans()
# The shell ends at once; what it started in a session of its own stays.
subprocess.run(["bash", "-c", "setsid sleep 61 & disown"], check=True)
found = []
while not found:
    found = [pid for pid in process.descendants(os.getpid()) if b"sleep" in open(f"/proc/{pid}/cmdline", "rb").read()]
print(os.getpid() == int(open(f"/proc/{found[0]}/stat").read().rpartition(")")[2].split()[1]))
process.send(found, 9)
"""


def test_no_descendant_escapes_an_adopter() -> None:
    done = subprocess.run([sys.executable, "-c", ADOPTER], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "True\n"
