"""Saves behind the training as an engine makes them: what they hold, what a failure or a request to stop makes of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from torch import nn
from toys import NO_MOUNT, mount_small, names, on_first, said, unmount

import hpc_ds
from hpc_ds.checkpoint import background, blocks
from hpc_ds.engine.save_cost import FINISH, FINISH_AND_SAVE, SAVE
from hpc_ds.runtime import preemption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


class Odd(nn.Module):
    """Odd shapes, a 0-dim parameter, dropout and a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(3, 37), nn.Linear(37, 1)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.gain * self.down(self.dropout(torch.tanh(self.up(x)))).square().mean()


class Counter:
    """State that rides along, and moves with every step."""

    def __init__(self) -> None:
        self.value = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def engine_for(stage: int = 2, **overrides: Any) -> Any:
    asked = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 50}},
        "zero_optimization": {"stage": stage},
        **overrides,
    }
    engine = hpc_ds.initialize(model=Odd(), training_data=torch.ones(100, 3), config=asked)[0]
    engine.register_state("counter", Counter())
    torch.manual_seed(100 + dist.get_rank())
    return engine


def train(engine: Any, until: int) -> None:
    while engine.global_steps < until:
        for batch in engine.training_dataloader:
            engine.backward(engine(batch))
            engine._checkpoints.registered["counter"].value += 1
            engine.step()
            if engine.global_steps >= until:
                break


@contextlib.contextmanager
def run_in(root: Path, **checkpoint: Any) -> Iterator[Path]:
    """This rank belongs to a run whose job asks for such saves; gives the folder that they go to."""
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(json.dumps({"checkpoint": checkpoint}))
    dist.barrier()
    os.environ.update(HPCDS_RUN_DIR=str(root), HPCDS_ATTEMPT="1", HPCDS_DEADLINE=str(root / "deadline"))
    try:
        yield Path(checkpoint.get("dir") or root / "checkpoints")
    finally:
        for name in ("HPCDS_RUN_DIR", "HPCDS_ATTEMPT", "HPCDS_DEADLINE"):
            del os.environ[name]
        preemption._request.by = None


