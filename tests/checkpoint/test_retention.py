"""What stays of many checkpoints, and that a crash while removing leaves none half."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import content, flip, load, names, said, save

from hpc_ds.checkpoint import commit, layout, retention, writer
from hpc_ds.checkpoint.retention import Keep

if TYPE_CHECKING:
    from pathlib import Path


def save_by(folder: Path, step: int, maker: str | None) -> None:
    writer.save(folder, f"step{step}", content(step, state={"global_steps": step, "made_by": maker}))


def steps(folder: Path) -> list[int]:
    return sorted(int(name.removeprefix("step")) for name in names(folder) if name.startswith("step"))


def test_the_newest_stay_and_files_of_others_too(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "step1" / layout.MANIFEST).write_text("{damaged")
    found = {}
    for keep in (4, 3, 2, 1, 0, -1):
        removed = retention.prune(tmp_path, Keep(keep))
        found[keep] = removed, steps(tmp_path)
    assert found == {
        4: ([], [1, 2, 9, 10]),
        3: (["step1"], [2, 9, 10]),  # the damaged one goes first
        2: (["step2"], [9, 10]),
        1: (["step10"], [9]),  # latest names step9
        0: ([], [9]),
        -1: ([], [9]),
    }
    assert names(tmp_path) == ["file", "latest", "notes", "step9"]
    assert load(tmp_path) == ("step9", 9)
    assert retention.prune(tmp_path / "no such folder", Keep(1)) == []
    assert retention.prune(tmp_path / "file", Keep(1)) == []


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step)
    assert retention.prune(tmp_path, Keep(2, every_steps=3)) == ["step7", "step5", "step4", "step2", "step1"]
    assert steps(tmp_path) == [3, 6, 8, 9]


def test_a_pinned_one_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    retention.pin(tmp_path, "step1")
    retention.pin(tmp_path, "step1")
    assert retention.prune(tmp_path, Keep(1)) == ["step2"]
    assert load(tmp_path, "step1") == ("step1", 1)
    save(tmp_path, 1)  # under the same name: the mark stays
    save(tmp_path, 4)
    assert retention.prune(tmp_path, Keep(1)) == ["step3"]
    retention.unpin(tmp_path, "step1")
    retention.unpin(tmp_path, "step1")
    assert retention.prune(tmp_path, Keep(1)) == ["step1"]
    assert steps(tmp_path) == [4]


def test_what_is_no_checkpoint_cannot_be_pinned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "notes").mkdir()
    assert "no such checkpoint; there are 'step1'" in said(lambda: retention.pin(tmp_path, "step2"))
    assert "none of ours" in said(lambda: retention.pin(tmp_path, "notes"))
    assert "not a folder name" in said(lambda: retention.unpin(tmp_path, "../x"))


def test_a_pin_in_the_last_moment_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning has decided; before it acts, the user pins."""
    for step in (1, 2):
        save(tmp_path, step)

    def slowly(path: Path) -> bool:
        retention.pin(tmp_path, path.name)
        return commit.remove(path)

    monkeypatch.setattr(retention, "remove", slowly)
    assert retention.prune(tmp_path, Keep(1)) == []
    assert steps(tmp_path) == [1, 2]


def test_the_last_whole_one_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    for step in (3, 4, 5):
        (tmp_path / f"step{step}" / "rank-0.safetensors").unlink()
    assert retention.prune(tmp_path, Keep(2)) == ["step3", "step1"]
    assert steps(tmp_path) == [2, 4, 5]
    assert load(tmp_path) == ("step2", 2)


def test_a_run_removes_only_what_it_made_by_itself(tmp_path: Path) -> None:
    for step, maker in enumerate(("run", "other", None, "run", "other", None, "run"), start=1):
        save_by(tmp_path, step, maker)
    assert retention.to_remove(tmp_path, Keep(1), "run") == [tmp_path / "step4", tmp_path / "step1"]
    assert retention.prune(tmp_path, Keep(1), "run") == ["step4", "step1"]
    assert steps(tmp_path) == [2, 3, 5, 6, 7]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["whole", "damaged", "pinned"])), min_size=1, max_size=7),
    st.integers(0, 4),
    st.none() | st.integers(1, 5),
)
def test_whatever_is_pruned_the_newest_whole_one_loads(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, str]], last: int, every: int | None
) -> None:
    folder = tmp_path_factory.mktemp("prune")
    kinds = dict(made)
    for step, kind in kinds.items():
        path = save(folder, step, save_latest=False)
        if kind == "damaged":
            os.truncate(path / "rank-0.safetensors", 9)
        elif kind == "pinned":
            retention.pin(folder, path.name)
    retention.prune(folder, Keep(last, every))
    left = steps(folder)
    whole = [step for step, kind in kinds.items() if kind != "damaged"]
    assert not whole or max(whole) in left
    assert {step for step, kind in kinds.items() if kind == "pinned"} <= set(left)
    assert len(left) >= min(max(last, 1), len(kinds))


@pytest.mark.ranks
def test_a_crash_while_removing_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """Killed at each of its file operations in turn: every checkpoint that is to be seen is whole."""
    for number in range(100):
        folder = tmp_path / str(number)
        for step in (1, 2, 3):
            save(folder, step)
        child = multiprocessing.get_context("forkserver").Process(target=prune_and_die, args=(folder, number))
        child.start()
        child.join(120)
        finished = child.exitcode == 0
        for step in steps(folder):
            assert load(folder, f"step{step}") == (f"step{step}", step)
        assert load(folder) == ("step3", 3)
        if finished:
            assert number > 6
            assert names(folder) == ["latest", "step3"]
            return
        save(folder, 4)
        assert not [name for name in names(folder) if name.startswith(".")]
    raise AssertionError("it never got through")


def prune_and_die(folder: Path, number: int) -> None:
    """Prune, and be gone at the file operation of that number."""
    left = iter(range(number))
    sys.addaudithook(lambda event, _: os._exit(9) if event in OPERATIONS and next(left, None) is None else None)
    retention.prune(folder, Keep(1))
    os._exit(0)


OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"}


def test_a_listing_says_what_a_look_at_the_files_shows(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step2" / "rank-0.json").unlink()
    flip(tmp_path / "step1" / layout.MANIFEST, 3)
    found = {path.name: (saved and saved.step, damage) for path, saved, damage in layout.listed(tmp_path)}
    assert found["step3"] == (3, None)
    assert found["step2"] == (2, "rank-0.json cannot be read: No such file or directory")
    assert found["step1"][0] is None
    assert "manifest.json" in (found["step1"][1] or "")


LIGHT = ("layout", "index", "stored", "commit", "retention", "blocks", "blockwise", "verify")


def test_looking_and_pruning_need_no_torch() -> None:
    lines = [
        *(f"import hpc_ds.checkpoint.{module}" for module in LIGHT),
        "import sys, json",
        "print(json.dumps(sorted(sys.modules)))",
    ]
    fresh = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "pydantic"} & set(json.loads(fresh.stdout)) == set()
