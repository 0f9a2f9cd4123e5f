"""Saves that the engine makes by itself, as the job of its run asks."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import hpc_ds
import hpc_ds.compat
from hpc_ds.checkpoint import writer
from hpc_ds.runtime import preemption


def train_in_a_run(rank: int, folder: str, checkpoints: str, steps: int) -> list[dict[str, Any]]:
    """Take some steps inside a run that saves every two; returns the events that rank 0 wrote."""
    os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"] = folder, "1"
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    if rank == 0:
        job = {"checkpoint": {"dir": checkpoints, "every_steps": 2, "keep": 2}, "training": config}
        Path(folder, "config.json").write_text(json.dumps(job))
    torch.distributed.barrier()
    engine, *_ = hpc_ds.initialize(model=torch.nn.Linear(3, 1))
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 3)).mean())
        engine.step()
    engine.wait_for_checkpoint()
    lines = Path(folder, "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.ranks
def test_it_saves_every_so_many_steps_and_keeps_the_newest(tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    events = run_ranks(train_in_a_run, 2, str(tmp_path), str(saves), 7)[0]
    assert [event["step"] for event in events if event["event"] == "saved"] == [2, 4, 6]
    assert sorted(path.name for path in saves.iterdir()) == ["global_step4", "global_step6", "latest"]


@pytest.mark.ranks
def test_a_save_that_fails_is_told_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    events = run_ranks(train_in_a_run, 2, str(tmp_path), str(tmp_path / "file" / "saves"), 5)[0]
    failed = [event for event in events if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [2, 4]
    assert "Not a directory" in failed[0]["error"]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5]


def stop_before_a_save_can_end(_rank: int, folder: str, every_steps: int | None) -> dict[str, Any]:
    """Told to end at step 3, when a save is believed to last longer than there is time; that of step 2 may be under way."""
    os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"] = folder, "1"
    job = {"checkpoint": {"every_steps": every_steps}}
    Path(folder, "config.json").write_text(json.dumps(job))
    may_end, finish = threading.Event(), writer.finish

    def held_up(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            may_end.wait()
        return finish(*arguments)

    writer.finish = held_up  # type: ignore[assignment]
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = hpc_ds.initialize(model=torch.nn.Linear(3, 1), config=config)
    engine._checkpoints.cost.durable_s = 1e6
    wait = engine._checkpoints.wait
    engine._checkpoints.wait = lambda: (may_end.set() if preemption.told_to_stop() else None, wait())
    try:
        for step in (1, 2, 3):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            engine.backward(engine(torch.ones(1, 3)).mean())
            engine.step()
    except hpc_ds.Preempted as stop:
        events = [json.loads(line) for line in Path(folder, "events.jsonl").read_text().splitlines()]
        return {"said": str(stop), "stopped": [event["step"] for event in events if event["event"] == "stopped"]}
    return {}


@pytest.mark.ranks
@pytest.mark.parametrize(("every_steps", "saved"), [(None, 3), (2, 2)])
def test_what_is_saved_on_a_stop_is_what_is_told(tmp_path: Path, every_steps: int | None, saved: int) -> None:
    """Where nothing is being written a save is tried, however long it is believed to last."""
    (told,) = run_ranks(stop_before_a_save_can_end, 1, str(tmp_path), every_steps)
    assert told == {"said": f"checkpointed step {saved} on SIGTERM", "stopped": [saved]}
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"global_step{saved}"


def left_to_the_caller(rank: int, folder: str) -> list[tuple[bool, bool]]:
    """A job that saves every two steps, and one rank told to stop in the third, while somebody else does what it asks."""
    os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"] = folder, "1"
    if rank == 0:
        Path(folder, "config.json").write_text(json.dumps({"checkpoint": {"every_steps": 2}}))
    torch.distributed.barrier()
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = hpc_ds.initialize(model=torch.nn.Linear(3, 1), config=config)
    engine.leave_stops_to_the_caller()
    asked = [(engine.stop_agreed, engine.save_due)]
    for step in (1, 2, 3, 4):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        engine.backward(engine(torch.ones(1, 3)).mean())
        engine.step()
        asked.append((engine.stop_agreed, engine.save_due))
    return asked


@pytest.mark.ranks
def test_saves_and_stops_may_be_left_to_the_caller(tmp_path: Path) -> None:
    asked = run_ranks(left_to_the_caller, 2, str(tmp_path))
    assert asked == [[(False, False), (False, False), (False, True), (True, False), (True, True)]] * 2
    assert not (tmp_path / "checkpoints").exists()


def started_again(_rank: int, folder: str) -> list[list[str]]:
    """Warnings of three starts: the first, one that does not load, and one that does."""
    os.environ["HPCDS_RUN_DIR"] = folder
    Path(folder, "config.json").write_text(json.dumps({"checkpoint": {"every_steps": 2, "async": False}}))
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    told: list[list[str]] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told[-1].append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hpc_ds").addHandler(handler)
    for attempt in (1, 2, 3):
        told.append([])
        os.environ["HPCDS_ATTEMPT"] = str(attempt)
        engine, *_ = hpc_ds.initialize(model=torch.nn.Linear(3, 1), config=config)
        if attempt == 3:
            engine.load_checkpoint()
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 3)).mean())
            engine.step()
    return told


@pytest.mark.ranks
def test_a_run_started_again_that_loads_nothing_is_told_once(tmp_path: Path) -> None:
    ((first, second, third),) = run_ranks(started_again, 1, str(tmp_path))
    assert first == third == []
    (warning,) = second
    assert warning.startswith(f"attempt 2 of this run trains from the beginning, and the checkpoints of {tmp_path}")
    assert warning.endswith("are not used; call engine.load_checkpoint() before the first step")


def start_counting() -> Any:
    config = {
        "train_batch_size": 3,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    data = [torch.ones(3)] * 9  # three steps of an epoch
    return hpc_ds.initialize(model=torch.nn.Linear(3, 1), config=config, training_data=data)[0]


def train(engine: Any, until: int) -> None:
    while engine.global_steps < until:
        for batch in engine.training_dataloader:
            engine.backward(engine(batch).mean())
            engine.step()
            if engine.global_steps == until:
                break


def saved_last(folder: str | None = None) -> Any:
    return start_counting().load_checkpoint(folder)[1]


def counted(_rank: int, folder: str) -> dict[str, Any]:
    """What a script finds in client_state after saves that its run made, and after its own that give none."""
    os.environ["HPCDS_RUN_DIR"], os.environ["HPCDS_ATTEMPT"] = folder, "1"
    Path(folder, "config.json").write_text(json.dumps({"checkpoint": {"every_steps": 2, "async": False}}))
    engine, elsewhere, found = start_counting(), folder + "/elsewhere", {}
    train(engine, 1)
    engine.save_checkpoint(elsewhere, client_state={"step": 1})
    train(engine, 3)
    engine.save_checkpoint(elsewhere)
    found["native, given none"] = saved_last(elsewhere)
    engine = start_counting()
    train(engine, 2)
    found["native, before the first"] = saved_last()
    hpc_ds.compat.activate()
    import deepspeed  # noqa: F401 - a script that knows no other name

    found["before the first"] = engine.load_checkpoint()[1]
    train(engine, 3)
    engine.save_checkpoint(client_state=GOING | STAYING)
    for until in (6, 8):
        train(engine, until)
        engine = start_counting()
        found[f"step {until}"] = engine.load_checkpoint()[1]
    for until in (8, 10):
        train(engine, until)
        engine.save_checkpoint(client_state={"step": until, "num_steps": 10, "iteration": 8})
    train(engine, 11)
    engine.save_checkpoint()
    found["given none"] = saved_last()
    train(engine, 12)
    found["step 12"] = saved_last()
    return found


GOING = {"epoch": 0, "step": 3, "last_iter": 2, "micro_step": 9, "Consumed_Samples": 9}
STAYING = {
    "max_steps": 3, "best_step": 3, "steps_per_epoch": 3, "warmup_steps": 2, "total_iterations": 9, "save_iter": 3,
    "num_samples": 9, "num_epochs": 1, "epochs": 1, "itertools": 3, "lr_step": True,
}  # fmt: skip


@pytest.mark.ranks
def test_numbers_of_the_script_that_count_steps_go_on_in_saves_of_the_run(tmp_path: Path) -> None:
    (found,) = run_ranks(counted, 1, str(tmp_path))
    assert found["native, before the first"] == {}
    steps = dict.fromkeys(("step", "steps", "global_step", "global_steps", "iteration", "iter"), 2)
    assert found["before the first"] == {**steps, "samples": 6, "epoch": -1}  # no epoch is whole yet
    assert found["step 6"] == {
        **STAYING, "epoch": 1, "step": 6, "last_iter": 5, "micro_step": 18, "Consumed_Samples": 18,
    }  # fmt: skip
    assert found["step 8"] == {
        **STAYING, "epoch": 1, "step": 8, "last_iter": 7, "micro_step": 24, "Consumed_Samples": 24,
    }  # fmt: skip
    # What counted with the engine in one of the script's two saves does not count.
    assert found["step 12"] == {"step": 12, "num_steps": 10, "iteration": 8}
    # A save that gives none is as new as the weights.
    assert found["given none"] == {"step": 11, "num_steps": 10, "iteration": 8}
    assert found["native, given none"] == {"step": 1}
