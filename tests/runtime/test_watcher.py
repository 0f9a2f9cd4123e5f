"""The watcher speaks for a rank: real processes that wait, poll, stop, fork and end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.run_dir import RunDir, write_json
from hpc_ds.runtime import watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_S = 180.0
END = "end of the stacks\n\n"

PRELUDE = """
import os, signal, sys, threading, time
from pathlib import Path
from hpc_ds.runtime import preemption, watcher
from hpc_ds.runtime.progress import mark, progress
watcher.BEAT_EVERY_S = 0.1
go = Path(os.environ['GO'])
def wait_for_go():
    while not go.exists():
        time.sleep(0.01)
"""


@dataclass
class Ranks:
    """Processes of one run, as its supervisor sees them."""

    run: RunDir
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, program: str, rank: int = 0, world_size: int = 1, **env: str) -> None:
        environ = {
            **os.environ, "HPCDS_RUN_DIR": str(self.run.root), "HPCDS_ATTEMPT": "1", "GO": str(self.run.root / "go"),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", **env,
        }  # fmt: skip
        argv, pipe = [sys.executable, "-c", PRELUDE + program], subprocess.PIPE
        self.processes.append(subprocess.Popen(argv, env=environ, stdout=pipe, stderr=pipe, text=True))

    def beat(self, rank: int = 0) -> dict[str, Any]:
        """The newest one; empty before the first."""
        path = self.run.beats(1) / f"rank-{rank}.json"
        while path.exists():
            with contextlib.suppress(ValueError):  # half of one
                beat: dict[str, Any] = json.loads(path.read_text().partition("\n")[0])
                return beat
        return {}

    def stacks(self, rank: int = 0) -> str:
        path = self.run.stacks(1) / f"rank-{rank}.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            ended = [each for each in self.processes if each.poll() is not None]
            if time.monotonic() > deadline or ended:
                words = [each.communicate() for each in ended]
                beats = [self.beat(rank) for rank in range(len(self.processes))]
                raise AssertionError(f"{what}: not seen; ended: {words}; beats: {beats}")
            time.sleep(0.02)

    def go(self) -> None:
        (self.run.root / "go").touch()

    def end(self) -> list[tuple[int, str, str]]:
        """Exit status, words and complaints of each."""
        words = [process.communicate(timeout=PATIENCE_S) for process in self.processes]
        return [(each.returncode, *said) for each, said in zip(self.processes, words, strict=True)]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    with ranks_in(tmp_path) as started:
        yield started


@contextlib.contextmanager
def ranks_in(folder: Path) -> Iterator[Ranks]:
    run = RunDir(folder / "run")
    run.rendezvous.mkdir(parents=True)
    write_json(run.config, {})
    started = Ranks(run)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.communicate()


# two ranks, one of which waits for the other in a collective


MEET = """
import torch, torch.distributed as dist
import hpc_ds
me = hpc_ds.init_distributed(verbose=False)
def meet():
    dist.all_reduce(torch.ones(1))
if me.rank == 1:
    wait_for_go()
meet()
print(hpc_ds.preemption.requested(), preemption.told_by(), flush=True)
raise hpc_ds.Preempted
"""


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen of a rank that waits in a collective for one that polls."""
    with ranks_in(tmp_path_factory.mktemp("meet")) as ranks:
        return told_of(ranks)


def told_of(ranks: Ranks) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for rank in (0, 1):
        ranks.start(MEET, rank, 2)
    blocked, polling = ranks.processes

    def waits() -> bool:
        here, there = ranks.beat(0), ranks.beat(1)
        still = here.get("still_s", 0) >= 3 and there.get("still_s", 9) < 1
        return still and here["where"].endswith(" meet") and there["where"].endswith(" wait_for_go")

    ranks.wait_for(waits, "one rank still, the other one not")
    seen["quiet"] = ranks.beat(0), ranks.beat(1)

    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM):
        blocked.send_signal(number)
    ranks.wait_for(lambda: ranks.beat(0)["told"], "the signal")
    blocked.send_signal(signal.SIGUSR2)
    count = ranks.beat(0)["count"]
    ranks.wait_for(lambda: ranks.beat(0)["count"] > count + 3, "more beats")
    seen["told"] = ranks.beat(0), ranks.beat(1)

    ranks.run.dump_request(1).touch()
    ranks.wait_for(lambda: all(ranks.stacks(rank).endswith(END) for rank in (0, 1)), "the stacks")
    seen["stacks"] = ranks.stacks(0), ranks.stacks(1)

    polling.send_signal(signal.SIGSTOP)
    ranks.wait_for(lambda: state_of(polling.pid) == "T", "the rank that stands")
    here, there = ranks.beat(0)["count"], ranks.beat(1)["count"]
    ranks.wait_for(lambda: ranks.beat(0)["count"] > here + 3, "beats of the other one")
    seen["stopped"] = there, ranks.beat(1)["count"]
    polling.send_signal(signal.SIGCONT)
    ranks.wait_for(lambda: ranks.beat(1)["count"] > there, "its beats again")

    ranks.go()
    seen["ends"] = ranks.end()
    seen["last"] = ranks.beat(0), ranks.beat(1)
    seen["stacks at last"] = ranks.stacks(0), ranks.stacks(1)
    return seen


