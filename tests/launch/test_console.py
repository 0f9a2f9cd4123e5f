"""How pieces of many ranks become one stream of lines."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from hpc_ds.launch.console import Console

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, pieces: list[tuple[int, int, bytes]], *, prefix: bool, same: bool) -> tuple[bytes, bytes]:
    """What (rank, stream, piece) become on two files, or twice what they become on one."""
    done = threading.Event()
    paths = [folder / "out", folder / ("out" if same else "err")]
    opened = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in paths]
    console = Console(*opened, prefix=prefix, wake=done.set)
    for rank, stream, piece in pieces:
        console.write(rank, stream, piece)
    console.say("the end")
    while console.queued:
        done.wait()
        done.clear()
    for descriptor in opened:
        os.close(descriptor)
    return paths[0].read_bytes(), paths[1].read_bytes()


@pytest.mark.parametrize(
    ("pieces", "plain", "prefixed"),
    [
        ([(0, 1, b"a\nb\n"), (1, 1, b"c\n")], b"a\nb\nc\n", b"[rank 0] a\n[rank 0] b\n[rank 1] c\n"),
        ([(0, 1, b"a"), (0, 1, b"b\n")], b"ab\n", b"[rank 0] ab\n"),
        ([(0, 1, b"a"), (1, 1, b"c\n"), (0, 1, b"b\n")], b"a\nc\nb\n", b"[rank 0] a\n[rank 1] c\n[rank 0] b\n"),
        (
            [(0, 1, b"1%\r"), (1, 1, b"c\n"), (0, 1, b"2%\r\n")],
            b"1%\rc\n2%\r\n",
            b"[rank 0] 1%\r[rank 1] c\n[rank 0] 2%\r\n",
        ),
        ([(0, 1, b"1%\r2%\r"), (0, 1, b"")], b"1%\r2%\r", b"[rank 0] 1%\r[rank 0] 2%\r"),
        ([(0, 1, b"\n\n")], b"\n\n", b"[rank 0] \n[rank 0] \n"),
        ([(10, 1, b"\xff\0\n")], b"\xff\0\n", b"[rank 10] \xff\0\n"),
    ],
)
def test_no_line_has_two_ranks(
    tmp_path: Path, pieces: list[tuple[int, int, bytes]], plain: bytes, prefixed: bytes
) -> None:
    for name, prefix, expected in (("plain", False, plain), ("prefixed", True, prefixed)):
        (tmp_path / name).mkdir()
        assert written(tmp_path / name, pieces, prefix=prefix, same=False) == (expected, b"the end\n")


def test_two_streams_of_one_terminal_share_its_lines(tmp_path: Path) -> None:
    pieces = [(0, 1, b"out"), (0, 2, b"err"), (0, 1, b"more")]
    assert written(tmp_path, pieces, prefix=False, same=True)[0] == b"out\nerr\nmore\nthe end\n"
