"""One checkpoint on disk: visible whole or not at all, verified before it is believed, and never able to run code."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import hpc_ds
from hpc_ds.checkpoint import layout, reader, writer
from hpc_ds.checkpoint.metadata import tensors_in
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
BIG = 1 << 21  # bytes, more than a small file system or a file limit holds


# what is saved, as a function of the step, so that one sees which one came back


def content(step: int, **overrides: Any) -> writer.Content:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(torch.arange(5.0) + step, mesh, [Shard(0)])
    return writer.Content(
        **{
            "tensors": {"model.sharded": sharded, "model.plain": torch.full((2, 3), float(step))},
            "rank_state": {"rank": dist.get_rank(), "step": step},
            "client_state": {"step": step},
            "state": {"global_steps": step},
            "step": step,
            **overrides,
        }
    )


def save(folder: Path, step: int, tag: str | None = None, **options: Any) -> Path:
    return writer.save(folder, tag or f"step{step}", content(step), **options)


def load(folder: Path, tag: str | None = None) -> tuple[str, int] | None:
    """The tag and the step that come back, after a look at everything that was saved. Collective."""
    saved = reader.find(folder, tag)
    if saved is None:
        return None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {"model.sharded": distribute_tensor(torch.zeros(5), mesh, [Shard(0)]), "model.plain": torch.zeros(2, 3)}
    reader.load_tensors(saved, lambda: tensors)
    assert torch.equal(tensors["model.sharded"].full_tensor(), torch.arange(5.0) + saved.step)
    assert torch.equal(tensors["model.plain"], torch.full((2, 3), float(saved.step)))
    assert reader.read_rank_state(saved) == {"rank": dist.get_rank(), "step": saved.step}
    assert reader.read_client_state(saved) == {"step": saved.step}
    assert saved.state == {"global_steps": saved.step}
    return saved.tag, saved.step


def said(do: Callable[[], Any]) -> str:
    """The message of the CheckpointError that ``do`` raises."""
    try:
        value = do()
    except CheckpointError as error:
        return str(error)
    raise AssertionError(f"no CheckpointError but {value!r}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def on_first(do: Callable[[], Any]) -> None:
    """Run on rank 0, between two barriers."""
    dist.barrier()
    if dist.get_rank() == 0:
        do()
    dist.barrier()


@contextlib.contextmanager
def warnings_said() -> Iterator[list[str]]:
    """What the hpc_ds logger says on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hpc_ds")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


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
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "client_state.pt", "rank-0.pt", "rank-1.pt"]
    for rank in pair["saved_and_loaded"]:
        assert rank["path"] == folder / "saved_and_loaded" / "first"
        assert rank["names"] == ["first", "latest"]
        assert rank["files"] == sorted([*files, "manifest.json"])
        assert rank["listed"] == files
        assert rank["latest"] == "first"
        assert rank["manifest"] == {"format": 1, "step": 3, "world_size": 2, "state": {"global_steps": 3}}
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
    big = torch.zeros(BIG, dtype=torch.uint8)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    fails: dict[str, Callable[[], writer.Content]] = {
        "rank file": lambda: content(2, rank_state={"much": big}),
        "tensors": lambda: content(2, tensors={"model.much": distribute_tensor(big, mesh, [Shard(0)])}),
        "manifest": lambda: content(2, state={"global_steps": {2}}),
        "rank state": lambda: content(2, rank_state={"open": sys.stdout} if rank == 1 else {}),
    }
    limited = rank == 1 and how in {"rank file", "tensors"}
    with no_files_larger_than(BIG // 8) if limited else contextlib.nullcontext():
        error = said(lambda: writer.save(folder, "step2", fails[how]()))
    dist.barrier()
    after = [names(folder), load(folder)]
    save(folder, 3)
    return {"error": error, "after": after, "next": [load(folder), names(folder)]}


FAILURES = {
    "rank file": "rank 1: File too large",
    "tensors": "rank 1: File too large",
    "manifest": "rank 0: Object of type set is not JSON serializable",
    "rank state": "rank 1: rank-1.pt with keys 'open': holds something other than tensors, numbers, text, lists and dicts",
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
    """A real file system of one megabyte; only root can make one."""
    mounted = [False]

    def mount() -> None:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if os.geteuid() == 0 and shutil.which("mount"):
            mounted[0] = subprocess.run(command, check=False, capture_output=True).returncode == 0

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
        on_first(lambda: subprocess.run(["umount", "-l", str(folder)], check=True))


def test_a_full_disk(pair: Outcomes) -> None:
    first, second = pair["full_disk"]
    if first == "no mount":
        pytest.skip("a small file system cannot be mounted here: that needs root")
    assert first == second
    assert first["error"].endswith("not saved: rank 0: No space left on device")
    assert first["after"] == [["latest", "step1"], ("step1", 1)]
    assert first["next"] == ("step3", 3)


def unfit_client_state(rank: int, folder: Path) -> list[str]:
    unfit = [lambda: None, nn.Linear(1, 1), object(), sys.stdout, Path(), random.Random(1)]
    save(folder, 1)
    errors = [said(lambda it=it: writer.save(folder, "step2", content(2, client_state={"it": it}))) for it in unfit]
    assert load(folder) == ("step1", 1)
    return [error.split("not saved: ")[1] for error in errors]


UNFIT = (
    r"Can't pickle local object .*",
    "torch.nn.modules.linear.Linear is not among the types that are read",
    "object is not among .*",
    "cannot pickle '_io.TextIOWrapper' object",
    "pathlib.PosixPath is not among .*",
    "random.Random is not among .*",
)


def test_client_state_that_is_not_plain_is_refused_when_it_is_saved(pair: Outcomes) -> None:
    first, second = pair["unfit_client_state"]
    assert first == second
    assert len(first) == len(UNFIT)
    for error, wanted in zip(first, UNFIT, strict=True):
        start = r"rank 0: client_state\.pt with keys 'it': holds something other than tensors, numbers, text, lists and dicts"
        assert re.fullmatch(rf"{start} \({wanted}\); store its state_dict instead", error)


ROUND_TRIP = {
    "numbers": [1, 2.5, -3, True, None, float("inf")],
    "text": "ä\n",
    "nested": {"deep": [{"er": (1, 2)}]},
    5: "a number as a key",
    "set": {1, 2},
    "ordered": OrderedDict(a=1, b=2),
    "tensors": [torch.arange(3), torch.tensor([1.5, -2.0], dtype=torch.bfloat16), torch.tensor(True)],  # noqa: FBT003
}


def round_trip(rank: int, folder: Path) -> Any:
    writer.save(folder, "one", content(1, client_state=ROUND_TRIP if rank == 0 else {"of": "rank 1"}))
    saved = reader.find(folder)
    assert saved is not None
    return reader.read_client_state(saved)


def test_client_state_comes_back_as_it_was(pair: Outcomes) -> None:
    for found in pair["round_trip"]:
        assert list(found) == list(ROUND_TRIP)
        assert {key: value for key, value in found.items() if key != "tensors"} == {
            key: value for key, value in ROUND_TRIP.items() if key != "tensors"
        }
        for value, wanted in zip(found["tensors"], ROUND_TRIP["tensors"], strict=True):
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted)


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
        assert "client_state.pt with keys 'client', " in rank["errors"][0]
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
        (folder / ".saving-step3-0123abcd" / layout.MANIFEST).unlink()
        shutil.copytree(folder / "step1", folder / ".saving-step4-0123abcd")  # died just before its rename
        (folder / "step2").rename(folder / ".replaced-step2-0123abcd")  # died between its two renames
        shutil.copytree(folder / "step1", folder / ".replaced-step1-0123abcd")  # died before it cleaned up

    on_first(die)
    found = [load(folder), layout.newest_step(folder)]
    save(folder, 5)
    return [*found, names(folder), load(folder), load(folder, "step2")]


def test_what_dead_saves_left_is_cleaned_or_given_its_name_back(pair: Outcomes) -> None:
    for rank in pair["leftovers"]:
        assert rank == [("step2", 2), 2, ["latest", "step1", "step2", "step5"], ("step5", 5), ("step2", 2)]


def killed(rank: int, folder: Path) -> list[tuple[int, bool, int]]:
    """Rank 0 publishes the same tag again and is killed at its first, second, ... file operation.

    For each: (which one, whether it got through, step of the checkpoint that comes back).
    """
    story = []
    for number in itertools.count():
        here = folder / str(number)
        save(here, 1, "other")
        save(here, 2, "tag")
        save(here, 3, "new")
        done = [False]

        def publish(here: Path = here, number: int = number, done: list[bool] = done) -> None:
            new = (here / "new").rename(here / ".saving-tag-0123abcd")
            writer.write_atomic(here / layout.LATEST, "tag")
            manifest = json.loads((new / layout.MANIFEST).read_text())
            (new / layout.MANIFEST).unlink()
            child = os.fork()
            if child == 0:
                left = iter(range(number))
                sys.addaudithook(
                    lambda event, _: os._exit(9) if event in OPERATIONS and next(left, None) is None else None
                )
                writer._publish(here, "tag", new, manifest, save_latest=True)
                os._exit(0)
            done[0] = os.waitpid(child, 0)[1] == 0

        on_first(publish)
        dist.broadcast_object_list(done)
        found = load(here)
        assert found is not None
        save(here, 4, "after")
        assert load(here) == ("after", 4)
        assert load(here, "tag") == ("tag", found[1])
        assert names(here) == ["after", "latest", "other", "tag"]
        story.append((number, done[0], found[1]))
        if done[0]:
            return story
    return story


OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def test_killed_at_any_file_operation_there_is_a_whole_checkpoint(pair: Outcomes) -> None:
    first, second = pair["killed"]
    assert first == second
    assert len(first) > 8
    assert [through for _, through, _ in first] == [False] * (len(first) - 1) + [True]
    steps = [step for *_, step in first]
    assert steps == sorted(steps)  # the old one until the new one is in its place, and from then on the new one
    assert set(steps) == {2, 3}


# how many stay


def pruned(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in (1, 2, 10, 9):
        save(folder, step)

    def litter() -> None:
        (folder / "notes").mkdir()
        (folder / "notes" / "text").write_text("mine")
        (folder / "file").write_text("mine")
        (folder / "step1" / layout.MANIFEST).write_text("{damaged")

    on_first(litter)
    for keep in (4, 3, 2, 1, 0, -1):
        on_first(lambda keep=keep: writer.prune(folder, keep))
        found[f"keep {keep}"] = names(folder)
    found["loaded"] = load(folder)
    on_first(lambda: writer.prune(folder / "no such folder", 1))
    on_first(lambda: writer.prune(folder / "file", 1))
    return found


def test_prune_keeps_latest_and_the_newest(pair: Outcomes) -> None:
    mine = ["file", "latest", "notes"]
    for rank in pair["pruned"]:
        assert rank["keep 4"] == [*mine, "step1", "step10", "step2", "step9"]
        assert rank["keep 3"] == [*mine, "step10", "step2", "step9"]  # the damaged one goes first
        assert rank["keep 2"] == [*mine, "step10", "step9"]
        assert rank["keep 1"] == rank["keep 0"] == rank["keep -1"] == [*mine, "step9"]  # latest names it
        assert rank["loaded"] == ("step9", 9)


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
        assert rank["foreign"].endswith("it has a file 'latest' but no checkpoint of ours; is it another program's?")
        for name in ("foreign tag", "missing tag", "no tag at all"):
            assert rank[name].endswith("it has no manifest.json; it is none of ours")
        assert rank["outside of a run"].startswith("checkpoint folder: none is known outside of a run; ")


def newer_format(rank: int, folder: Path) -> dict[str, Any]:
    save(folder, 1)
    save(folder, 2)

    def rewrite(tag: str) -> None:
        path = folder / tag / layout.MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))

    on_first(lambda: rewrite("step2"))
    with warnings_said() as lines:
        found: dict[str, Any] = {"loaded": load(folder), "tag": said(lambda: load(folder, "step2"))}
    on_first(lambda: rewrite("step1"))
    return {**found, "lines": lines, "none": said(lambda: load(folder))}