@pytest.mark.ranks
def test_a_rank_that_waits_stands_still_and_one_that_polls_does_not(story: dict[str, Any]) -> None:
    blocked, polling = story["quiet"]
    assert set(blocked) == {
        "rank", "host", "pid", "count", "step", "phase", "idle_s", "still_s", "told", "where",
    }  # fmt: skip
    assert (blocked["rank"], blocked["phase"], blocked["step"], blocked["told"]) == (0, "starting", None, None)
    assert (polling["rank"], polling["where"].split(" ")[1]) == (1, "wait_for_go")
    assert blocked["still_s"] <= blocked["idle_s"]


@pytest.mark.ranks
def test_a_signal_is_heard_while_the_rank_waits_in_a_collective(story: dict[str, Any]) -> None:
    blocked, polling = story["told"]
    assert (blocked["told"], polling["told"]) == ("SIGTERM", None)
    assert blocked["where"].endswith(" meet")
    assert blocked["still_s"] >= 3


@pytest.mark.ranks
def test_the_stacks_name_what_each_rank_waits_for(story: dict[str, Any]) -> None:
    blocked, polling = story["stacks"]
    assert "in all_reduce\n" in blocked
    assert "in meet\n" in blocked
    assert "in wait_for_go\n" in polling
    for rank, text in enumerate((blocked, polling)):
        assert text.startswith(f"rank {rank} on {os.uname().nodename}, pid ")
        assert "asked for by the supervisor" in text
    assert story["stacks at last"] == story["stacks"], "they are asked for once"


@pytest.mark.ranks
def test_a_rank_that_is_stopped_gives_no_signs_of_life(story: dict[str, Any]) -> None:
    before, after = story["stopped"]
    assert before == after


@pytest.mark.ranks
def test_one_signalled_rank_is_enough_and_all_know_it_in_the_same_call(story: dict[str, Any]) -> None:
    (first, said_first, _), (second, said_second, _) = story["ends"]
    assert (first, second) == (75, 75)
    assert (said_first, said_second) == ("True SIGTERM\n", "True another rank\n")
    assert [beat["phase"] for beat in story["last"]] == ["stopping", "stopping"]


# one process, without torch


def test_a_beat_is_one_line_of_fixed_size_in_place(ranks: Ranks) -> None:
    ranks.start("preemption.attend(0, 1); progress.step = 7; mark('mine'); wait_for_go()")
    ranks.wait_for(lambda: ranks.beat().get("count", 0) > 3, "beats")
    path = ranks.run.beats(1) / "rank-0.json"
    number = path.stat().st_ino
    assert path.stat().st_size == watcher.BEAT_BYTES
    assert (ranks.beat()["step"], ranks.beat()["phase"]) == (7, "mine")
    assert (ranks.beat()["pid"], ranks.beat()["host"]) == (ranks.processes[0].pid, os.uname().nodename)
    count = ranks.beat()["count"]
    ranks.wait_for(lambda: ranks.beat()["count"] > count, "one more")
    assert path.stat().st_ino == number
    ranks.go()
    assert ranks.end() == [(0, "", "")]


def test_a_name_in_any_letters_leaves_a_whole_line(ranks: Ranks) -> None:
    name = "ж" * 200
    ranks.start(f"def {name}():\n    wait_for_go()\npreemption.attend(0, 1)\n{name}()")
    ranks.wait_for(lambda: ranks.beat().get("count", 0) > 3, "beats")
    assert (ranks.run.beats(1) / "rank-0.json").stat().st_size == watcher.BEAT_BYTES


# How a program ends -> its exit status, and the phase of its last beat.
ENDS = {
    "at its end": ("pass", 0, "finished"),
    "by exit": ("sys.exit(0)", 0, "finished"),
    "by an error": ("1 / 0", 1, "mine"),
    "by a stop": ("os.kill(os.getpid(), signal.SIGTERM); preemption.requested(); raise preemption.Preempted", 75, "stopping"),
    "in a child first": ("if os.fork() == 0: sys.exit(0)\nos.wait(); os._exit(0)", 0, "mine"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "code", "phase"), ENDS.values(), ids=ENDS)
def test_the_last_beat_tells_how_a_rank_ended(program: str, code: int, phase: str, ranks: Ranks) -> None:
    ranks.start(f"preemption.listen(); preemption.attend(0, 1); mark('mine'); wait_for_go()\n{program}")
    ranks.wait_for(lambda: ranks.beat().get("phase") == "mine", "a beat")
    ranks.go()
    assert ranks.end()[0][0] == code
    assert ranks.beat()["phase"] == phase


def test_no_beats_outside_of_a_run(tmp_path: Path) -> None:
    program = "import threading; from hpc_ds import preemption; preemption.requested(); print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "1\n"


