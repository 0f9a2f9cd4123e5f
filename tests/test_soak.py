"""A soak of a few random events on site local; `make test-long` lets thirty come over a run on Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"
LONG = os.environ.get("HPCDS_LONG") == "1"


def soak(folder: Path, *args: str, timeout_s: float) -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--folder", str(folder / "s"), *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    plan, *events, whole = [json.loads(line) for line in done.stdout.splitlines()] or [{}, {}]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["kind"] for event in events] == plan["plan"]
    assert whole["ok"]
    assert whole["attempts"] == 1 + sum(event["kind"] != "controller" for event in events)


@pytest.mark.local
def test_four_random_events(tmp_path: Path) -> None:
    soak(
        tmp_path,
        "--site",
        "local",
        "--events",
        "4",
        "--kinds",
        "preempt,requeue,term,kill_rank,kill_all",
        timeout_s=580,
    )


@pytest.mark.slurm
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not LONG, reason="half an hour; HPCDS_LONG=1, or make test-long")
def test_thirty_random_events_on_slurm(tmp_path: Path) -> None:
    soak(tmp_path, "--site", "slurm", "--events", "30", timeout_s=3500)
