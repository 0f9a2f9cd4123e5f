"""What the tests on the real Slurm share: all lives of runs, lived at the same time, and the one that was left alone."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from lives import PACED, PATIENCE_S, STEPS, Life, Told, live
from slurm_cluster import SlurmCluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from whole_runs import Run

AT_ONCE = 4
"""Lanes beside the long ones; more would only wait longer for their turn to import torch."""


def nobody_disturbs_it(life: Life) -> Run:
    """Two ranks of the paced program on two nodes, to whom nothing happens."""
    where = ("--nodes", "2", "--set", f"resources.sbatch.nodelist={','.join(life.nodes)}")
    run = life.runs.submit(PACED, "--site", "slurm", *where, "--time", "10", args=("--steps", str(STEPS)))
    return life.wait_until_over(run)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A Slurm with nodes enough for several lives at a time."""
    with SlurmCluster(tmp_path_factory.mktemp("stage"), nodes=13, cpus_per_node=8) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def told(request: pytest.FixtureRequest, stage: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The lives of all modules that are tested: LONG_LANES, which mostly wait, beside LANES; then LAST_LANES."""
    modules = list(dict.fromkeys(item.module for item in request.session.items if isinstance(item, pytest.Function)))
    long, short, last = (
        [lane for module in modules for lane in getattr(module, name, [])]
        for name in ("LONG_LANES", "LANES", "LAST_LANES")
    )
    folders = [tmp_path_factory.mktemp(name) for name in ("long", "short", "last")]
    with ThreadPoolExecutor(1) as beside:
        longs = beside.submit(live, stage, folders[0], long, max(1, len(long)))
        wait_for_steps(folders[0], len(long), longs)
        shorts = live(stage, folders[1], [("n9,n10", [nobody_disturbs_it]), *short], AT_ONCE)
    stage.reset()
    return longs.result() + shorts + live(stage, folders[2], last, 1)


def wait_for_steps(folder: Path, count: int, longs: Future[Told]) -> None:
    """Wait until so many runs train: their limit of two minutes counts from the start of the job, so that is left alone."""
    end = time.monotonic() + PATIENCE_S
    while not longs.done() and time.monotonic() < end:
        events = [file.read_text() for file in folder.glob("*/runs/*/events.jsonl")]
        if sum('"event": "step"' in text for text in events) == count:
            break
        time.sleep(0.25)


@pytest.fixture(scope="session")
def left_alone(told: Told) -> Run:
    """The run with which the disturbed ones are compared."""
    run: Run = told(nobody_disturbs_it)
    assert run.status()["state"] == "finished", run.story()
    return run