def test_a_newer_format_is_passed_over(pair: Outcomes) -> None:
    first, second = pair["newer_format"]
    for rank in (first, second):
        assert rank["loaded"] == ("step1", 1)
        assert rank["tag"].endswith("/step2': format 2, this hpc_ds reads up to 1; use a newer one")
        assert rank["none"].endswith("none of its 2 checkpoints is whole")
    assert "format 2" in first["lines"][0]


# damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, path.stat().st_size - 1),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 3),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}
FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "client_state.pt", "rank-0.pt", "rank-1.pt", "manifest.json")


def damaged(rank: int, folder: Path) -> dict[str, Any]:
    """Every kind of damage to every file of the newest of two checkpoints: what comes back, what was said."""
    save(folder, 1)
    save(folder, 2)
    whole = folder.with_name(f"{folder.name} whole")
    on_first(lambda: shutil.copytree(folder / "step2", whole))
    found: dict[str, Any] = {}
    for file, (kind, damage) in itertools.product(FILES, DAMAGES.items()):
        on_first(lambda file=file, damage=damage: damage(folder / "step2" / file))
        with warnings_said() as lines:
            found[f"{file}, {kind}"] = load(folder), lines
            if kind == "missing":
                found[f"tag, {file}"] = said(lambda: load(folder, "step2"))
        on_first(lambda file=file: shutil.copyfile(whole / file, folder / "step2" / file))
    assert load(folder) == ("step2", 2)
    return found