def test_a_folder_that_cannot_be_written_costs_the_beats_and_nothing_else(ranks: Ranks) -> None:
    ranks.run.logs.touch()
    ranks.start("""
preemption.listen()
preemption.attend(0, 1)
os.kill(os.getpid(), signal.SIGTERM)
print(preemption.requested(), preemption._watcher._thread.is_alive())
""")
    assert ranks.end() == [(0, "True True\n", "")]


def test_a_place_that_is_taken_is_left_to_who_has_it(ranks: Ranks) -> None:
    """asyncio has a descriptor of its own for signals; then they are heard where Python runs handlers."""
    ranks.start("""
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
preemption.listen()
preemption.attend(0, 1)
os.kill(os.getpid(), signal.SIGUSR2)
print(os.read(reader, 1)[0] == signal.SIGUSR2, preemption.requested())
wait_for_go()
print(signal.set_wakeup_fd(-1) == writer)
""")
    ranks.wait_for(lambda: ranks.beat().get("told") == "SIGUSR2", "the signal in a beat")
    ranks.go()
    assert ranks.end() == [(0, "True True\nTrue\n", "")]


def test_a_place_that_asyncio_takes_later_costs_no_signal(ranks: Ranks) -> None:
    ranks.start("""
import asyncio
preemption.listen()
preemption.attend(0, 1)
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGALRM, print, 'alarm')
    os.kill(os.getpid(), signal.SIGALRM)
    os.kill(os.getpid(), signal.SIGUSR2)
    while not preemption.told_to_stop():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    print('told')
asyncio.run(main())
""")
    assert ranks.end() == [(0, "alarm\ntold\n", "")]


def test_a_signal_that_the_script_handles_itself_is_its_own(ranks: Ranks) -> None:
    ranks.start("""
preemption.listen()
preemption.attend(0, 1)
signal.signal(signal.SIGTERM, lambda *_: print('of the script'))
os.kill(os.getpid(), signal.SIGTERM)
print(preemption.told_to_stop())
os.kill(os.getpid(), signal.SIGUSR2)
print(preemption.told_to_stop(), preemption.told_by())
""")
    assert ranks.end() == [(0, "of the script\nFalse\nTrue SIGUSR2\n", "")]


def test_a_deadline_is_seen_by_the_watcher(ranks: Ranks) -> None:
    (ranks.run.root / "deadline").write_text("0 99999999999\n")
    ranks.start(
        "preemption.listen(); preemption.attend(0, 1); wait_for_go()", HPCDS_DEADLINE=str(ranks.run.root / "deadline")
    )
    ranks.wait_for(lambda: ranks.beat().get("told") == "deadline", "the deadline")
    ranks.go()
    assert ranks.end()[0][0] == 0


NEAR = """
preemption.listen()
preemption.attend(0, 1)
def in_a_long_step():
    wait_for_go()
in_a_long_step()
"""


def test_where_the_end_is_near_and_no_boundary_was_reached_the_stacks_say_why(ranks: Ranks) -> None:
    (ranks.run.root / "deadline").write_text(f"0 {time.time() + 1000} final\n")
    ranks.start(NEAR, HPCDS_DEADLINE=str(ranks.run.root / "deadline"))
    ranks.wait_for(lambda: ranks.beat().get("where", "").endswith(" wait_for_go"), "the long step")
    (ranks.run.root / "deadline").write_text(f"0 {time.time() + 3} final\n")
    ranks.wait_for(lambda: ranks.stacks().endswith(END), "the stacks")
    assert "told to stop by deadline, and the end is near" in ranks.stacks()
    assert "in in_a_long_step\n" in ranks.stacks()
    count = ranks.beat()["count"]
    ranks.wait_for(lambda: ranks.beat()["count"] > count + 20, "more beats")
    assert ranks.stacks().count("the end is near") == 1
    ranks.run.dump_request(1).touch()
    ranks.wait_for(lambda: "asked for by the supervisor" in ranks.stacks(), "the stacks that were asked for, too")


def test_a_rank_that_has_come_to_a_boundary_needs_no_reason(ranks: Ranks) -> None:
    (ranks.run.root / "deadline").write_text(f"0 {time.time() + 1000} final\n")
    program = NEAR.replace(
        "\nin_a_long_step()\n", "\nwhile not preemption.requested():\n    time.sleep(0.01)\nwait_for_go()\n"
    )
    ranks.start(program, HPCDS_DEADLINE=str(ranks.run.root / "deadline"))
    ranks.wait_for(lambda: ranks.beat().get("phase") == "stopping", "the boundary")
    (ranks.run.root / "deadline").write_text(f"0 {time.time() + 3} final\n")
    count = ranks.beat()["count"]
    ranks.wait_for(lambda: ranks.beat()["count"] > count + 20, "more beats")
    assert ranks.stacks() == ""


@pytest.mark.parametrize(("world_size", "seconds"), [(1, 2.0), (100, 2.0), (500, 10.0), (1500, 30.0), (100_000, 30.0)])
def test_many_ranks_give_signs_of_life_less_often(world_size: int, seconds: float, tmp_path: Path) -> None:
    from hpc_ds.runtime.request import Request

    assert watcher.Watcher(RunDir(tmp_path), 1, 0, world_size, Request())._every_s == seconds
