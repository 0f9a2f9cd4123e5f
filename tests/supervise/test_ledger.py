"""The ledger: one line when an attempt opens, one when it closes, and nothing is forgotten when neither can be written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from hpc_ds.checkpoint import writer
from hpc_ds.checkpoint.shards import Shard
from hpc_ds.report.status import status_of
from hpc_ds.run_dir import RunDir, append_line, read_lines, write_json
from hpc_ds.supervise.ledger import Attempt, close_attempt, open_attempt, outcome, read_ledger
from hpc_ds.supervise.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def achieved(run: RunDir, number: int) -> dict[str, Any]:
    """What the ledger would say of an attempt, from all that was written."""
    progress = Progress(run, number, from_begin=True)
    progress.update()
    return outcome(run, 0.0, progress)


def event(run: RunDir, kind: str, attempt: int, step: int, **fields: Any) -> None:
    append_line(run.events, {"event": kind, "attempt": attempt, "step": step, **fields})


def test_a_run_without_a_ledger_has_no_attempts(run: RunDir) -> None:
    assert read_ledger(run) == []


def test_an_attempt_is_opened_and_closed(run: RunDir) -> None:
    opened = open_attempt(run, "25", "n1", "n[1-2]")
    assert (opened.number, opened.job_id, opened.host, opened.nodes) == (1, "25", "n1", "n[1-2]")
    assert read_ledger(run) == [opened]
    close_attempt(
        run, 1, cause="walltime", action="requeue", exit_code=75, detail="walltime: queued again", last_step=9
    )
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action, closed.exit_code, closed.last_step) == ("walltime", "requeue", 75, 9)
    assert closed.opened == opened.opened
    assert closed.closed is not None
    assert closed.closed >= closed.opened
    assert [line["event"] for line in read_lines(run.ledger)] == ["opened", "closed"]


def test_attempts_are_counted_from_one(run: RunDir) -> None:
    for number in (1, 2, 3):
        assert open_attempt(run, "25", "n1", "").number == number
        close_attempt(run, number, cause="preempted")
    assert [attempt.number for attempt in read_ledger(run)] == [1, 2, 3]


def test_an_attempt_that_was_never_closed_is_closed_as_lost_by_the_next(run: RunDir) -> None:
    open_attempt(run, "25", "n1", "n1")
    for step in (1, 2, 3):
        event(run, "step", 1, step)
    event(run, "saved", 1, 2)
    assert open_attempt(run, "26", "n2", "n2").number == 2
    lost, new = read_ledger(run)
    assert (lost.cause, lost.action, lost.detail) == (
        "lost",
        "leave",
        "the supervisor was killed before it could say why",
    )
    assert (lost.first_step, lost.last_step, lost.saved_step) == (1, 3, 2)
    assert (lost.job_id, lost.host) == ("25", "n1")
    assert (new.cause, new.job_id) == (None, "26")


def test_an_attempt_whose_node_is_down_was_lost_with_it(run: RunDir) -> None:
    open_attempt(run, "25", "n1", "n[1-2]")
    open_attempt(run, "25", "n3", "n[3-4]", down=lambda nodes: [node for node in nodes if node == "n1"])
    lost = read_ledger(run)[0]
    assert (lost.cause, lost.node, lost.detail) == (
        "node_failure", "n1", "node n1 was lost, and the supervisor with it",
    )  # fmt: skip


def test_an_attempt_that_was_closed_stays_as_it_is(run: RunDir) -> None:
    open_attempt(run, "25", "n1", "n1")
    close_attempt(run, 1, cause="crashed", action="hold", detail="why")
    open_attempt(run, "25", "n1", "n1")
    assert [(attempt.cause, attempt.detail) for attempt in read_ledger(run)] == [("crashed", "why"), (None, "")]


def test_a_closing_line_torn_by_a_crash_counts_as_lost(run: RunDir) -> None:
    open_attempt(run, "25", "n1", "n1")
    with run.ledger.open("ab") as file:
        file.write(b'{"event": "closed", "number": 1, "cause": "wall')
    assert read_ledger(run)[0].cause is None
    assert open_attempt(run, "25", "n1", "n1").number == 2
    assert [attempt.cause for attempt in read_ledger(run)] == ["lost", None]


def test_lines_of_another_version_do_no_harm(run: RunDir) -> None:
    append_line(run.ledger, {"event": "opened", "number": 2, "job_id": "25", "color": "red"})
    append_line(run.ledger, {"event": "noted", "text": "no number"})
    append_line(run.ledger, {"event": "opened", "number": "1"})
    append_line(run.ledger, {"event": "opened", "number": 1})
    assert read_ledger(run) == [Attempt(1), Attempt(2, job_id="25")]


def test_the_steps_of_an_attempt(run: RunDir) -> None:
    nothing = dict.fromkeys(("first_step", "last_step", "saved_step", "first_step_s", "step_s", "save_s"))
    assert achieved(run, 1) == {**nothing, "lost_s": 0.0}
    for step in range(1, 6):
        event(run, "step", 1, step, seconds=step / 10, time=100.0 + step)
        if step == 4:
            event(run, "saved", 1, 4, seconds=2.5)
    event(run, "resumed", 2, 4)
    event(run, "step", 2, 5, seconds=9.0, time=200.0)
    event(run, "step", 2, 6, seconds=0.2)
    first, second = achieved(run, 1), achieved(run, 2)
    assert first == {
        "first_step": 1, "last_step": 5, "saved_step": 4, "first_step_s": 101.0, "step_s": 0.5, "save_s": 2.5, "lost_s": 0.5,
    }  # fmt: skip
    assert (second["first_step"], second["last_step"], second["saved_step"]) == (5, 6, 4)
    assert second["step_s"] == 0.2, "the first step waits for caches and compilers"
    event(run, "saved", 2, 6, seconds=1.0)
    assert achieved(run, 1)["saved_step"] == 4
    assert achieved(run, 2)["saved_step"] == 6
    assert achieved(run, 3)["saved_step"] == 6


def test_what_an_attempt_before_has_saved_stays_known(run: RunDir) -> None:
    """A script that saves elsewhere, and has written more since than the end of the file holds."""
    open_attempt(run, "25", "n1", "n1")
    close_attempt(run, 1, cause="preempted", saved_step=3)
    assert achieved(run, 2)["saved_step"] == 3


def test_an_event_torn_by_a_crash_does_no_harm(run: RunDir) -> None:
    event(run, "step", 1, 1)
    with run.events.open("ab") as file:
        file.write(b'{"event": "step", "attempt": 1, "st')
    assert achieved(run, 1)["last_step"] == 1


def test_a_lost_attempt_ended_with_its_last_sign_of_life(run: RunDir) -> None:
    opened = open_attempt(run, "25", "n1", "n1").opened
    append_line(run.events, {"event": "step", "attempt": 1, "step": 1, "time": opened + 50.0})
    append_line(run.events, {"event": "step", "attempt": 2, "step": 1, "time": opened + 90.0})
    append_line(run.events, {"event": "step", "attempt": 1, "step": 2})
    open_attempt(run, "26", "n2", "n2")
    open_attempt(run, "27", "n2", "n2")
    silent = RunDir(run.root / "silent")
    silent.root.mkdir()
    open_attempt(silent, "28", "n1", "n1")
    open_attempt(silent, "29", "n1", "n1")
    first, second, _ = read_ledger(run)
    assert (first.cause, first.closed) == ("lost", opened + 50.0)
    assert second.closed == opened + 90.0
    alone = read_ledger(silent)[0]
    assert alone.closed == alone.opened


def save(folder: Path, step: int) -> Path:
    shard = Shard("model.weight", (4,), 0, torch.full((4,), float(step)))
    return writer.save(folder, f"step{step}", writer.Content([shard], {}, {}, {}, step))


def known(run: RunDir, number: int) -> tuple[int | None, int | None]:
    """What the ledger and the status say."""
    return achieved(run, number)["saved_step"], status_of(run).saved_step


def test_a_save_that_nobody_was_left_to_write_of_counts(run: RunDir) -> None:
    write_json(run.config, {"name": "toy"})
    save(run.checkpoints, 2)
    event(run, "saved", 1, 2)
    save(run.checkpoints, 4)  # committed behind the training, and then the power went
    assert known(run, 1) == (4, 4)
    open_attempt(run, "25", "n1", "n1")
    open_attempt(run, "26", "n1", "n1")
    assert read_ledger(run)[0].saved_step == 4


def test_what_a_resume_passes_over_does_not_count(run: RunDir) -> None:
    write_json(run.config, {"name": "toy"})
    save(run.checkpoints, 2)
    newest = save(run.checkpoints, 4)
    event(run, "saved", 1, 4)
    (newest / "rank-0.safetensors").write_bytes(b"")
    assert known(run, 1) == (2, 2)
    (newest / "manifest.json").write_text("{")
    assert known(run, 1) == (2, 2)
    hidden = run.checkpoints / ".saving-step6-00000000"
    hidden.mkdir()
    (run.checkpoints / "step2" / "manifest.json").rename(hidden / "manifest.json")
    assert known(run, 1) == (4, 4)  # nothing is whole: what rank 0 said is all there is


def test_the_folder_that_the_job_names_is_asked(run: RunDir, tmp_path: Path) -> None:
    write_json(run.config, {"name": "toy", "checkpoint": {"dir": str(tmp_path / "elsewhere")}})
    save(run.checkpoints, 9)
    assert known(run, 1) == (None, None)
    save(tmp_path / "elsewhere", 3)
    assert known(run, 1) == (3, 3)
