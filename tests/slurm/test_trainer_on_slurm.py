"""A script of Hugging Face's Trainer on a real Slurm, at ZeRO stage 3 over two nodes, loses its nodes and goes on by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from run_facts import attempts, causes, taken_again

if TYPE_CHECKING:
    from lives import Lane, Life, Told
    from whole_runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]  # of which one test waits for all lives

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hf_trainer" / "job.json"
STEPS = 400  # of some 30 ms: the preemption finds it running


def of_a_trainer(life: Life) -> Run:
    config = json.loads((EXAMPLE.parent / "ds_config.json").read_text())
    config["zero_optimization"]["stage"] = 3
    (life.runs.folder / "ds.json").write_text(json.dumps(config))
    out, ds = str(life.runs.folder / "out"), str(life.runs.folder / "ds.json")
    args = ("--output_dir", out, "--deepspeed", ds, "--max_steps", str(STEPS), "--save_steps", "1000")
    run = life.submit(target=EXAMPLE, args=args)
    life.wait_for_step(run)
    life.preempt()
    return life.wait_until_over(run)


LANES: list[Lane] = [("n1,n2", [of_a_trainer])]


def test_a_preempted_trainer_goes_on_where_it_was(told: Told) -> None:
    run = told(of_a_trainer)
    assert causes(run) == ["preempted", "finished"], run.story()
    first, second = attempts(run)
    assert first.exit_code == 75
    assert first.saved_step == first.last_step
    assert (second.first_step, second.last_step) == ((first.last_step or 0) + 1, STEPS)
    assert taken_again(run) == []
    out = run.folder.parent.parent / "out"
    logged = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, STEPS + 1))
    assert (out / "model.safetensors").exists()
