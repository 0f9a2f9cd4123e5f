"""Ranks as real, tiny processes: how they end together, and what is said of the first that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from hpc_ds.cluster import process
from hpc_ds.launch import local
from hpc_ds.launch.failure import Failure, first_failure, in_words, last_lines
from hpc_ds.launch.local import LocalRunner
from hpc_ds.launch.runner import CHECKPOINTED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Python 3.12 warns of a fork where torch has threads. The child only sets signals before it becomes another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

# Every rank of a test runs this file: RANK decides which line of it.
PRELUDE = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
# A rank that is told to end while it starts dies by the signal: nothing is decided before all are here.
MEET = """
open(f"here-{rank}", "w").close()
while sum(name.startswith("here-") for name in os.listdir()) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
"""


class Bench:
    """A folder with ranks in it, all of which are gone at its end."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder / "logs"
        self.step_file = folder / "step.json"
        self._folder = folder
        self._runners: list[LocalRunner] = []

    def start(self, *programs: str) -> LocalRunner:
        """One rank for each program."""
        lines = "".join(f"if rank == {rank}:\n  {program}\n" for rank, program in enumerate(programs))
        os.chdir(self._folder)
        runner = LocalRunner(
            [sys.executable, "-u", "-c", PRELUDE + MEET + lines],
            os.environ,
            len(programs),
            self.logs,
            self.step_file,
        )
        self._runners.append(runner)
        runner.start()
        return runner

    def end(self) -> None:
        for runner in self._runners:
            for rank in runner._ranks._ranks.values():
                rank.kill()
                rank.wait()

    def log(self, rank: int) -> str:
        return (self.logs / f"rank-{rank}.log").read_text()

    def failure(self, runner: LocalRunner) -> Failure | None:
        """Who failed first."""
        return first_failure(runner.ends, self.logs / "failures", self.logs)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    yield bench
    bench.end()


def outcome(runner: LocalRunner, timeout_s: float = 30) -> int:
    deadline = time.monotonic() + timeout_s
    while (code := runner.poll()) is None:
        assert time.monotonic() < deadline, "the ranks did not end"
        time.sleep(0.01)
    return code


SLEEP = "time.sleep(60)"


def test_all_ranks_finish(bench: Bench) -> None:
    runner = bench.start("pass", "pass", "pass")
    assert outcome(runner) == 0
    assert bench.failure(runner) is None
    assert runner.poll() == 0, "asked again, it says the same"


def test_every_rank_is_told_who_it_is_and_keeps_a_log(bench: Bench) -> None:
    say = "print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')))"
    runner = bench.start(say, f"{say}; print('error', file=sys.stderr); print(repr(sys.stdin.read()))")
    assert outcome(runner) == 0
    assert (bench.log(0), bench.log(1)) == ("0 0 2 2\n", "1 1 2 2\nerror\n''\n")


def test_ranks_are_named_for_whoever_signals_them(bench: Bench) -> None:
    runner = bench.start(SLEEP, SLEEP)
    named = json.loads(bench.step_file.read_text())["ranks"]
    assert [pid for pid, _ in named] == [rank.pid for rank in runner._ranks._ranks.values()]
    assert all(process.is_alive(pid, started) for pid, started in named)
    assert [os.getsid(pid) for pid, _ in named] == [pid for pid, _ in named], "each in a session of its own"


def test_logs_of_a_second_start_come_after_those_of_the_first(bench: Bench) -> None:
    assert outcome(bench.start("print('one')")) == 0
    assert outcome(bench.start("print('two')")) == 0
    assert bench.log(0) == "one\ntwo\n"


def test_one_failure_ends_the_others_and_is_named(bench: Bench) -> None:
    runner = bench.start(SLEEP, "print('\\n'.join(map(str, range(30)))); sys.exit(3)", SLEEP)
    assert outcome(runner) == 3
    expected = Failure(1, os.uname().nodename, 3, "exit code 3", [str(number) for number in range(10, 30)])
    assert bench.failure(runner) == expected
    assert [rank.returncode for rank in runner._ranks._ranks.values()] == [-15, 3, -15]


def test_a_traceback_is_the_last_words_of_a_rank(bench: Bench) -> None:
    runner = bench.start("raise ValueError('no such file')")
    assert outcome(runner) == 1
    failure = bench.failure(runner)
    assert failure is not None
    assert failure.last_lines[-1] == "ValueError: no such file"


