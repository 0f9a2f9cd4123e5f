"""How far a run is: the rate, the end in sight, and a file of a million lines of which only the end is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeShell
from runs_on_disk import closed, event, made, opened, steps

from hpc_ds.cluster.queue import Queue
from hpc_ds.report.progress import Progress, progress, samples_per_step, steps_in_all
from hpc_ds.report.status import Status, statuses_of
from hpc_ds.report.summary import facts, summary
from hpc_ds.tail import END_BYTES, end_of

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.run_dir import RunDir

TRAINING = {"train_batch_size": 32, "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 500}}}


def looked_at(run: RunDir, answer: str = "25|25|RUNNING|7|N/A|2030-01-31T13:45:00|n[1-2]|None\n") -> Status:
    return statuses_of([run], Queue(FakeShell({"squeue": answer, "sacct": ""})))[0]


def test_rate_and_end_of_a_running_run(tmp_path: Path) -> None:
    run = made(tmp_path, training=TRAINING)
    opened(run, 1, 1000.0)
    steps(run, 1, 1000.0, range(1, 101), 0.5)
    found = looked_at(run)
    assert (found.step, found.steps, found.step_at) == (100, 500, 1050.0)
    assert found.steps_per_s == pytest.approx(2.0)
    assert found.samples_per_s == pytest.approx(64.0)
    assert found.eta_s == pytest.approx(200.0)
    lines = facts(found, 1060.0)
    assert lines[0] == "step 100 of 500, 2 steps/s, 64 samples/s, 3 min to go"
    assert lines[1].startswith("on n[1-2], until 2030-01-31 13:45 (in ")


def test_the_rate_is_that_of_the_last_steps_of_the_last_attempt(tmp_path: Path) -> None:
    run = made(tmp_path, steps=1000)
    opened(run, 1, 1000.0)
    steps(run, 1, 1000.0, range(1, 101), 10.0)
    closed(run, 1, 2000.0, "preempted", action="requeue")
    opened(run, 2, 3000.0)
    before = looked_at(run)
    assert (before.step, before.steps_per_s, before.eta_s) == (100, None, None), "it has not taken a step yet"
    steps(run, 2, 3000.0, range(101, 121), 4.0)
    assert looked_at(run).steps_per_s == pytest.approx(0.25)
    steps(run, 2, 3080.0, range(121, 181), 1.0)
    assert looked_at(run).steps_per_s == pytest.approx(1.0)


def test_a_run_that_waits_has_no_end_in_sight_but_perhaps_a_start(tmp_path: Path) -> None:
    run = made(tmp_path, steps=1000)
    opened(run, 1, 1000.0)
    steps(run, 1, 1000.0, range(1, 11), 1.0)
    closed(run, 1, 1020.0, "preempted", action="requeue")
    found = looked_at(run, "25|25|PENDING|7|2030-01-31T13:45:00|2030-01-31T14:45:00||BeginTime\n")
    assert (found.state, found.queue_reason, found.eta_s, found.ends_at) == ("waiting", "BeginTime", None, None)
    assert found.expected_start is not None
    assert facts(found, found.expected_start - 300)[0] == "expected to start at 13:45 (in 5 min)"


@pytest.mark.parametrize(
    ("config", "in_all"),
    [
        ({}, None),
        ({"steps": 7, "training": TRAINING}, 7),
        ({"steps": None, "training": TRAINING}, 500),
        ({"training": {"scheduler": {"params": {"total_num_steps": "auto"}}}}, None),
        ({"training": {"scheduler": None}}, None),
        ({"training": "ds.json"}, None),
    ],
)
def test_where_the_end_is_known_from(config: dict[str, Any], in_all: int | None) -> None:
    assert steps_in_all(config) == in_all


TWO_NODES = {"nodes": 2, "gpus_per_node": 4}


@pytest.mark.parametrize(
    ("training", "resources", "samples"),
    [
        (None, {}, None),
        ({"train_batch_size": "auto"}, {}, None),
        ({"train_batch_size": 64}, TWO_NODES, 64),
        ({"train_micro_batch_size_per_gpu": 3}, TWO_NODES, 24),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, {"tasks_per_node": 2}, 12),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": "auto"}, {}, None),
    ],
)
def test_samples_of_a_step(training: Any, resources: dict[str, Any], samples: int | None) -> None:
    assert samples_per_step({"training": training, "resources": resources}) == samples


def test_steps_of_a_loop_of_ones_own_may_say_little() -> None:
    assert progress([{"event": "step", "step": 3}]) == Progress(step=3)
    assert progress([{"event": "step", "step": 3, "loss": math.nan, "time": 5.0}]).loss is None
    assert progress([{"event": "saved", "step": 3}]) == Progress()


LONG = 40_000


def test_of_a_long_file_only_the_end_is_read(tmp_path: Path) -> None:
    run = made(tmp_path, steps=LONG + 10)
    opened(run, 1, 1000.0)
    lines = (
        f'{{"event": "step", "attempt": 1, "time": {1000 + step}.0, "step": {step}, "loss": {8 - step / LONG}, "lr": 0.1}}\n'
        for step in range(1, LONG + 1)
    )
    run.events.write_text("".join(lines))
    with run.events.open("r+b") as file:  # what a reader of everything would fall over
        file.seek(run.events.stat().st_size // 2)
        file.write(b"\n" + b"[" * 3000)
    assert len(end_of(run.events)) < END_BYTES / 60
    found = looked_at(run)
    assert (found.step, found.steps_per_s, found.eta_s) == (LONG, 1.0, 10.0)
    story = summary(run, found)
    assert story.totals == f"{LONG} steps, 0 lost, loss 8.000 -> 7.000"
    assert len(story.curve) > 5


def test_saves_are_known_from_the_end_of_the_events_or_the_ledger(tmp_path: Path) -> None:
    run = made(tmp_path, checkpoint={"dir": str(tmp_path / "elsewhere")})
    opened(run, 1, 1000.0)
    assert looked_at(run).saved_step is None
    closed(run, 1, 1100.0, "preempted", saved_step=20)
    opened(run, 2, 1200.0)
    assert looked_at(run).saved_step == 20
    event(run, "saved", 2, 1300.0, 30)
    assert looked_at(run).saved_step == 30


def test_excluded_nodes_are_those_asked_for_and_those_found_out(tmp_path: Path) -> None:
    run = made(tmp_path, resources={"exclude": ["n9"]}, restart={"max_excluded_nodes": 1})
    for number, node in enumerate(("n1", "n2", "n1", "n2"), start=1):
        opened(run, number, 1000.0 * number)
        closed(run, number, 1000.0 * number + 10, "node_failure", node=node)
    found = looked_at(run)
    assert found.excluded_nodes == ["n9", "n2"]
    assert "not on n9, n2" in facts(found)


def test_who_failed_first_is_told_of_a_held_run(tmp_path: Path) -> None:
    run = made(tmp_path)
    opened(run, 1, 1000.0)
    last_lines = ["Traceback (most recent call last):", "ValueError: no"]
    failure = {"rank": 3, "host": "n2", "exit_code": 137, "how": "killed by SIGKILL", "last_lines": last_lines}
    closed(run, 1, 1100.0, "crashed", action="hold", detail="held", failure=failure)
    held = "25|25|SPECIAL_EXIT|0|N/A|N/A||held\n"
    found = looked_at(run, held)
    assert found.failure == {**failure, "attempt": 1, "traceback": last_lines}
    closed(run, 1, 1100.0, "crashed", failure={**failure, "traceback": ["  File 'a.py'\n    x\n", "KeyError: 'x'\n"]})
    story = summary(run, looked_at(run, held))
    assert story.failure == [
        "failed first: rank 3 on n2, killed by SIGKILL",
        "      File 'a.py'",
        "        x",
        "    KeyError: 'x'",
    ]
    assert looked_at(run, "25|25|RUNNING|7|N/A|N/A|n1|None\n").failure is None
