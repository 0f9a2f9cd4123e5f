"""A save behind the training: what is written is the state at its start, and it is whole on all ranks or on none."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from toys import content, load, names, said, save

from hpc_ds.checkpoint import background, blocks, reader, writer
from hpc_ds.checkpoint.background import Background
from hpc_ds.checkpoint.shards import own_share

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
COPY = 37 * 1024 * 1024 + 4096  # bytes; a size that no other piece of memory has


@contextlib.contextmanager
def held_back(rank: int) -> Iterator[threading.Event]:
    """The writes of one rank wait until the event is set."""
    go, original = threading.Event(), blocks.os.pwrite

    def later(descriptor: int, data: memoryview, offset: int) -> int:
        go.wait()
        return original(descriptor, data, offset)

    if dist.get_rank() == rank:
        blocks.os.pwrite = later
    try:
        yield go
    finally:
        go.set()
        blocks.os.pwrite = original


def behind(rank: int, folder: Path) -> dict[str, Any]:
    """Shards are changed as soon as the start returns, while nothing is written yet."""
    saves = Background()
    idle = saves.poll(), saves.progress(), saves.tag, saves.wait()
    ours = content(1)
    with held_back(1) as go:
        saves.start(folder, "step1", ours)
        for shard in ours.shards:
            shard.data.fill_(-5)
        during = saves.tag, load(folder), [name for name in names(folder) if not name.startswith(".")]
        running = saves.poll() if rank == 1 else "running"
        go.set()
        path = saves.wait()
    return {"idle": idle, "during": during, "running": running, "path": path, "after": [load(folder), names(folder)]}


def test_what_is_saved_is_the_state_at_the_start(pair: Outcomes, folder: Path) -> None:
    for rank in pair["behind"]:
        assert rank["idle"] == ("idle", None, None, None)
        assert rank["during"] == ("step1", None, [])
        assert rank["running"] == "running"
        assert rank["path"] == folder / "behind" / "step1"
        assert rank["after"] == [("step1", 1), ["latest", "step1"]]


def in_a_row(rank: int, folder: Path) -> dict[str, Any]:
    """Saves of changing sizes, each begun before the one before was waited for, and synchronous ones between."""
    saves, found = Background(), []
    for step in (1, 2, 3):
        more = own_share("model.more", torch.full((step * 10_000,), float(step)), rank, WORLD_SIZE)
        saves.start(folder, f"step{step}", content(step, shards=[*content(step).shards, more]))
        visible = {name for name in names(folder) if name.startswith("step")}
        found.append({f"step{before}" for before in range(1, step)} <= visible)
    save(folder, 4)
    saves.wait()
    return {"never two at once": found, "last": load(folder, "step3"), "latest": (folder / "latest").read_text()}


def test_a_save_waits_for_the_one_before(pair: Outcomes) -> None:
    for rank in pair["in_a_row"]:
        assert rank["never two at once"] == [True, True, True]
        assert rank["last"] == ("step3", 3)
        assert rank["latest"] in {"step3", "step4"}  # whichever came last


@contextlib.contextmanager
def no_files_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(rank: int, folder: Path, who: int) -> dict[str, Any]:
    """One rank cannot write its part: everybody learns it when they wait, and can save again."""
    save(folder, 1)
    saves = Background()
    big = own_share("model.much", torch.zeros(1 << 20, dtype=torch.uint8), rank, WORLD_SIZE)
    with no_files_larger_than(1 << 17) if rank == who else contextlib.nullcontext():
        saves.start(folder, "step2", content(2, shards=[big]))
        error = said(saves.wait)
    dist.barrier()
    after = [saves.poll(), names(folder), load(folder)]
    saves.start(folder, "step3", content(3))
    saves.wait()
    return {"error": error, "after": after, "next": [load(folder), names(folder)]}


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_fails_fails_the_save_on_all(pair: Outcomes, folder: Path, who: int) -> None:
    first, second = pair[f"failing {who}"]
    assert first == second
    path = str(folder / f"failing {who}" / "step2")
    assert first["error"] == f"checkpoint {path!r}: not saved: rank {who}: File too large"
    assert first["after"] == ["idle", ["latest", "step1"], ("step1", 1)]
    assert first["next"] == [("step3", 3), ["latest", "step1", "step3"]]


def failing_late(rank: int, folder: Path) -> dict[str, Any]:
    """The commit fails, on rank 0 alone; a start that is refused; the next one works."""
    save(folder, 1)
    saves = Background()
    original = background.commit.publish

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    background.commit.publish = refuse
    try:
        saves.start(folder, "step2", content(2))
        error = said(lambda: saves.start(folder, "step3", content(3)))
    finally:
        background.commit.publish = original
    unfit = said(lambda: saves.start(folder, "step3", content(3, rank_state={"it": object()} if rank == 1 else {})))
    dist.barrier()
    found = {"error": error, "unfit": unfit, "after": [saves.poll(), names(folder)]}
    dist.barrier()  # the other has looked too
    saves.start(folder, "step3", content(3))
    return {**found, "path": saves.wait(), "next": load(folder)}


def test_a_commit_that_fails_is_told_to_all(pair: Outcomes, folder: Path) -> None:
    first, second = pair["failing_late"]
    assert first == second
    assert first["error"].endswith("step2': not saved: rank 0: No space left on device")
    assert "step3': not saved: rank 1: rank_state['it']: a object cannot be stored" in first["unfit"]
    assert first["after"] == ["idle", ["latest", "step1"]]
    assert first["path"] == folder / "failing_late" / "step3"
    assert first["next"] == ("step3", 3)


def no_room_for_a_copy(rank: int, folder: Path) -> dict[str, Any]:
    saves = Background()
    if rank == 1:
        saves._arena.snapshot = refuse_memory  # type: ignore[method-assign]
    error = said(lambda: saves.start(folder, "step1", content(1)))
    dist.barrier()
    return {"error": error, "names": names(folder), "poll": saves.poll()}


def refuse_memory(_placed: Any) -> None:
    raise MemoryError("no memory for a copy")


def test_a_copy_that_does_not_fit_is_refused_on_all_ranks(pair: Outcomes) -> None:
    for rank in pair["no_room_for_a_copy"]:
        assert rank["error"].endswith("step1': not saved: rank 1: no memory for a copy")
        assert (rank["names"], rank["poll"]) == ([], "idle")


def lost(rank: int, folder: Path) -> str:
    """A rank that leaves neither index nor word: rank 0 does not wait for ever."""
    saves = Background(patience_s=0.3)
    if rank == 1:
        writer.begin(folder, "step1", content(1))  # the one collective of start, and then silence
        dist.barrier()
        return ""
    saves.start(folder, "step1", content(1))
    save_of_rank_0 = saves._save
    assert save_of_rank_0 is not None
    text = said(save_of_rank_0.whole)
    assert names(folder) == []
    dist.barrier()
    return text


def test_a_rank_that_says_nothing_is_given_up(pair: Outcomes) -> None:
    assert pair["lost"] == ["rank 1 did not write its part; has it ended?", ""]


def forked(rank: int, folder: Path) -> dict[str, Any]:
    """A data-loader worker is forked in the middle of a save: it lives on its own, and does not get the copy's memory."""
    saves = Background()
    big = own_share("model.much", torch.zeros(2 * COPY, dtype=torch.uint8), rank, WORLD_SIZE)
    with held_back(rank) as go:
        saves.start(folder, "step1", content(1, shards=[big], client_state=None, rank_state=None))
        mine = copies()
        child = os.fork()  # as data loaders do it: without exec
        if child == 0:
            look_around()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        go.set()
        saves.wait()
    found = reader.find(folder)
    return {"mine": mine, "code": code, "saved": found is not None and found.step}