def test_a_killed_rank_is_named_with_its_signal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_SAY_S", 0.3)
    runner = bench.start(SLEEP, "os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome(runner) == 137
    failure = bench.failure(runner)
    assert failure is not None
    assert (failure.rank, failure.how) == (1, "killed by SIGKILL (out of memory?)")


def test_of_two_failures_seen_together_the_signal_is_the_cause(bench: Bench) -> None:
    runner = bench.start("sys.exit(1)", "os.kill(os.getpid(), signal.SIGSEGV)", "sys.exit(2)")
    for rank in runner._ranks._ranks.values():
        rank.wait()
    assert runner.poll() == 139
    failure = bench.failure(runner)
    assert failure is not None
    assert (failure.rank, failure.how) == (1, "killed by SIGSEGV")


# How the ranks end -> the exit code of all together.
MIXES = {
    "all saved": ((75, 75), CHECKPOINTED),
    "one saved, one was done already": ((0, 75), CHECKPOINTED),
    "one saved, one failed": ((75, 3), 3),
    "one failed, one was done": ((4, 0), 4),
    "an exit code above all signals": ((200, 0), 200),
}


@pytest.mark.parametrize(("codes", "expected"), MIXES.values(), ids=MIXES)
def test_the_exit_code_of_all_ranks_together(codes: tuple[int, ...], expected: int, bench: Bench) -> None:
    runner = bench.start(*(f"sys.exit({code})" for code in codes))
    assert outcome(runner) == expected
    assert (bench.failure(runner) is None) == (expected in {0, CHECKPOINTED})


def test_a_rank_that_saves_after_another_one_failed_does_not_hide_the_failure(bench: Bench) -> None:
    saves = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open('ready', 'w'); time.sleep(60)"
    runner = bench.start(saves, "[time.sleep(0.01) for _ in iter(lambda: os.path.exists('ready'), True)]; sys.exit(9)")
    assert outcome(runner) == 9
    assert [rank.returncode for rank in runner._ranks._ranks.values()] == [75, 9]


def test_a_rank_that_ignores_the_end_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_SAY_S", 0.3)
    monkeypatch.setattr(local, "_PATIENCE_S", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open('ready', 'w'); time.sleep(60)"
    runner = bench.start(deaf, "[time.sleep(0.01) for _ in iter(lambda: os.path.exists('ready'), True)]; sys.exit(3)")
    assert outcome(runner) == 3
    assert [rank.returncode for rank in runner._ranks._ranks.values()] == [-9, 3]
    failure = bench.failure(runner)
    assert failure is not None
    assert failure.rank == 1


def test_ranks_that_are_told_to_end_end(bench: Bench) -> None:
    runner = bench.start(SLEEP, SLEEP)
    runner.terminate()
    runner.terminate()
    assert outcome(runner) == 143
    assert bench.failure(runner) is None, "nobody failed"


def test_ranks_hear_signals_though_their_starter_blocks_them(bench: Bench) -> None:
    text = "import signal, sys; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    starter = f"""
import os, signal, sys, time
from pathlib import Path
from hpc_ds.launch.local import LocalRunner
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM, signal.SIGCHLD}})
runner = LocalRunner([sys.executable, "-c", {text!r}], os.environ, 1, Path({str(bench.logs)!r}), Path("step.json"))
runner.start()
while runner.poll() is None:
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", starter], check=True, timeout=30)
    assert bench.log(0) == "[]\n"


def test_ranks_die_with_their_starter(bench: Bench) -> None:
    starter = f"""
import os, sys
from pathlib import Path
from hpc_ds.launch.local import LocalRunner
command = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]
LocalRunner(command, os.environ, 2, Path({str(bench.logs)!r}), Path("step.json")).start()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", starter], check=False, timeout=30)
    ranks = json.loads(bench.step_file.read_text())["ranks"]
    deadline = time.monotonic() + 20
    while any(process.is_alive(pid, started) for pid, started in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_is_not_there_is_an_oserror_for_the_supervisor(tmp_path: Path) -> None:
    runner = LocalRunner(["no-such-program"], os.environ, 2, tmp_path / "logs", tmp_path / "step.json")
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        runner.start()


WORDS = {
    0: "exit code 0",
    1: "exit code 1",
    128: "exit code 128",
    134: "killed by SIGABRT",
    137: "killed by SIGKILL (out of memory?)",
    139: "killed by SIGSEGV",
    143: "killed by SIGTERM",
    255: "exit code 255",
}


@pytest.mark.parametrize(("code", "words"), WORDS.items())
def test_an_exit_code_in_words(code: int, words: str) -> None:
    assert in_words(code) == words


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == []
    log.write_bytes(b"")
    assert last_lines(log) == []
    log.write_bytes(b"a\nb \xff\nc")
    assert last_lines(log) == ["a", "b \ufffd", "c"]
    log.write_bytes(b"".join(b"%d\n" % number for number in range(100_000)))
    assert last_lines(log) == [str(number) for number in range(99_980, 100_000)]
    log.write_bytes(b"x" * 100_000)
    assert last_lines(log) == ["x" * 16_384]