def test_whatever_is_damaged_the_one_before_is_loaded(pair: Outcomes) -> None:
    first, second = pair["damaged"]
    for file, kind in itertools.product(FILES, DAMAGES):
        (loaded, lines), (by_second, silence) = first[f"{file}, {kind}"], second[f"{file}, {kind}"]
        assert loaded == by_second == ("step1", 1), (file, kind)
        if (file, kind) != ("manifest.json", "missing"):  # without it there is no checkpoint to speak of
            assert len(lines) == 1, (file, kind)
            assert file in lines[0], lines
            assert lines[0].endswith("; trying the one before")
        assert silence == []
    for file in FILES:
        assert first[f"tag, {file}"] == second[f"tag, {file}"]
        assert file in first[f"tag, {file}"]


def damaged_bits(rank: int, folder: Path) -> list[tuple[int, Any]]:
    """One bit of the manifest is wrong, at many places."""
    save(folder, 1)
    save(folder, 2)
    path = folder / "step2" / layout.MANIFEST
    whole = path.read_bytes()
    places = random.Random(1).sample(range(len(whole)), 60)
    found = []
    for place in places:
        on_first(lambda place=place: flip(path, place))
        with warnings_said():
            found.append((place, load(folder)))
        on_first(lambda: path.write_bytes(whole))
    return found


