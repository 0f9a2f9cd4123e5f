"""Agents that come, do not come, come twice, or are somebody else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from launches import launched

from hpc_ds.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

TELL = [
    "sh",
    "-c",
    "echo $RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $GROUP_RANK $WORLD_SIZE $MASTER_ADDR $HPCDS_LAUNCHER$HPCDS_TOKEN$HPCDS_NODE",
]


@pytest.mark.parametrize("per_rank", [False, True])
def test_agents_may_be_of_hosts_or_of_ranks(tmp_path: Path, per_rank: bool) -> None:
    options = {"environs": {}, "per_rank": per_rank}
    launch = launched(tmp_path, TELL, [2, 1], starter="tcp", options=options, names=["a", "b"])
    assert sorted(launch.out.decode().splitlines()) == [
        "0 0 2 0 3 127.0.0.1",
        "1 1 2 0 3 127.0.0.1",
        "2 0 1 1 3 127.0.0.1",
    ]
    assert (launch.code, launch.err) == (0, "")


def test_an_agent_with_another_secret_does_not_come_in(tmp_path: Path) -> None:
    options = {"environs": {"HPCDS_TOKEN": "guessed"}, "per_rank": False}
    launch = launched(tmp_path, ["true"], starter="tcp", options=options)
    assert launch.code == 1
    assert launch.last_line.startswith("hpcds: host 'localhost': no agent has come (agent of localhost: exit code 1: ")
    assert "another program that listens there" in launch.last_line


@pytest.mark.parametrize(
    ("environs", "per_rank", "words"),
    [
        ({"HPCDS_NODE": "0"}, False, "says that it is node 0, which has come already; see how it is started"),
        ({"HPCDS_NODE": "7"}, False, "says that it is node 7, which is in no plan; see how it is started"),
        ({"PMI_RANK": "1"}, True, "says that it is rank 1, which has come already; see how it is started"),
        ({"PMI_RANK": "x"}, True, "says that it is rank None, which is in no plan; see how it is started"),
    ],
)
def test_an_agent_out_of_place_ends_the_launch(
    tmp_path: Path, environs: dict[str, str], per_rank: bool, words: str
) -> None:
    options = {"environs": environs, "per_rank": per_rank}
    launch = launched(tmp_path, ["true"], [1, 1], starter="tcp", options=options, names=["a", "b"])
    assert (launch.code, launch.last_line.partition(": ")[2].partition(": ")[2]) == (1, words)


@pytest.mark.parametrize(
    ("command", "patience_s", "words"),
    [
        (["sh", "-c", "echo all is lost >&2; exit 3"], 1000, "no agent has come (starter: exit code 3: all is lost)"),
        (
            ["sh", "-c", "sleep 1000 & kill -9 $$"],
            1000,
            "no agent has come (starter: killed by SIGKILL (out of memory?)",
        ),
        (["sleep", "1000"], 0.5, "no agent has come in time (starter: killed by SIGTERM: it said nothing)"),
        (
            ["no-such-mpirun"],
            1000,
            "starter: 'no-such-mpirun': No such file or directory; install it, or choose another",
        ),
    ],
)
def test_a_program_that_brings_no_agents_is_reported(
    tmp_path: Path, command: list[str], patience_s: float, words: str
) -> None:
    options = {"command": command, "patience_s": patience_s}
    launch = launched(tmp_path, ["true"], starter="program", options=options)
    assert launch.code == 1
    assert words in launch.last_line


# An agent that says something before its hello, as login shells do, and then what a test wants.
STRANGER = """
import os, sys, time
sys.path.insert(0, {repository!r})
from hpc_ds.launch import agent, channel
os.write(1, b"Welcome to this host!\\n")
channel = channel.Channel(0, 1, from_agent=False)
channel.mark()
hello = agent.hello(os.environ)
{more}
"""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "hello['version'] = '0.0'\nchannel.send(hello)\ntime.sleep(1000)",
            f"its hpc_ds is version 0.0, that of the launcher is {__version__}; install the same on both",
        ),
        ("sys.exit('python: not found')", "(starter: exit code 1: python: not found / Welcome to this host!)"),
        ("os.write(1, b'{}' * 5)", "no agent has come (starter: exit code 0: Welcome to this host!"),
        ("hello['say'] = 'goodbye'\nchannel.send(hello)", "no agent has come (starter: exit code 0: "),
    ],
)
def test_a_program_that_is_no_agent_of_ours_is_reported(tmp_path: Path, more: str, words: str) -> None:
    from launches import REPOSITORY

    program = STRANGER.format(repository=str(REPOSITORY), more=more)
    launch = launched(tmp_path, ["true"], starter="socket", options={"command": [sys.executable, "-c", program]})
    assert launch.code == 1
    assert words in launch.last_line


def test_what_a_shell_says_before_the_agent_does_no_harm(tmp_path: Path) -> None:
    from hpc_ds.launch.program import agent_command

    options = {"command": ["sh", "-c", 'echo Welcome; exec "$@"', "sh", *agent_command()]}
    launch = launched(tmp_path, ["echo", "hello"], ranks=[1], starter="socket", options=options)
    assert (launch.code, launch.out, launch.err) == (0, b"hello\n", "")
