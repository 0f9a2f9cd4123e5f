"""A save is visible whole or not at all, on every rank alike; and what comes back is the newest whole one."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from torch import nn
from toys import (
    NO_MOUNT,
    content,
    load,
    mount_small,
    names,
    on_first,
    said,
    save,
    unmount,
    warnings_said,
)

import hpc_ds
from hpc_ds.checkpoint import commit, layout, writer
from hpc_ds.checkpoint.shards import own_share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
BIG = 1 << 21  # bytes, more than a small file system or a file limit holds


# the way it goes when nothing fails


def saved_and_loaded(rank: int, folder: Path) -> dict[str, Any]:
    path = save(folder, 3, "first")
    found = {"path": path, "names": names(folder), "files": names(path), "latest": (folder / "latest").read_text()}
    manifest = json.loads((path / layout.MANIFEST).read_text())
    found["manifest"] = {key: manifest[key] for key in ("format", "step", "world_size", "state")}
    found["listed"] = sorted(manifest["files"])
    found["loaded"] = [load(folder), load(folder, "first")]
    save(folder, 4)
    found["newer"] = [load(folder), load(folder, "first"), (folder / "latest").read_text()]
    save(folder, 5, save_latest=False)
    found["not latest"] = [load(folder), load(folder, "step5"), (folder / "latest").read_text()]
    return found


def test_a_checkpoint_is_what_the_layout_says(pair: Outcomes, folder: Path) -> None:
    files = ["rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors"]
    for rank in pair["saved_and_loaded"]:
        assert rank["path"] == folder / "saved_and_loaded" / "first"
        assert rank["names"] == ["first", "latest"]
        assert rank["files"] == sorted([*files, "manifest.json"])
        assert rank["listed"] == files
        assert rank["latest"] == "first"
        assert rank["manifest"] == {"format": 2, "step": 3, "world_size": 2, "state": {"global_steps": 3}}
        assert rank["loaded"] == [("first", 3), ("first", 3)]
        assert rank["newer"] == [("step4", 4), ("first", 3), "step4"]
        assert rank["not latest"] == [("step4", 4), ("step5", 5), "step4"]


def saved_again(rank: int, folder: Path) -> list[Any]:
    save(folder, 1, "same")
    save(folder, 2, "same")
    return [load(folder), names(folder), layout.newest_step(folder)]


def test_a_tag_can_be_saved_again(pair: Outcomes) -> None:
    assert pair["saved_again"] == [[("same", 2), ["latest", "same"], 2]] * WORLD_SIZE


def wrong_tags(rank: int, folder: Path) -> list[str]:
    return [said(lambda tag=tag: save(folder, 1, tag)) for tag in ("a/b", ".hidden", "..", "latest")]


def test_tags_that_are_no_folder_names_are_refused(pair: Outcomes, folder: Path) -> None:
    for rank in pair["wrong_tags"]:
        assert rank == [
            f"checkpoint tag {tag!r}: not a folder name; use for example 'global_step100'"
            for tag in ("a/b", ".hidden", "..", "latest")
        ]
    assert names(folder / "wrong_tags") == []


# failures while saving


@contextlib.contextmanager
def no_files_larger_than(size: int) -> Iterator[None]:
    """This process gets "File too large" from the operating system beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing_save(rank: int, folder: Path, how: str) -> dict[str, Any]:
    """A whole checkpoint, a save that fails on one rank, and a save that works."""
    save(folder, 1)
    big = own_share("model.much", torch.zeros(BIG, dtype=torch.uint8), rank, WORLD_SIZE)
    fails: dict[str, Callable[[], writer.Content]] = {
        "tensors": lambda: content(2, shards=[big]),
        "rank state": lambda: content(2, rank_state={"much": big.data}),
        "engine state": lambda: content(2, state={"global_steps": {2}}),
        "unfit rank state": lambda: content(2, rank_state={"open": sys.stdout} if rank == 1 else {}),
    }
    limited = rank == 1 and how in {"tensors", "rank state"}
    with no_files_larger_than(BIG // 8) if limited else contextlib.nullcontext():
        error = said(lambda: writer.save(folder, "step2", fails[how]()))
    dist.barrier()
    after = [names(folder), load(folder)]
    save(folder, 3)
    return {"error": error, "after": after, "next": [load(folder), names(folder)]}


FAILURES = {
    "tensors": "rank 1: File too large",
    "rank state": "rank 1: File too large",
    "engine state": "rank 0: state: Object of type set is not JSON serializable; hand over plain JSON",
    "unfit rank state": "rank 1: rank_state['open']: a _io.TextIOWrapper cannot be stored; ",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_rank_that_fails_fails_the_save_on_all(pair: Outcomes, folder: Path, how: str) -> None:
    first, second = pair[f"failing_save {how}"]
    assert first == second
    path = str(folder / f"failing_save {how}" / "step2")
    assert first["error"].startswith(f"checkpoint {path!r}: not saved: {FAILURES[how]}")
    assert first["after"] == [["latest", "step1"], ("step1", 1)]
    assert first["next"] == [("step3", 3), ["latest", "step1", "step3"]]


def no_folder(rank: int, folder: Path) -> str:
    on_first(lambda: (folder / "file").write_text("not a folder"))
    return said(lambda: save(folder / "file", 1))


def test_a_file_where_the_folder_should_be(pair: Outcomes) -> None:
    first, second = pair["no_folder"]
    assert first == second
    assert first.endswith("/file/step1': not saved: rank 0: File exists")


def full_disk(rank: int, folder: Path) -> dict[str, Any] | str:
    """A real file system of one megabyte."""
    mounted = [False]

    def mount() -> None:
        mounted[0] = mount_small(folder, "1m")

    on_first(mount)
    dist.broadcast_object_list(mounted)
    if not mounted[0]:
        return "no mount"
    try:
        save(folder, 1)
        error = said(lambda: writer.save(folder, "step2", content(2, client_state={"much": torch.zeros(BIG)})))
        dist.barrier()
        after = [names(folder), load(folder)]
        save(folder, 3)
        return {"error": error, "after": after, "next": load(folder)}
    finally:
        on_first(lambda: unmount(folder))


def test_a_full_disk(pair: Outcomes) -> None:
    first, second = pair["full_disk"]
    if first == "no mount":
        pytest.skip(NO_MOUNT)
    assert first == second
    assert first["error"].endswith("not saved: rank 0: No space left on device")
    assert first["after"] == [["latest", "step1"], ("step1", 1)]
    assert first["next"] == ("step3", 3)


def training_goes_on(rank: int, folder: Path) -> dict[str, Any]:
    """An engine whose save fails on rank 1, beside one that does not save."""

    def engine() -> Any:
        torch.manual_seed(5)
        config = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}
        return hpc_ds.initialize(model=nn.Linear(3, 1), config=config)[0]

    def step(one: Any) -> float:
        loss = one(torch.ones(1, 3) * rank).mean()
        one.backward(loss)
        one.step()
        return loss.item()

    saving, other = engine(), engine()
    losses = [(step(saving), step(other))]
    saving.save_checkpoint(folder, client_state={"good": 1})
    errors = [said(lambda: saving.save_checkpoint(folder, tag="bad", client_state={"bad": lambda: None}))]
    losses.append((step(saving), step(other)))
    saving.register_state("much", Much())
    with no_files_larger_than(BIG // 8) if rank == 0 else contextlib.nullcontext():
        errors.append(said(saving.save_checkpoint))
    losses.append((step(saving), step(other)))
    Much.size = 1
    saving.save_checkpoint()
    path, client = saving.load_checkpoint(folder)
    return {"losses": losses, "errors": errors, "path": path, "client": client}


class Much:
    """Registered state of a changing size."""

    size = BIG

    def state_dict(self) -> dict[str, Any]:
        return {"much": torch.zeros(self.size, dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["much"].numel() == self.size


def test_training_goes_on_after_a_save_that_failed(pair: Outcomes, folder: Path) -> None:
    for rank in pair["training_goes_on"]:
        assert all(one == other for one, other in rank["losses"])
        assert "rank 0: client_state['client']['bad']: a function cannot be stored; " in rank["errors"][0]
        assert rank["errors"][1].endswith("rank 0: File too large")
        assert rank["path"] == str(folder / "training_goes_on" / "global_step3")
        assert rank["client"] == {"good": 1}  # not the one that was refused
    assert names(folder / "training_goes_on") == ["global_step1", "global_step3", "latest"]


# what dead saves leave


def leftovers(rank: int, folder: Path) -> list[Any]:
    save(folder, 1)
    save(folder, 2)

    def die() -> None:
        shutil.copytree(folder / "step2", folder / ".saving-step3-0123abcd")
        sign(folder / ".saving-step3-0123abcd", pid=DEAD)
        shutil.copytree(folder / "step1", folder / ".saving-step4-0123abcd")  # died just before its rename
        sign(folder / ".saving-step4-0123abcd", pid=DEAD)
        (folder / "step2").rename(folder / ".replaced-step2-0123abcd")  # died between its two renames
        shutil.copytree(folder / "step1", folder / ".replaced-step1-0123abcd")  # died before it cleaned up
        shutil.copytree(folder / "step1", folder / ".removing-step0-0123abcd")  # died while it removed one

    on_first(die)
    found = [load(folder), layout.newest_step(folder)]
    save(folder, 5)
    return [*found, names(folder), load(folder), load(folder, "step2")]


DEAD = 2**22 + 1  # more than the largest process id of Linux


def sign(hidden: Path, **overrides: Any) -> None:
    """Say whose a hidden folder is: this process's but for what is given."""
    owner = {**commit._signature(commit.Run()), **overrides}
    (hidden / commit._OWNER).write_text(json.dumps(owner))


def test_what_dead_saves_left_is_cleaned_or_given_its_name_back(pair: Outcomes) -> None:
    for rank in pair["leftovers"]:
        assert rank == [("step2", 2), 2, ["latest", "step1", "step2", "step5"], ("step5", 5), ("step2", 2)]


HOUR = 3600.0
ELSEWHERE = {"kernel": "another machine", "pid": 7, "started": 7}
# whose a hidden folder is, seconds since it was written to -> whether the next save of attempt 2 of run r removes it
LEFT: dict[str, tuple[dict[str, Any] | None, float, bool]] = {
    "a process here that has ended": ({"pid": DEAD}, 0, True),
    "another start of a process id": ({"started": -1, "pid": 1}, 0, True),
    "a process here that lives": ({"pid": os.getppid(), "started": commit.start_time(os.getppid())}, 9 * HOUR, False),
    "this process, which gave it up": ({}, 0, True),
    "elsewhere, written to": (ELSEWHERE, 0.9 * HOUR, False),
    "elsewhere, silent": (ELSEWHERE, 1.1 * HOUR, True),
    "elsewhere, an earlier attempt": ({**ELSEWHERE, "run": "r", "attempt": 1}, 0, True),
    "elsewhere, the same attempt": ({**ELSEWHERE, "run": "r", "attempt": 2}, 0, False),
    "elsewhere, another run": ({**ELSEWHERE, "run": "s", "attempt": 1}, 0, False),
    "not signed, new": (None, 0, False),
    "not signed, old": (None, 120, True),
}


@pytest.mark.parametrize("whose", LEFT)
def test_a_hidden_folder_is_removed_only_when_nobody_writes_it(tmp_path: Path, whose: str) -> None:
    owner, age, removed = LEFT[whose]
    hidden = tmp_path / ".saving-step1-0123abcd"
    hidden.mkdir()
    if owner is not None:
        sign(hidden, **owner)
    now = hidden.stat().st_mtime
    for path in (*hidden.iterdir(), hidden):
        os.utime(path, (now - age, now - age))
    commit.clear(tmp_path, commit.Run("r", 2), now)
    assert names(tmp_path) == ([] if removed else [hidden.name])


@pytest.mark.parametrize(("alive", "left"), [(True, [".replaced-a-0123abcd", ".saving-a-0123abcd"]), (False, ["a"])])
def test_a_live_save_between_its_two_renames_is_left_alone(tmp_path: Path, *, alive: bool, left: list[str]) -> None:
    hidden = tmp_path / ".saving-a-0123abcd"
    hidden.mkdir()
    sign(hidden, **LEFT["a process here that lives" if alive else "a process here that has ended"][0] or {})
    (tmp_path / ".replaced-a-0123abcd").mkdir()
    commit.clear(tmp_path, commit.Run(), hidden.stat().st_mtime)
    assert names(tmp_path) == left


def test_a_save_under_way_is_left_alone_by_another_of_the_same_process(tmp_path: Path) -> None:
    first = commit.begin(tmp_path, "a", commit.Run())
    second = commit.begin(tmp_path, "b", commit.Run())
    assert names(tmp_path) == sorted([first.name, second.name])
    commit.give_up(first)
    commit.give_up(second)
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing", ["latest", "folder"])
def test_a_publish_that_fails_late_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """The disk says no after the new checkpoint has got its name."""
    save(tmp_path, 1, "tag")

    def refuse(folder: Path) -> None:
        if folder == tmp_path and (failing == "folder" or (tmp_path / "latest").read_text() == "tag2"):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(commit, "fsync_folder", refuse)
    for tag in ("tag", "tag2") if failing == "folder" else ("tag2",):
        assert said(lambda tag=tag: save(tmp_path, 2, tag)).endswith("not saved: rank 0: Input/output error")
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "tag"]
    assert load(tmp_path) == load(tmp_path, "tag") == ("tag", 1)


# loading what is not there, or not ours


def nothing_to_load(rank: int, folder: Path) -> dict[str, Any]:
    def others() -> None:
        (folder / "empty").mkdir()
        foreign = folder / "foreign" / "global_step5"
        foreign.mkdir(parents=True)
        (foreign / "mp_rank_00_model_states.pt").write_bytes(b"theirs")
        (folder / "foreign" / "latest").write_text("global_step5")

    on_first(others)
    save(folder / "ours", 1)
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}}
    engine = hpc_ds.initialize(model=nn.Linear(3, 1), config=config)[0]
    return {
        "loaded": [engine.load_checkpoint(folder / "empty"), engine.load_checkpoint(folder / "no such")],
        "foreign": said(lambda: load(folder / "foreign")),
        "foreign tag": said(lambda: load(folder / "foreign", "global_step5")),
        "missing tag": said(lambda: load(folder / "ours", "step2")),
        "no tag at all": said(lambda: load(folder / "empty", "step2")),
        "outside of a run": said(hpc_ds.initialize(model=nn.Linear(3, 1), config=config)[0].load_checkpoint),
    }


def test_nothing_to_load(pair: Outcomes) -> None:
    for rank in pair["nothing_to_load"]:
        assert rank["loaded"] == [(None, {}), (None, {})]
        assert rank["foreign"].endswith(
            "looks like DeepSpeed's; turn it into one of ours with `hpcds checkpoint import-deepspeed`"
        )
        assert rank["foreign tag"].endswith(rank["foreign"].partition("rank 0: ")[2])
        assert rank["missing tag"].endswith("no such checkpoint; there are 'step1'")
        assert rank["no tag at all"].endswith("no such checkpoint; there is none in that folder")
        assert rank["outside of a run"].startswith("checkpoint folder: none is known outside of a run; ")


def newer_format(rank: int, folder: Path) -> dict[str, Any]:
    save(folder, 1)
    save(folder, 2)

    def rewrite(tag: str) -> None:
        path = folder / tag / layout.MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))

    on_first(lambda: rewrite("step2"))
    with warnings_said() as lines:
        found: dict[str, Any] = {"loaded": load(folder), "tag": said(lambda: load(folder, "step2"))}
    on_first(lambda: rewrite("step1"))
    return {**found, "lines": lines, "none": said(lambda: load(folder))}


def test_a_newer_format_is_passed_over(pair: Outcomes) -> None:
    first, second = pair["newer_format"]
    for rank in (first, second):
        assert rank["loaded"] == ("step1", 1)
        assert rank["tag"].endswith("/step2': format 3, this hpc_ds reads 2; use a newer one")
        assert rank["none"].endswith(
            "none of its 2 checkpoints is whole; load another folder, or start fresh in an empty one"
        )
    assert "format 3" in first["lines"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commit")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    """What two ranks did in all cases, each in a folder of its own."""
    alone = (
        saved_and_loaded,
        saved_again,
        wrong_tags,
        no_folder,
        full_disk,
        leftovers,
        nothing_to_load,
        newer_format,
        training_goes_on,
    )
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in alone}
    for how in FAILURES:
        cases[f"failing_save {how}"] = (failing_save, (how,))
    for name in cases:
        (folder / name).mkdir()
    return run_cases(WORLD_SIZE, {name: (do, (folder / name, *args)) for name, (do, args) in cases.items()})