def look_around() -> None:
    """In the child: threads, locks and files work, and the parent's copy is not there."""
    done = threading.Event()
    thread = threading.Thread(target=done.set)
    thread.start()
    thread.join(30)
    os._exit((0 if done.is_set() else 64) + copies())


def copies() -> int:
    """How many pieces of memory of this process have the size of the copy."""
    sizes = [line.split()[1] for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("Size:")]
    return sizes.count(str(COPY // 1024))


def test_a_child_forked_during_a_save_is_free_of_it(pair: Outcomes) -> None:
    for rank in pair["forked"]:
        assert rank == {"mine": 1, "code": 0, "saved": 1}


def progress(rank: int, folder: Path) -> dict[str, Any]:
    saves = Background()
    with held_back(rank) as go:
        saves.start(folder, "step1", content(1))
        before = saves.progress()
        go.set()
        saves._save._thread.join()  # type: ignore[union-attr]
        after, state = saves.progress(), saves.poll()
    saves.wait()
    assert before is not None
    assert after is not None
    return {
        "before": (before.written_bytes, before.remaining_s),
        "after": (after.written_bytes == after.total_bytes > 0, after.remaining_s, after.seconds > 0),
        "state": state,
    }


def test_progress_tells_when_it_will_be_durable(pair: Outcomes) -> None:
    for rank in pair["progress"]:
        assert rank == {"before": (0, None), "after": (True, 0.0, True), "state": "done"}
    half = background.Progress(written_bytes=10, total_bytes=40, seconds=2.0)
    assert half.remaining_s == 6.0


def reserved(rank: int, folder: Path) -> list[bool]:
    """Memory got beforehand is what the copy uses, when it is enough; when it is not, more is got."""
    saves, found = Background(), []
    big = own_share("model.much", torch.zeros(9 << 20, dtype=torch.uint8), rank, WORLD_SIZE)
    saves.reserve([big])
    for shards in ([], [big, *content(1).shards]):
        if saves._arena._reserving is not None:
            saves._arena._reserving.join()
        before = saves._arena._memory
        saves.start(folder, "step1", content(1, shards=shards or content(1).shards))
        found.append(saves._arena._memory is before)
        saves.wait()
    return found


def test_memory_can_be_reserved(pair: Outcomes) -> None:
    assert pair["reserved"] == [[True, False]] * WORLD_SIZE


def small_memory(rank: int, folder: Path) -> list[int]:
    """The copy takes as many bytes as the rank's shard, to the next page, and is kept."""
    saves, sizes = Background(), []
    for _ in range(2):
        big = own_share("model.much", torch.zeros(9 << 20, dtype=torch.uint8), rank, WORLD_SIZE)
        saves.start(folder, "step1", content(1, shards=[big], client_state=None, rank_state=None))
        sizes.append(saves.held_bytes)
        saves.wait()
    return sizes


def test_the_copy_is_no_larger_than_the_shard(pair: Outcomes) -> None:
    for rank in pair["small_memory"]:
        assert rank == [9 << 19, 9 << 19]


def begin_and_leave(folder: str) -> None:
    """A program that ends right after it has begun to save, with slow writes still to come."""
    original = blocks.os.pwrite

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.3)
        return original(descriptor, data, offset)

    blocks.os.pwrite = slow
    Background().start(Path(folder), "step7", content(7))


def test_a_program_that_ends_finishes_its_save(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=begin_and_leave, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert load(tmp_path) == ("step7", 7)
    assert names(tmp_path) == ["latest", "step7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("background")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    """What two ranks did in all cases, each in a folder of its own."""
    alone = (behind, in_a_row, failing_late, no_room_for_a_copy, lost, forked, progress, reserved, small_memory)
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in alone}
    for who in (0, 1):
        cases[f"failing {who}"] = (failing, (who,))
    for name in cases:
        (folder / name).mkdir()
    return run_cases(WORLD_SIZE, {name: (do, (folder / name, *args)) for name, (do, args) in cases.items()})
