"""A script that ends while a save is being written behind it, as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toys import names

from hpc_ds.checkpoint import verify

pytestmark = pytest.mark.ranks

SCRIPT = str(Path(__file__).with_name("leaves.py"))
FOREVER_S = 300.0  # a rank that has not ended by then hangs
WAYS = ("workers", "raises", "is killed")
Runs = dict[str, tuple[Path, list[tuple[int, str]]]]


def start(root: Path, how: str) -> list[subprocess.Popen[str]]:
    """The script on two ranks, in a run that saves every two steps."""
    training = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    (root / "config.json").write_text(json.dumps({"checkpoint": {"every_steps": 2}, "training": training}))
    processes = []
    for rank in range(2):
        own: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        own |= {"HPCDS_RUN_DIR": root, "HPCDS_ATTEMPT": 1, "CUDA_VISIBLE_DEVICES": ""}
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        processes.append(subprocess.Popen([sys.executable, SCRIPT, how], env=env, stderr=subprocess.PIPE, text=True))
    return processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All ways to end at once: the run folder, and for each rank the exit code and what it said."""
    started: dict[str, tuple[Path, list[subprocess.Popen[str]]]] = {}
    try:
        for how in WAYS:
            root = tmp_path_factory.mktemp("run")
            started[how] = root, start(root, how)
        return {
            how: (
                root,
                [(process.communicate(timeout=FOREVER_S)[1], process.returncode)[::-1] for process in processes],
            )
            for how, (root, processes) in started.items()
        }
    finally:
        for _, processes in started.values():
            for process in processes:
                process.kill()


def is_whole(path: Path) -> bool:
    return verify.damages(verify.open_whole(path)) == []


def test_a_script_that_ends_finishes_its_save_also_when_workers_were_forked_meanwhile(runs: Runs) -> None:
    root, ended = runs["workers"]
    assert [code for code, _ in ended] == [0, 0], ended
    assert names(root / "checkpoints") == ["global_step2", "latest"]
    assert is_whole(root / "checkpoints" / "global_step2")
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events[1:]] == [("step", 1), ("step", 2), ("saved", 2)]


def test_a_script_that_fails_on_one_rank_finishes_its_save_too(runs: Runs) -> None:
    root, [(first, said), (second, fault)] = runs["raises"]
    assert second == 1
    assert "RuntimeError: a fault of the script" in fault
    assert first == 1, said
    assert names(root / "checkpoints") == ["global_step2", "latest"]
    assert is_whole(root / "checkpoints" / "global_step2")


def test_a_rank_that_is_killed_leaves_nothing_half_done(runs: Runs) -> None:
    root, [(first, said), (second, _)] = runs["is killed"]
    assert second == -9
    assert first == 1, said
    assert names(root / "checkpoints") == []


@pytest.mark.parametrize("how", WAYS)
def test_the_save_was_under_way(runs: Runs, how: str) -> None:
    root, ended = runs[how]
    assert [(root / f"state-{rank}").read_text() for rank in range(2)] == ["running", "running"], ended
