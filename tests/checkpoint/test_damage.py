"""Whatever happens to a file is noticed, the checkpoint before it is taken, and no file can make code run."""

from __future__ import annotations

import ast
import itertools
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from toys import SHAPES, flip, load, names, on_first, said, save, save_as, values, warnings_said

from hpc_ds.checkpoint import index, layout, reader, verify
from hpc_ds.checkpoint.shards import Shard
from hpc_ds.errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = ("rank-0.safetensors", "rank-1.safetensors", "rank-0.json", "rank-1.json", "manifest.json")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, path.stat().st_size - 1),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 3),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of two steps, each of two ranks."""
    folder = tmp_path / "saves"
    save_as(2, folder, 1)
    save_as(2, folder, 2)
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_whatever_is_damaged_the_one_before_is_loaded(two: Path, file: str, kind: str) -> None:
    DAMAGES[kind](two / "step2" / file)
    with warnings_said() as lines:
        assert load(two) == ("step1", 1)
    if (file, kind) != ("manifest.json", "missing"):  # without it there is no checkpoint to speak of
        assert len(lines) == 1
        assert file in lines[0]
        assert lines[0].endswith("; trying the one before")
    assert file in said(lambda: load(two, "step2"))
    assert verdict(two / "step2")


def verdict(path: Path) -> str | None:
    """What a verification without torch or ranks says."""
    try:
        return next(iter(verify.damages(verify.open_whole(path))), None)
    except CheckpointError as error:
        return str(error)


def test_any_wrong_bit_anywhere_is_noticed(two: Path) -> None:
    """The fuzz: one bit at a time, at random places of every file and at every place of the small headers."""
    dice = random.Random(20)
    for file in FILES:
        path = two / "step2" / file
        whole = path.read_bytes()
        for place in [*range(16), *dice.sample(range(len(whole)), 40)]:
            flip(path, place)
            assert verdict(two / "step2") is not None, (file, place)
            path.write_bytes(whole)
    assert verdict(two / "step2") is None


def test_any_cut_is_noticed(two: Path) -> None:
    dice = random.Random(21)
    for file in FILES:
        path = two / "step2" / file
        whole = path.read_bytes()
        for length in [0, 1, len(whole) - 1, *dice.sample(range(len(whole)), 20)]:
            path.write_bytes(whole[:length])
            assert verdict(two / "step2") is not None, (file, length)
            path.write_bytes(whole)
    assert verdict(two / "step2") is None


def test_any_two_files_that_are_swapped_are_noticed(two: Path) -> None:
    """Within a checkpoint, and with the one of another step that has the very same shapes."""
    everywhere = [two / tag / file for tag in ("step1", "step2") for file in FILES]
    for one, other in itertools.combinations(everywhere, 2):
        swap(one, other)
        assert any(verdict(two / tag) is not None for tag in ("step1", "step2")), (one, other)
        swap(one, other)
    assert [verdict(two / tag) for tag in ("step1", "step2")] == [None, None]


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_file_of_another_save_of_the_same_values_is_noticed(tmp_path: Path) -> None:
    """Training that does not move writes the same bytes twice: only the id tells the saves apart."""
    for tag in ("a", "b"):
        save_as(2, tmp_path, 1, tag)
    swap(tmp_path / "a" / "manifest.json", tmp_path / "b" / "manifest.json")
    assert [verdict(tmp_path / tag) is not None for tag in ("a", "b")] == [True, True]


def test_latest_is_a_hint_only(two: Path) -> None:
    found = {}
    for text in (b"\xff\xfe\x00", b"", b"step7", b"step1", b"../step1", b"step2\n"):
        (two / "latest").write_bytes(text)
        found[text] = load(two), layout.newest_step(two)
    newest, named = (("step2", 2), 2), (("step1", 1), 1)
    assert found == {text: named if text == b"step1" else newest for text in found}
    (two / "latest").unlink()
    assert load(two) == ("step2", 2)


def test_none_whole_is_an_error_and_no_fresh_start(two: Path) -> None:
    for tag in ("step1", "step2"):
        flip(two / tag / "rank-1.json", 9)
    with warnings_said():
        error = said(lambda: load(two))
    assert error.startswith(f"checkpoint folder {str(two)!r}: none of its 2 checkpoints is whole")


def test_bytes_that_nobody_wants_are_checked_unless_told_not_to(two: Path) -> None:
    """A part of one tensor is wanted; the damage is in another one, at the end of the last file."""
    path = two / "step2" / "rank-1.safetensors"
    flip(path, path.stat().st_size - 1)

    def want(_stored: Any) -> list[Shard]:
        return [Shard("model.long", SHAPES["model.long"], 0, torch.zeros(9))]

    with warnings_said():
        loaded = reader.load(two, None, want)
    assert loaded is not None
    assert loaded.stored.step == 1
    # In a checkpoint this small the damaged block is one that is read for the client state's sake: so look at find alone.
    found = reader.find(two)
    assert found is not None
    assert found.step == 2
    data = torch.zeros(9)
    assert reader.read_into(found, [Shard("model.long", SHAPES["model.long"], 0, data)]) is None
    assert torch.equal(data, values("model.long", 2)[:9])


def test_two_checkpoints_are_never_mixed(two: Path) -> None:
    """What was filled from a damaged checkpoint and is not in the one before must not stay."""
    path = two / "step2" / "rank-1.safetensors"
    flip(path, path.stat().st_size - 1)
    want = {1: ["model.long"], 2: ["model.long", "model.wide"]}

    def wanted_of(stored: Any) -> list[Shard]:
        return [Shard(n, SHAPES[n], 0, torch.zeros(values(n, 1).numel())) for n in want[stored.step]]

    with warnings_said():
        error = said(lambda: reader.load(two, None, wanted_of))
    assert "'model.wide' was filled from a newer checkpoint that turned out to be damaged" in error


# malice: files that fit their checksums


class Malice:
    """Unpickled freely, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def forge(path: Path, file: str, data: bytes) -> None:
    """Replace a file and make the manifest fit."""
    (path / file).write_bytes(data)
    manifest = json.loads((path / layout.MANIFEST).read_text())
    text = (path / layout.index_file(0)).read_bytes()
    size = (path / layout.data_file(0)).stat().st_size
    manifest["files"].update(index.described(0, text, size))
    layout.write_manifest(path, manifest)


