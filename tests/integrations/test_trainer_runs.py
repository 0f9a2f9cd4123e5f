"""A Trainer's script that knows of nothing, as a run of hpcds: disturbed in every way, it ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Run, Runs

from hpc_ds.integrations.trainer_folders import mark_of

pytestmark = pytest.mark.local

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hf_trainer" / "job.json"
STEPS = 60
LOGGED = ("loss", "grad_norm", "learning_rate", "epoch")


def submit(runs: Runs, out: Path, *options: str, stage: int = 2) -> Run:
    config = json.loads((EXAMPLE.parent / "ds_config.json").read_text())
    config["zero_optimization"]["stage"] = stage
    (runs.folder / "ds.json").write_text(json.dumps(config))
    args = ("--deepspeed", str(runs.folder / "ds.json"), "--output_dir", str(out), "--max_steps", str(STEPS))
    return runs.submit(EXAMPLE, *options, args=(*args, "--save_steps", "7", "--save_total_limit", "2"))


def history(out: Path) -> list[tuple[float, ...]]:
    """What the Trainer itself has logged of every step."""
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [tuple(entry[key] for key in LOGGED) for entry in state["log_history"] if "loss" in entry]


def kill_while_saving(run: Run, out: Path, after_attempt: int) -> None:
    """kill -9 of a rank while a checkpoint is half-written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        attempts = [step["attempt"] for step in run.steps()[-1:]]
        if attempts and attempts[0] > after_attempt and any(out.glob(".checkpoint-*.unfinished")):
            pid, _ = json.loads((run.folder / "local" / "step.json").read_text())["ranks"][1]
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.002)
    raise AssertionError(run.story())


def disturb(run: Run, out: Path) -> None:
    run.wait_for_step(9)
    run.hpcds("preempt", str(run.folder))
    kill_while_saving(run, out, after_attempt=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path]]:
    """An undisturbed run and a disturbed one, at the same time."""
    told: dict[str, tuple[Run, Path]] = {}
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path_factory.mktemp(name)
        told[name] = submit(Runs(folder, os.environ), folder / "out", "--site", "local"), folder / "out"
    disturb(*told["disturbed"])
    for run, _ in told.values():
        assert run.wait_until_over()["state"] == "finished", run.story()
    return told


def test_it_learns_as_if_it_had_not_been_disturbed(runs: dict[str, tuple[Run, Path]]) -> None:
    (_, calm), (run, out) = runs["undisturbed"], runs["disturbed"]
    assert len(history(calm)) == STEPS
    assert history(out) == history(calm), run.story()
    assert (out / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()


def test_a_preemption_costs_no_step_and_a_kill_those_since_the_last_whole_save(
    runs: dict[str, tuple[Run, Path]],
) -> None:
    run, _ = runs["disturbed"]
    attempts: list[dict[str, Any]] = run.status()["attempts"]
    assert [attempt["cause"] for attempt in attempts] == ["preempted", "crashed", "finished"]
    assert attempts[0]["last_step"] == attempts[0]["saved_step"] == attempts[1]["first_step"] - 1
    assert attempts[2]["first_step"] == attempts[1]["saved_step"] + 1
    assert attempts[1]["last_step"] - attempts[1]["saved_step"] <= 7


def test_only_whole_checkpoints_are_left(runs: dict[str, tuple[Run, Path]]) -> None:
    for run, out in runs.values():
        left = sorted(path.name for path in out.glob("checkpoint-*") if not mark_of(path).exists())
        assert f"checkpoint-{STEPS}" in left, run.story()
        for name in left:
            made = json.loads((out / name / "hpc_ds.json").read_text())
            assert made["run"] == str(run.folder)
            assert (out / name / "rng_state_1.pth").exists()
