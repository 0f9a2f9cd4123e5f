"""A script that knows of DeepSpeed alone, as a run of hpcds: preempted before any save of its own, it ends as if it were not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from whole_runs import Run, Runs

pytestmark = pytest.mark.local

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "deepspeed_script" / "job.json"
STEPS = 150


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """An undisturbed run and a preempted one, at the same time."""
    told = {}
    for name in ("undisturbed", "preempted"):
        folder = tmp_path_factory.mktemp(name)
        args = ("--steps", str(STEPS), "--save_dir", str(folder / "saves"))
        config = ("--deepspeed_config", str(EXAMPLE.parent / "ds_gpt.json"))
        told[name] = Runs(folder, os.environ).submit(EXAMPLE, "--site", "local", args=(*args, *config))
    told["preempted"].wait_for_step(5)
    told["preempted"].hpcds("preempt", str(told["preempted"].folder))
    for run in told.values():
        assert run.wait_until_over()["state"] == "finished", run.story()
    return told


def test_no_step_is_lost_and_none_taken_twice(runs: dict[str, Run]) -> None:
    attempts = [
        (line["number"], line["cause"]) for line in runs["preempted"].lines("attempts.jsonl") if "cause" in line
    ]
    assert attempts == [(1, "preempted"), (2, "finished")]
    assert [event["step"] for event in runs["preempted"].steps()] == list(range(1, STEPS + 1))


def test_it_learns_to_the_bit_what_it_would_have(runs: dict[str, Run]) -> None:
    assert len(runs["undisturbed"].losses()) == STEPS
    assert runs["preempted"].losses() == runs["undisturbed"].losses()
