"""Signals to a launcher, and the deaths of launcher and agent: what ranks notice, and that nothing is left."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from launches import Launch, python, wait_until

if TYPE_CHECKING:
    from pathlib import Path

# A rank with a child that has a child, and a daemon in a session of its own.
FAMILY = """
import subprocess
subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
subprocess.Popen(["setsid", "sh", "-c", "sleep 1000 & exit"])
"""
FOREVER = """
note("ready")
while True:
    time.sleep(0.02)  # a signal that comes just before a sleep is heard after it
"""


def test_signals_are_passed_to_every_rank(tmp_path: Path) -> None:
    rank = python('catch("USR1", "USR2", "HUP", "INT")\ncatch("TERM", call=lambda: sys.exit(75))\n' + FOREVER)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run below nohup
    launch = Launch(tmp_path, rank)
    signal.signal(signal.SIGHUP, before)
    with launch:
        launch.wait_for("ready")
        for name in ("USR1", "USR2", "USR1", "HUP", "INT", "TERM"):
            seen = [launch.notes(rank).count(name) for rank in range(2)]
            launch.process.send_signal(signal.Signals[f"SIG{name}"])
            wait_until(lambda: [launch.notes(rank).count(name) for rank in range(2)] == [seen[0] + 1, seen[1] + 1])  # noqa: B023
        assert launch.finish().code == 75
    assert launch.notes(0) == ["ready", "USR1", "USR2", "USR1", "HUP", "INT", "TERM"]
    assert launch.err == ""


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with Launch(tmp_path, python('catch("INT", "TERM")\n' + FAMILY + FOREVER), grace_s=100_000.0) as launch:
        launch.wait_for("ready")
        launch.process.send_signal(signal.SIGINT)
        launch.wait_for("INT")
        launch.process.send_signal(signal.SIGINT)  # at once: that may be the first one, sent twice
        while launch.process.poll() is None:
            time.sleep(0.6)
            launch.process.send_signal(signal.SIGINT)
        assert launch.finish().code == 137
        assert launch.left() == []
    assert set(launch.notes(0)) == {"ready", "INT"}


def test_ranks_that_do_not_end_are_killed_after_the_grace(tmp_path: Path) -> None:
    with Launch(tmp_path, python('catch("TERM")\n' + FAMILY + FOREVER), grace_s=0.5) as launch:
        launch.wait_for("ready")
        launch.process.send_signal(signal.SIGTERM)
        assert launch.finish().code == 137
        assert launch.left() == []
    assert launch.notes(1) == ["ready", "TERM"]


def test_a_stopped_rank_ends_too(tmp_path: Path) -> None:
    with Launch(tmp_path, python('note("ready")\nos.kill(os.getpid(), signal.SIGSTOP)\n' + FOREVER)) as launch:
        launch.wait_for("ready")
        launch.process.send_signal(signal.SIGTERM)
        assert launch.finish().code == 143


@pytest.mark.parametrize("per_rank", [False, True])
def test_a_killed_launcher_leaves_nothing_behind(tmp_path: Path, per_rank: bool) -> None:
    rank = python('catch("TERM")\n' + FAMILY + FOREVER)
    options = {"environs": {}, "per_rank": per_rank}
    with Launch(tmp_path, rank, grace_s=0.5, starter="tcp", options=options) as launch:
        launch.wait_for("ready")
        launch.process.kill()
        wait_until(lambda: not launch.left())
    assert launch.notes(0) == ["ready", "TERM"]


@pytest.mark.parametrize("per_rank", [False, True])
def test_a_killed_agent_is_a_lost_host(tmp_path: Path, per_rank: bool) -> None:
    options = {"environs": {}, "per_rank": per_rank}
    with Launch(tmp_path, python(FAMILY + FOREVER), [1, 1], starter="tcp", options=options, names=["a", "b"]) as launch:
        launch.wait_for("ready")
        agents = launch.agents()
        assert len(agents) == 2
        os.kill(agents[0], signal.SIGKILL)
        assert launch.finish().code == 1
        assert launch.left() == []
    lost = "a" if "'a'" in launch.last_line else "b"
    assert launch.last_line.startswith(f"hpcds: host '{lost}': lost with its ranks (agent")


def test_a_killed_guardian_is_no_end_of_the_ranks_without_a_word(tmp_path: Path) -> None:
    with Launch(tmp_path, python('catch("TERM", call=lambda: sys.exit(75))\n' + FOREVER)) as launch:
        launch.wait_for("ready")
        guardian = next(pid for pid in launch.guardians_and_agents() if pid not in launch.agents())
        os.kill(guardian, signal.SIGKILL)
        launch.finish()
        wait_until(lambda: not launch.left())
    assert launch.notes(0) == ["ready", "TERM"]


def test_a_signal_before_the_ranks_ends_the_launch(tmp_path: Path) -> None:
    options = {"command": ["sh", "-c", 'touch "$0"; exec sleep 1000', str(tmp_path / "started")], "patience_s": 1000.0}
    with Launch(tmp_path, ["true"], starter="program", options=options) as launch:
        wait_until((tmp_path / "started").exists)
        launch.process.send_signal(signal.SIGINT)
        assert launch.finish().code == 130
        assert launch.left() == []


def test_of_ignored_signals_only_that_of_nohup_stays_ignored(tmp_path: Path) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        launch = Launch(tmp_path, python('catch("HUP", "INT")\n' + FOREVER))  # as "nohup hpcds run ... &" in a script
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with launch:
        launch.wait_for("ready")
        launch.process.send_signal(signal.SIGHUP)
        launch.process.send_signal(signal.SIGINT)
        launch.wait_for("INT")
        launch.process.send_signal(signal.SIGTERM)
        assert launch.finish().code == 143
    assert launch.notes(0) == ["ready", "INT"]