def test_a_manifest_with_one_wrong_bit_is_not_believed(pair: Outcomes) -> None:
    for rank in pair["damaged_bits"]:
        assert [place for place, loaded in rank if loaded != ("step1", 1)] == []


def damaged_latest(rank: int, folder: Path) -> list[Any]:
    save(folder, 1)
    save(folder, 2)
    found = []
    for text in (b"\xff\xfe\x00", b"", b"step7", b"step1", b"../step1", b"step2\n"):
        on_first(lambda text=text: (folder / "latest").write_bytes(text))
        found.append((load(folder), layout.newest_step(folder)))
    on_first((folder / "latest").unlink)
    return [*found, (load(folder), layout.newest_step(folder))]


def test_latest_is_a_hint_only(pair: Outcomes) -> None:
    for rank in pair["damaged_latest"]:
        newest, named = (("step2", 2), 2), (("step1", 1), 1)
        assert rank == [newest, newest, newest, named, newest, newest, newest]


def all_damaged(rank: int, folder: Path) -> str:
    save(folder, 1)
    save(folder, 2)
    on_first(lambda: [flip(path / "rank-1.pt", 9) for path in (folder / "step1", folder / "step2")])
    with warnings_said():
        return said(lambda: load(folder))


def test_none_whole_is_an_error_and_no_fresh_start(pair: Outcomes, folder: Path) -> None:
    text = f"checkpoint folder {str(folder / 'all_damaged')!r}: none of its 2 checkpoints is whole"
    assert pair["all_damaged"] == [text, text]


# malice: files that fit their checksums


class Malice:
    """Unpickled freely, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def malicious(rank: int, folder: Path, file: str) -> dict[str, Any]:
    save(folder, 1)
    mark = folder / "mark"

    def replace() -> None:
        path = folder / "step1" / file
        if file == ".metadata":
            path.write_bytes(pickle.dumps(Malice(mark)))
        else:
            torch.save({"step": Malice(mark)}, path)
        manifest = json.loads((path.parent / layout.MANIFEST).read_text())
        manifest["files"][file] = {"size": path.stat().st_size, "sha256": layout.sha256(path)}
        layout.write_manifest(path.parent, manifest)

    on_first(replace)
    saved = reader.find(folder)
    assert saved is not None
    readers: dict[str, Callable[[], Any]] = {
        "client_state.pt": lambda: reader.read_client_state(saved),
        "rank-1.pt": lambda: reader.read_rank_state(saved),
        ".metadata": lambda: tensors_in(saved.path),
    }
    errors = [said(readers[file])] if file in readers else []
    return {"errors": [*errors, said(lambda: load(folder))], "marked": mark.exists()}


@pytest.mark.parametrize("file", [".metadata", "client_state.pt", "rank-1.pt", "__0_0.distcp"])
def test_malice_is_refused_on_all_ranks_and_runs_nothing(pair: Outcomes, file: str) -> None:
    first, second = pair[f"malicious {file}"]
    assert first == second
    assert not first["marked"]
    assert all(error.startswith("checkpoint ") and "not loaded" in error for error in first["errors"][-1:])
    if file != "__0_0.distcp":
        assert all(
            re.search("getattr|pathlib.Path.touch", error) for error in first["errors"]
        )  # what it would have called


def test_malice_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "mark")))  # noqa: S301 - that is the point
    assert (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commit")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    """What two ranks did in all cases, each in a folder of its own."""
    alone = (
        saved_and_loaded, saved_again, wrong_tags, no_folder, full_disk, unfit_client_state, round_trip, leftovers, killed,
        pruned, nothing_to_load, newer_format, damaged, damaged_bits, damaged_latest, all_damaged, training_goes_on,
    )  # fmt: skip
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in alone}
    for how in FAILURES:
        cases[f"failing_save {how}"] = (failing_save, (how,))
    for file in (".metadata", "client_state.pt", "rank-1.pt", "__0_0.distcp"):
        cases[f"malicious {file}"] = (malicious, (file,))
    for name in cases:
        (folder / name).mkdir()
    return run_cases(WORLD_SIZE, {name: (do, (folder / name, *args)) for name, (do, args) in cases.items()})
