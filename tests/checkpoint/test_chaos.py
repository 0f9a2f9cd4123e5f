"""Whatever is killed at whatever moment of a save: what was said to be saved loads, bit for bit, and never a mix.

Two ranks save again and again into one folder. In each save one of them is killed on a chosen boundary between two calls
to the operating system, or at a random instant, alone or with the other one, while one of them is slow, or the disk is
nearly full. After each save the folder is loaded. ``HPCDS_LONG=1`` (``make test-long``) runs hundreds of saves more.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from datetime import timedelta
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from faults import Fault, Faults
from ranks import FOR_EVERY_RANK, PRELOADED
from toys import NO_MOUNT, content, load, mount_small, names, save, unmount

from hpc_ds.checkpoint import commit, retention, verify, writer
from hpc_ds.checkpoint.background import Background
from hpc_ds.checkpoint.retention import Keep
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.ranks

LONG = os.environ.get("HPCDS_LONG") == "1"
NO_FAULT = Fault()
PATIENCE_S = 60.0
TAGS = ("step{step}", "same")  # a new checkpoint, or one in place of another


def be_rank(
    rank: int,
    world_size: int,
    folder: Path,
    notes: Path,
    step: int,
    tag: str,
    mode: str,
    fault: Fault,
    patience_s: float,
) -> None:
    """Save once. Leaves a note when the save was said to be done, or refused."""
    torch.set_num_threads(1)
    os.environ.update(FOR_EVERY_RANK)
    commit._UNSIGNED_S = 0.0  # type: ignore[misc]
    if world_size > 1:
        store = dist.FileStore(str(notes / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    faults = Faults(folder, notes, rank, fault)
    faults.arm()
    try:
        if mode == "sync":
            writer.save(folder, tag, content(step))
        else:
            saves = Background(patience_s, patience_s)
            saves.start(folder, tag, content(step))
            saves.wait()
        word = "saved"
    except CheckpointError as error:
        word = f"refused: {error}"
    except RuntimeError:  # gloo's, when a peer is gone
        word = "alone"
    faults.disarm()
    (notes / f"{rank}.word").write_text(word)
    if dist.is_initialized() and word != "alone":
        dist.barrier()
    os._exit(0) if word != "alone" or mode == "sync" else None  # else leave as a program does: threads are waited for


class Chaos:
    """A folder, and the checkpoints that were promised to be in it.

    Attributes:
        killed: the points at which a rank was killed: (rank, label).
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._root = root
        self._step = 0
        self.promised = 0
        self.killed: set[tuple[int, str]] = set()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, "hpc_ds.checkpoint.background", "hpc_ds.checkpoint.reader"])
        self._context = context

    def save(self, world_size: int, mode: str, faults: dict[int, Fault], tag: str = TAGS[0]) -> list[list[str]]:
        """One save under faults, and the look at the folder after it; returns the points each rank passed."""
        self._step += 1
        notes = self._root / f"notes-{self._step}"
        notes.mkdir()
        ranks = [
            self._context.Process(
                target=be_rank,
                args=(
                    rank, world_size, self.folder, notes, self._step, tag.format(step=self._step), mode,
                    faults.get(rank, NO_FAULT), 0.5 if faults else PATIENCE_S,
                ),
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for process in ranks:
            process.start()
        _wait_for_all(ranks)
        words = [_read(notes / f"{rank}.word") for rank in range(world_size)]
        points = [_read(notes / f"{rank}.points").splitlines() for rank in range(world_size)]
        for rank in range(world_size):
            if label := _read(notes / f"{rank}.killed").strip():
                self.killed.add((rank, label))
        assert [p.exitcode for p in ranks if p.exitcode not in {0, 1, -9}] == [], words
        self._check(words, killed=any((notes / f"{rank}.killed").exists() for rank in range(world_size)))
        shutil.rmtree(notes)
        return points

    def _check(self, words: list[str], *, killed: bool) -> None:
        if not killed:
            refusals = {word for word in words if word.startswith("refused")}
            assert len(set(words)) == 1 or not refusals, words  # the same error everywhere
            assert words[0] == "saved" or refusals, words
        if "saved" in words:
            self.promised = self._step
        found = load(self.folder)
        assert found is not None or self.promised == 0, words
        if found is not None:
            assert self.promised <= found[1] <= self._step, (found, self.promised, words)
        for path in sorted(self.folder.iterdir()):
            if not path.name.startswith(".") and path.is_dir():
                assert verify.damages(verify.open_whole(path)) == [], path

    def settle(self) -> None:
        """A save that nobody disturbs: it works, and nothing of the dead ones is left."""
        self._step += 1
        save(self.folder, self._step)
        self.promised = self._step
        assert load(self.folder) == (f"step{self._step}", self._step)
        retention.prune(self.folder, Keep(2))
        assert [name for name in names(self.folder) if name.startswith(".")] == []


def _wait_for_all(ranks: list[Any]) -> None:
    """Wait; a rank that survives the others has some time to notice."""
    deadline = time.monotonic() + PATIENCE_S
    alive = list(ranks)
    while alive and time.monotonic() < deadline:
        wait([process.sentinel for process in alive], timeout=deadline - time.monotonic())
        alive = [process for process in alive if process.is_alive()]
    for process in alive:
        process.kill()
    for process in ranks:
        process.join()
    assert alive == [], "a rank did not end"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture
def chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chaos:
    monkeypatch.setattr(commit, "_UNSIGNED_S", 0.0)
    (tmp_path / "saves").mkdir()
    return Chaos(tmp_path / "saves", tmp_path)


ROADS = [(1, "sync"), (1, "async"), (2, "sync"), (2, "async")]


@pytest.mark.parametrize(("world_size", "mode"), ROADS)
def test_killed_on_every_boundary_of_a_save(chaos: Chaos, world_size: int, mode: str) -> None:
    """Every point that a save passes is hit at least once, by each rank that passes it."""
    chaos.settle()
    first = chaos.save(world_size, mode, {}, TAGS[1])
    again = chaos.save(world_size, mode, {}, TAGS[1])  # in place of another: the longest road
    todo: list[tuple[int, str, int]] = []
    for rank in range(world_size):
        assert set(first[rank]) <= set(again[rank])
        seen: Counter[str] = Counter()
        for label in again[rank]:
            # What rank 0 does is the same whoever else there is.
            known = not LONG and (seen[label] > 0 or (world_size > 1 and rank == 0 and len(seen) % 3))
            if not known:
                todo.append((rank, label, seen[label]))
            seen[label] += 1
    assert len(todo) > 20
    for number, (rank, label, occurrence) in enumerate(todo):
        chaos.save(world_size, mode, {rank: Fault(label, occurrence, everybody=number % 2 == 1)}, TAGS[1])
        if number % 10 == 9:
            chaos.settle()
            chaos.save(world_size, mode, {}, TAGS[1])
    chaos.settle()
    assert {(rank, label) for rank, label, _ in todo} - chaos.killed == set()


def test_everything_is_flushed_before_the_next_step_relies_on_it(chaos: Chaos) -> None:
    """A killed process loses no write; a lost machine does. So here the order of the calls is looked at."""
    chaos.save(2, "sync", {}, TAGS[1])
    of_0, of_1 = chaos.save(2, "sync", {}, TAGS[1])
    for rank, points in enumerate((of_0, of_1)):
        assert in_order(
            points,
            f"pwrite .saving/rank-{rank}.safetensors",
            f"os.truncate .saving/rank-{rank}.safetensors",
            f"fsync .saving/rank-{rank}.safetensors",
            f"fsync .saving/.rank-{rank}.json",
            f"os.rename .saving/.rank-{rank}.json",
            "fsync .saving",
        )
    assert in_order(
        of_0,
        "os.rename .saving/.rank-0.json",
        "fsync .saving/.manifest.json",
        "os.rename .saving/.manifest.json",
        "fsync .saving",
        "fsync .latest",
        "os.rename TAG",
        "os.rename .saving",
        "fsync .",
        "os.rename .latest",
        "fsync .",
        "shutil.rmtree .removing",
    )
    last_write = max(place for place, label in enumerate(of_0) if label.startswith(("pwrite", "os.truncate")))
    assert last_write < of_0.index("fsync .saving/rank-0.safetensors")


def in_order(points: list[str], *wanted: str) -> bool:
    """Whether the wanted labels stand among the points in that order."""
    rest = iter(points)
    return all(label in rest for label in wanted)


def test_killed_at_random_instants_with_slow_ranks(chaos: Chaos) -> None:
    dice = random.Random(404)
    chaos.settle()
    for number in range(300 if LONG else 8):
        victim, mode = dice.randrange(2), dice.choice(["sync", "async"])
        slow = dice.randrange(2)
        faults = {
            rank: Fault(
                after_s=dice.uniform(0.001, 0.4) if rank == victim else None,
                everybody=dice.random() < 0.5,
                slow_s=dice.choice([0.0, 0.005, 0.02]) if rank == slow else 0.0,
            )
            for rank in range(2)
        }
        chaos.save(2, mode, faults, dice.choice(TAGS))
        if number % 8 == 7:
            chaos.settle()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount_small(folder, "1m"):
        pytest.skip(NO_MOUNT)
    yield folder
    unmount(folder)


def test_on_a_disk_that_is_nearly_full(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every number of free pages from none to enough; with and without a kill."""
    monkeypatch.setattr(commit, "_UNSIGNED_S", 0.0)
    chaos = Chaos(small_disk / "saves", tmp_path)
    chaos.folder.mkdir()
    chaos.settle()
    dice, filler = random.Random(405), small_disk / "filler"
    outcomes = set()
    for number, pages in enumerate(itertools.islice(itertools.cycle(range(20)), 120 if LONG else 10)):
        pages = (pages * 7) % 20 if not LONG else pages  # noqa: PLW2901 - a few, spread
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        with filler.open("wb") as file:
            file.write(bytes(max(0, free - pages * 4096)))
        before = chaos.promised
        faults = {dice.randrange(2): Fault(after_s=dice.uniform(0.001, 0.1))} if number % 3 == 2 else {}
        chaos.save(2, ("sync", "async")[number % 2], faults, dice.choice(TAGS))
        outcomes.add(chaos.promised > before)
        filler.unlink()
        chaos.settle()
    assert outcomes == {True, False}  # some went through, some did not
