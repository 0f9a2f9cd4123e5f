"""A group of ranks without an agent, as a supervisor has one: logs, ends, signals and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from hpc_ds.cluster import process
from hpc_ds.launch.ranks import MERGED, RankEnd, RankGroup, RankSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Python 3.12 warns of a fork where pytest has threads. The child only sets signals before it becomes another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def group() -> Iterator[RankGroup]:
    group = RankGroup()
    yield group
    group.kill()
    ends_of(group, len(group.living))
    process.send(group.left(), signal.SIGKILL)


def start(group: RankGroup, folder: Path, rank: int, script: str, cores: frozenset[int] | None = None) -> None:
    with (folder / f"rank-{rank}.log").open("ab") as log:
        spec = RankSpec(rank, ["sh", "-c", script], {**os.environ, "RANK": str(rank)}, str(folder), cores)
        group.start(spec, log.fileno(), MERGED)


def ends_of(group: RankGroup, count: int) -> list[RankEnd]:
    ends: list[RankEnd] = []
    until = time.monotonic() + 60
    while len(ends) < count and time.monotonic() < until:
        ends += group.ended()
        group.look_at_the_clock()
        time.sleep(0.01)
    return ends


def test_each_end_is_told_once(group: RankGroup, tmp_path: Path) -> None:
    start(group, tmp_path, 0, "echo out; echo err >&2; exit 7")
    assert ends_of(group, 1) == [RankEnd(0, 7)]
    start(group, tmp_path, 1, "kill -9 $$")
    assert ends_of(group, 1) == [RankEnd(1, 137)]
    assert (group.ended(), group.living, list(group.pids)) == ([], [], [0, 1])
    assert (tmp_path / "rank-0.log").read_text() == "out\nerr\n"
    assert group.look_at_the_clock() is None


def test_what_does_not_end_in_time_is_killed(group: RankGroup, tmp_path: Path) -> None:
    start(group, tmp_path, 0, "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done")
    start(group, tmp_path, 1, "echo ready; exec sleep 1000")
    while not all((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)):
        time.sleep(0.01)
    group.end(signal.SIGTERM, 0.5)
    assert sorted(ends_of(group, 2), key=lambda end: end.rank) == [RankEnd(0, 137), RankEnd(1, 143)]
    assert "asked" in (tmp_path / "rank-0.log").read_text()


def test_what_a_rank_leaves_in_its_session_is_found(group: RankGroup, tmp_path: Path) -> None:
    process.adopt_orphans()
    other = subprocess.Popen(["sleep", "1000"])
    try:
        start(group, tmp_path, 0, "sleep 1000 & exit 0")
        assert ends_of(group, 1) == [RankEnd(0, 0)]
        left = group.left()
        assert len(left) == 1
        process.send(left, signal.SIGKILL)
        os.waitpid(left[0], 0)
        assert group.left() == []
    finally:
        other.kill()
        other.wait()


def test_a_rank_can_have_some_of_our_cores(group: RankGroup, tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    start(group, tmp_path, 0, "taskset -cp $$", frozenset({core}))
    assert ends_of(group, 1) == [RankEnd(0, 0)]
    assert (tmp_path / "rank-0.log").read_text().endswith(f": {core}\n")


def test_a_program_that_is_not_there_is_an_error_of_the_system(group: RankGroup, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        group.start(RankSpec(0, ["no-such-program"], {}), 1, MERGED)
    assert group.living == []