def reforge(path: Path, **changes: Any) -> None:
    """Change the manifest and seal it again."""
    layout.write_manifest(path, {**json.loads((path / layout.MANIFEST).read_text()), **changes})


@pytest.mark.parametrize("file", ["rank-0.safetensors", "rank-0.json", "manifest.json"])
def test_a_pickle_in_place_of_any_file_runs_nothing(tmp_path: Path, file: str) -> None:
    path, mark = save(tmp_path / "saves", 1), tmp_path / "mark"
    pickled = pickle.dumps(Malice(mark))
    if file == "manifest.json":
        (path / file).write_bytes(pickled)
    else:
        forge(path, file, pickled)
    assert verdict(path) is not None
    assert said(lambda: load(tmp_path / "saves", "step1"))
    assert not mark.exists()


def test_malice_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "mark")))  # noqa: S301 - that is the point
    assert (tmp_path / "mark").exists()


def test_one_file_of_the_room_unpickles_and_only_with_a_list_of_names() -> None:
    """torch's own files are read by torch_file.py; that its unpickler admits nothing else is tested beside it."""
    room = Path(layout.__file__).parent
    modules = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in room.glob("*.py")}
    bases = {name: [ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
             for name, tree in modules.items()}  # fmt: skip
    assert {name for name, found in bases.items() if any("Unpickler" in base for base in found)} == {"torch_file.py"}
    calls = {
        ast.unparse(node.func) for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    assert calls & {"pickle.load", "pickle.loads", "torch.load", "pickle.Unpickler"} == set()


FORGED_STATES: list[Any] = [
    {"<object>": ["os", "system"]},
    {"<tensor>": 99},
    {"<ndarray>": ["O", [1], "AAAAAAAAAAA="]},
    {"<tuple>": 5},
]


@pytest.mark.parametrize("state", FORGED_STATES)
def test_a_forged_client_state_is_refused(tmp_path: Path, state: Any) -> None:
    path = save(tmp_path, 1)
    reforge(path, client_state=state)
    assert "its client or rank state is not in a form that is read" in said(lambda: load(tmp_path, "step1"))


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path / "saves", 1)
    manifest = json.loads((path / layout.MANIFEST).read_text())
    files = {f"../../{name}": entry for name, entry in manifest["files"].items()}
    for name in manifest["files"]:
        shutil.copy(path / name, tmp_path / name)
    reforge(path, files=files)
    assert "does not name the files of 1 ranks" in said(lambda: load(tmp_path / "saves", "step1"))
    for tag in ("../saves/step1", "/etc", "..", ""):
        assert "not a folder name" in said(lambda tag=tag: load(tmp_path / "saves", tag))


def test_a_forged_index_cannot_ask_for_more_than_there_is(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    table = json.loads((path / "rank-0.json").read_text())
    for change in (
        {"shape": [1 << 50], "length": 1 << 50},
        {"offset": -4},
        {"start": -1},
        {"dtype": "OBJECT"},
        {"more": 1},
    ):
        entries = [{**table["entries"][0], **change}, *table["entries"][1:]]
        forge(path, "rank-0.json", json.dumps({**table, "entries": entries}).encode())
        assert "rank-0.json is no index" in said(lambda: load(tmp_path, "step1"))
    forge(path, "rank-0.json", b"[" * 100_000)
    assert "rank-0.json is no index" in said(lambda: load(tmp_path, "step1"))


def test_damage_is_an_error_of_its_own_kind(two: Path) -> None:
    (two / "step2" / "rank-1.json").unlink()
    with pytest.raises(DamagedError) as raised:
        verify.open_whole(two / "step2")
    assert raised.value.damage == "rank-1.json cannot be read: No such file or directory"
    assert raised.value.exit_code == 4


# ranks


def damaged(rank: int, folder: Path) -> dict[str, Any]:
    """Damage that one rank alone sees, because it alone reads those bytes."""
    save(folder, 1)
    save(folder, 2)
    found = {}
    for file in FILES:
        whole = (folder / "step2" / file).read_bytes()
        on_first(lambda file=file: flip(folder / "step2" / file, -1))
        with warnings_said() as lines:
            found[file] = load(folder), lines, said(lambda: load(folder, "step2"))
        on_first(lambda file=file, whole=whole: (folder / "step2" / file).write_bytes(whole))
    return {**found, "whole": load(folder), "names": names(folder), "rank": dist.get_rank()}


@pytest.mark.ranks
def test_all_ranks_take_the_same_decision(tmp_path: Path) -> None:
    outcomes: Outcomes = run_cases(2, {"damaged": (damaged, (tmp_path,))})
    first, second = outcomes["damaged"]
    for file in FILES:
        assert first[file][0] == second[file][0] == ("step1", 1)
        assert first[file][2] == second[file][2]
        assert [len(first[file][1]), len(second[file][1])] == [1, 0]
    assert first["whole"] == second["whole"] == ("step2", 2)
    assert first["names"] == ["latest", "step1", "step2"]
