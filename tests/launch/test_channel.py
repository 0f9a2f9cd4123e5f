"""Frames over a pair of streams: whatever is sent arrives, and nonsense does no harm."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.launch.channel import Channel, Frame, from_wire, to_wire

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = b"\0hpcds-agent\n"


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """An agent's end and a launcher's."""
    one, other = (end.detach() for end in socket.socketpair())
    agent = Channel(one, one, from_agent=False)
    launcher = Channel(other, other, from_agent=True)
    yield agent, launcher
    agent.close()
    launcher.close()


def test_what_is_sent_arrives_however_large(ends: tuple[Channel, Channel]) -> None:
    agent, launcher = ends
    os.write(agent.writer, b"a login shell says something\n")
    agent.mark()
    agent.send({"say": "output", "rank": 3}, b"x" * 5_000_000)
    agent.send({"say": "ended", "text": "two\nlines ☃"})
    assert agent.queued > 0
    frames: list[Frame] = []
    while len(frames) < 2:
        frames += launcher.receive()
        agent.flush()
    assert frames == [
        Frame({"say": "output", "rank": 3}, b"x" * 5_000_000),
        Frame({"say": "ended", "text": "two\nlines ☃"}, b""),
    ]
    assert (agent.queued, launcher.noise, launcher.ended) == (0, b"a login shell says something\n", False)


def test_the_end_is_seen_after_what_came_before_it(ends: tuple[Channel, Channel]) -> None:
    agent, launcher = ends
    agent.mark()
    agent.send({"say": "done"})
    agent.close()
    assert launcher.receive() == [Frame({"say": "done"}, b"")]
    assert (launcher.receive(), launcher.ended) == ([], True)


def test_a_channel_whose_other_side_is_gone_forgets_what_it_is_given(ends: tuple[Channel, Channel]) -> None:
    agent, launcher = ends
    launcher.close()
    agent.send({"say": "done"}, b"x" * 5_000_000)
    assert (agent.queued, agent.receive(), agent.ended) == (0, [], True)
    agent.send({"say": "done"})
    assert agent.queued == 0


@pytest.mark.parametrize(
    "nonsense", [b"x" * 100_000, MARK + b"\xff" * 8, MARK + b"\0\0\0\2\0\0\0\0{}", MARK + b"\0\0\0\2\0\0\0\0no"]
)
def test_a_stranger_who_talks_nonsense_is_not_listened_to(ends: tuple[Channel, Channel], nonsense: bytes) -> None:
    agent, launcher = ends
    launcher.trusted = False
    os.write(agent.writer, nonsense)
    frames = launcher.receive()
    assert (frames, len(launcher.noise) <= 1 << 16) == ([], True)
    assert launcher.ended == nonsense.startswith(MARK)


@given(st.binary(max_size=20))
def test_text_of_the_system_goes_over_the_wire_as_its_bytes(raw: bytes) -> None:
    assert from_wire(to_wire(os.fsdecode(raw))) == raw