def events(root: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def in_a_save() -> bool:
    return threading.current_thread().name.startswith("hpc_ds checkpoint")


@contextlib.contextmanager
def held(name: str, ranks: tuple[int, ...] = (0, 1), error: int = 0) -> Iterator[threading.Event]:
    """Calls of ``os.<name>`` by the threads of a save wait until the event is set; then they fail, where so asked."""
    go, original = threading.Event(), getattr(blocks.os, name)

    def later(*args: Any) -> Any:
        if in_a_save() and dist.get_rank() in ranks:
            go.wait()
            if error:
                raise OSError(error, os.strerror(error))
        return original(*args)

    setattr(blocks.os, name, later)
    try:
        yield go
    finally:
        go.set()
        setattr(blocks.os, name, original)


def before(thing: Any, name: str, do: Callable[[], Any]) -> None:
    """Let ``do`` run before each call of a method of this one object."""
    original = getattr(thing, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        do()
        return original(*args, **kwargs)

    setattr(thing, name, call)


# what is saved


def content_of(path: Path, rank: int) -> dict[str, Any]:
    """All that a checkpoint says of training, as far as it is this rank's."""
    manifest = json.loads((path / "manifest.json").read_text())
    index = json.loads((path / f"rank-{rank}.json").read_text())
    return {
        "tensors": hashlib.sha256((path / f"rank-{rank}.safetensors").read_bytes()).hexdigest(),
        "entries": index["entries"],
        "random": index["state"],
        "client": manifest["client_state"],
        "state": {key: value for key, value in manifest["state"].items() if key != "made_by"},
        "of": (manifest["step"], manifest["world_size"], manifest["stage"]),
    }


def bits(rank: int, stage: int, precision: str, root: Path) -> dict[str, Any]:
    """Nothing can be written until training has gone on by a step; beside it, the same training with a synchronous save."""
    with run_in(root, every_steps=2) as folder, held("pwrite") as go:
        engine = engine_for(stage, **PRECISIONS[precision])
        train(engine, 3)
        visible = [name for name in names(folder) if not name.startswith(".")]
        go.set()
        engine.wait_for_checkpoint()
    other = engine_for(stage, **PRECISIONS[precision])
    train(other, 2)
    other.save_checkpoint(root / "other")
    found, wanted = (content_of(path / "global_step2", rank) for path in (folder, root / "other"))
    same = {key: found[key] == wanted[key] for key in wanted}
    return {"visible": visible, "same": same, "of": found["of"], "names": names(folder)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_state_saved_is_that_of_the_step_at_which_the_save_began(
    pair: Outcomes, stage: int, precision: str
) -> None:
    for rank in pair[f"bits {stage} {precision}"]:
        assert rank["visible"] == []
        assert rank["same"] == dict.fromkeys(rank["same"], True)
        assert rank["of"] == (2, 2, stage)
        assert rank["names"] == ["global_step2", "latest"]


def one_at_a_time(rank: int, root: Path) -> dict[str, Any]:
    """A save is due while the one before it is held back: training waits for it then, and no sooner."""
    with run_in(root, every_steps=2) as folder, held("pwrite") as go:
        engine = engine_for()
        waits, hidden = [], []

        def waiting() -> None:
            if engine._checkpoints.running():
                waits.append(engine.global_steps)
                go.set()

        before(engine._checkpoints._background, "wait", waiting)
        for step in range(1, 6):
            train(engine, step)
            hidden.append(len([name for name in names(folder) if name.startswith(".saving")]) if folder.exists() else 0)
        engine.wait_for_checkpoint()
        engine.wait_for_checkpoint()  # there is none any more
    return {"waits": waits[:1], "most hidden": max(hidden), "names": names(folder)}


def test_never_two_at_once(pair: Outcomes, folder: Path) -> None:
    for rank in pair["one_at_a_time"]:
        assert rank["waits"] == [4]
        assert rank["most hidden"] == 1
        assert rank["names"] == ["global_step2", "global_step4", "latest"]
    assert [event["step"] for event in events(folder / "one_at_a_time", "saved")] == [2, 4]


def not_behind(rank: int, root: Path) -> list[str]:
    """``"async": false``: the save is there when the step is over."""
    with run_in(root, every_steps=2, **{"async": False}) as folder:
        engine = engine_for()
        train(engine, 2)
        return names(folder)


def test_a_run_may_ask_for_synchronous_saves(pair: Outcomes) -> None:
    assert pair["not_behind"] == [["global_step2", "latest"]] * WORLD_SIZE


def by_the_clock(rank: int, root: Path) -> dict[str, Any]:
    """Rank 0's clock says when; the others follow."""
    with run_in(root, every_minutes=1 if rank == 0 else 1000) as folder:
        engine = engine_for()
        saved = []
        for step in range(1, 6):
            if step in {2, 4}:
                engine._checkpoints.saved_at -= 61
            train(engine, step)
            engine.wait_for_checkpoint()
            saved.append(engine._checkpoints.saved_step)
    return {"saved": saved, "names": names(folder), "stall": engine._checkpoints.cost.stall_s}


def test_a_save_by_the_clock(pair: Outcomes) -> None:
    for rank in pair["by_the_clock"]:
        assert rank["saved"] == [None, 2, 2, 4, 4]
        assert rank["names"] == ["global_step2", "global_step4", "latest"]
        assert rank["stall"] > 0


def where(rank: int, root: Path) -> dict[str, Any]:
    """Saves of a run's own, after the script has saved and loaded here and there."""
    found: dict[str, Any] = {}
    for name in ("loads", "loads elsewhere", "never loads", "takes weights"):
        with run_in(root / name, every_steps=2, keep=1) as folder:
            engine, elsewhere = engine_for(), root / name / "elsewhere"
            if name.startswith("loads"):
                engine.load_checkpoint(elsewhere if name == "loads elsewhere" else None)
            if name == "takes weights":
                engine.load_checkpoint(root / "loads" / "checkpoints", load_module_only=True)
            train(engine, 3)
            if name in {"loads", "never loads"}:
                engine.save_checkpoint(elsewhere, tag="mine")
            train(engine, 7)
            engine.wait_for_checkpoint()
            engine.save_checkpoint(tag="last")
        found[name] = [names(path) if path.exists() else [] for path in (folder, elsewhere)]
    return found


def test_a_run_saves_where_its_next_start_looks(pair: Outcomes) -> None:
    for rank in pair["where"]:
        assert rank == {
            "loads": [["global_step6", "latest"], ["last", "latest", "mine"]],
            "loads elsewhere": [[], ["global_step6", "last", "latest"]],
            "never loads": [["global_step2", "latest"], ["global_step6", "last", "latest", "mine"]],
            "takes weights": [["global_step6", "last", "latest"], []],
        }


def retention(rank: int, root: Path) -> list[str]:
    """Two of the run's own saves stay, each fourth step, what is pinned, and what the user or another run saved."""
    with run_in(root, every_steps=1, keep=2, keep_every=4) as folder:
        engine = engine_for()
        train(engine, 2)
        engine.save_checkpoint(tag="mine")
        on_first((folder / "global_step2" / "pinned").touch)
        on_first(lambda: foreign(folder / "global_step2", folder / "another"))
        train(engine, 9)
        engine.wait_for_checkpoint()
    return names(folder)


def foreign(one: Path, other: Path) -> None:
    """What another run saved by itself: the same files, with that run's name in the manifest."""
    other.mkdir()
    for path in one.iterdir():
        if path.name != "pinned":
            (other / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["state"]["made_by"] = "/runs/another"
    background.commit.write_manifest(other, {key: value for key, value in manifest.items() if key != "seal"})


def test_retention_takes_only_the_run_s_own_saves(pair: Outcomes) -> None:
    for rank in pair["retention"]:
        assert rank == [
            "another",
            "global_step2",
            "global_step4",
            "global_step8",
            "global_step9",
            "latest",
            "mine",
        ]


# failures


def failing(rank: int, who: int, root: Path) -> dict[str, Any]:
    """One rank's write at step 4 fails; at step 6 all is well again."""
    with run_in(root, every_steps=2) as folder:
        engine = engine_for()
        train(engine, 3)
        engine.wait_for_checkpoint()
        with held("pwrite", (who,), error=28) as go:
            train(engine, 4)
            go.set()
            error = said(engine.wait_for_checkpoint)
        dist.barrier()
        after = names(folder)
        train(engine, 7)
        engine.wait_for_checkpoint()
        other = engine_for(3)
        path, _ = other.load_checkpoint()
    return {"error": error, "after": after, "names": names(folder), "path": path, "steps": other.global_steps}


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_cannot_write_is_told_of_on_all(pair: Outcomes, folder: Path, who: int) -> None:
    root = folder / f"failing {who}"
    for rank in pair[root.name]:
        path = str(root / "checkpoints" / "global_step4")
        assert rank["error"] == f"checkpoint {path!r}: not saved: rank {who}: No space left on device"
        assert rank["after"] == ["global_step2", "latest"]
        assert rank["names"] == ["global_step2", "global_step6", "latest"]
        assert (Path(rank["path"]).name, rank["steps"]) == ("global_step6", 6)
    assert [event["step"] for event in events(root, "saved")] == [2, 6]


def failure_and_more(rank: int, root: Path) -> dict[str, Any]:
    """A failed save keeps none from being made that is due, that a user asks for, and no load."""
    with run_in(root, every_steps=2) as folder:
        engine, found = engine_for(), {}
        with held("pwrite", (1,), error=28):
            train(engine, 3)
        train(engine, 4)
        engine.wait_for_checkpoint()
        found["due"] = names(folder)
        for name, do in {"asked": lambda: engine.save_checkpoint(tag="mine"), "load": engine.load_checkpoint}.items():
            with held("pwrite", (1,), error=28):
                train(engine, engine.global_steps + 2)
            do()
            found[name] = names(folder), engine.global_steps
    return found


def test_a_failed_save_keeps_no_other_from_being_made(pair: Outcomes, folder: Path) -> None:
    for rank in pair["failure_and_more"]:
        assert rank["due"] == ["global_step4", "latest"]
        assert rank["asked"] == (["global_step4", "latest", "mine"], 6)
        assert rank["load"] == (["global_step4", "latest", "mine"], 6)
    failed = events(folder / "failure_and_more", "save_failed")
    assert [event["step"] for event in failed] == [4, 6, 8]
    assert all(event["error"].endswith("not saved: rank 1: No space left on device") for event in failed)


def full_disk(rank: int, root: Path, disk: Path) -> dict[str, Any]:
    """A real full disk, then one that is read-only, then one with room."""
    with run_in(root, every_steps=2, dir=str(disk / "saves")) as folder:
        engine = engine_for()
        train(engine, 3)
        engine.wait_for_checkpoint()
        on_first(lambda: fill(disk / "filler", room=8192))
        train(engine, 4)
        full = said(engine.wait_for_checkpoint)
        dist.barrier()
        on_first((disk / "filler").unlink)
        on_first(lambda: remount(disk, "ro"))
        train(engine, 6)
        on_first(lambda: remount(disk, "rw"))
        after = names(folder)
        train(engine, 8)
        engine.wait_for_checkpoint()
    return {"full": full, "after": after, "names": names(folder), "steps": engine.global_steps}


def fill(path: Path, room: int) -> None:
    with path.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(file.tell() - room)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_full_disk_and_one_that_cannot_be_written(pair: Outcomes, folder: Path, disk: Path | None) -> None:
    if disk is None:
        pytest.skip(NO_MOUNT)
    for rank in pair["full_disk"]:
        assert rank["full"].endswith("No space left on device")
        assert rank["after"] == ["global_step2", "latest"]
        assert rank["names"] == ["global_step2", "global_step8", "latest"]
        assert rank["steps"] == 8
    failed = [
        (event["step"], event["error"].rpartition(": ")[2]) for event in events(folder / "full_disk", "save_failed")
    ]
    assert failed == [(6, "Read-only file system")]


# a request to stop while a save is being written


def stopped(rank: int, situation: str, root: Path) -> dict[str, Any]:
    """A save begins at step 2, and rank 1 is told to stop before the end of step 3."""
    save_s, left_s, number, gate, error = SITUATIONS[situation]
    with run_in(root, every_steps=2) as folder, held(gate, error=error if rank else 0) as go:
        engine = engine_for()
        checkpoints, chosen = engine._checkpoints, []
        checkpoints.cost.durable_s = save_s
        train(engine, 2)
        save = checkpoints._background._save
        if situation == "it has ended":
            go.set()
            save._thread.join()
            checkpoints.cost.durable_s = save_s
        before(checkpoints._background, "wait", go.set)
        cancel = save._data.cancel
        save._data.cancel = lambda: (
            cancel(),
            go.set(),
        )  # no further write may begin, so let go of the one that is held
        choose = engine._saving._agreed_choice
        engine._saving._agreed_choice = lambda: chosen.append(choose()) or chosen[0]
        on_first(lambda: deadline(root, left_s))
        if rank == 1:
            os.kill(os.getpid(), number)
        stop = None
        try:
            train(engine, 3)
        except hpc_ds.Preempted as raised:
            stop = raised.code, str(raised)
        dist.barrier()
        loaded = engine_for(1).load_checkpoint()[0]
        return {"stop": stop, "chosen": chosen, "names": names(folder), "loaded": Path(loaded).name}


def deadline(root: Path, left_s: float) -> None:
    if math.isfinite(left_s):
        (root / "deadline").write_text(f"{time.time() + left_s} {time.time() + left_s}")


# seconds that a save took so far, until the end, what rank 1 is told with, where the threads of the save wait, and how
# that call ends on rank 1
SITUATIONS: dict[str, tuple[float | None, float, int, str, int]] = {
    "time for both": (1.0, 10_000, signal.SIGUSR2, "pwrite", 0),
    "nobody knows the end": (1.0, math.inf, signal.SIGUSR2, "pwrite", 0),
    "nobody knows what a save takes": (None, 10_000, signal.SIGUSR2, "pwrite", 0),
    "time for a new one": (6000.0, 10_000, signal.SIGUSR2, "pwrite", 0),
    "time for the old one": (60_000.0, 10_000, signal.SIGUSR2, "fsync", 0),
    "killed soon": (60_000.0, math.inf, signal.SIGTERM, "fsync", 0),
    "the old one fails": (60_000.0, 10_000, signal.SIGUSR2, "fsync", 28),
    "it has ended": (60_000.0, 10_000, signal.SIGUSR2, "pwrite", 0),
}
BOTH, NEW, OLD = (
    (["global_step2", "global_step3", "latest"], 3),
    (["global_step3", "latest"], 3),
    (["global_step2", "latest"], 2),
)
OUTCOMES = {
    "time for both": (FINISH_AND_SAVE, BOTH),
    "nobody knows the end": (FINISH_AND_SAVE, BOTH),
    "nobody knows what a save takes": (FINISH_AND_SAVE, BOTH),
    "time for a new one": (SAVE, NEW),
    "time for the old one": (FINISH, OLD),
    "killed soon": (FINISH, OLD),
    "the old one fails": (FINISH, NEW),
    "it has ended": (FINISH_AND_SAVE, BOTH),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_stop_during_a_save_makes_the_newest_step_durable_that_can_be(pair: Outcomes, situation: str) -> None:
    chosen, (left, step) = OUTCOMES[situation]
    told = "SIGTERM" if situation == "killed soon" else "SIGUSR2"
    for rank, by in zip(pair[f"stopped {situation}"], ("another rank", told), strict=True):
        assert rank["chosen"] == [chosen]
        assert rank["stop"] == (75, f"checkpointed step {step} on {by}")
        assert rank["names"] == left
        assert rank["loaded"] == f"global_step{step}"


def too_late_to_give_up(rank: int, root: Path) -> list[Any]:
    """A save that has been written by all ranks is committed, whatever was said then."""
    with run_in(root, every_steps=2) as folder:
        engine = engine_for()
        train(engine, 2)
        engine._checkpoints._background._save._written.wait()
        dist.barrier()
        engine._checkpoints.give_up()
        dist.barrier()
        return names(folder)


def test_giving_up_may_come_too_late(pair: Outcomes) -> None:
    assert pair["too_late_to_give_up"] == [["global_step2", "latest"]] * WORLD_SIZE


# the spawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def disk(folder: Path) -> Iterator[Path | None]:
    """A real file system of one megabyte."""
    place = folder / "disk"
    place.mkdir()
    if not mount_small(place, "1m"):
        yield None
        return
    yield place
    unmount(place)


@pytest.fixture(scope="module")
def pair(folder: Path, disk: Path | None) -> Outcomes:
    """What two ranks did in all cases, each in a run of its own."""
    alone = (one_at_a_time, not_behind, by_the_clock, where, retention, failure_and_more, too_late_to_give_up)
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in alone}
    cases |= {f"bits {stage} {kind}": (bits, (stage, kind)) for stage in range(4) for kind in PRECISIONS}
    cases |= {f"failing {who}": (failing, (who,)) for who in range(WORLD_SIZE)}
    cases |= {f"stopped {situation}": (stopped, (situation,)) for situation in SITUATIONS}
    cases = {name: (do, (*args, folder / name)) for name, (do, args) in cases.items()}
    if disk is not None:
        cases["full_disk"] = (full_disk, (folder / "full_disk", disk))
    return run_cases(WORLD_SIZE, cases, worlds=2)
