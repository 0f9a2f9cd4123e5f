"""What a training run shows of itself through the engine: log, timers, profile, monitors over save and resume."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from ranks import Outcomes, run_cases
from small import Small, config, samples

import hpc_ds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.ranks


def start(**overrides: Any) -> Any:
    return hpc_ds.initialize(model=Small(), config=config(1, **overrides))[0]


def step(engine: Any, number: int = 0, *, factor: float = 1.0) -> None:
    engine.backward(engine(samples(number)).float().square().mean() * factor)
    engine.step()


@contextlib.contextmanager
def fresh_log() -> Iterator[io.StringIO]:
    """What this rank writes to stderr, with our log as in a process that has just begun."""
    log, seen = logging.getLogger("hpc_ds"), io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], log.handlers[:], log.level
    root.handlers[:], log.handlers[:] = [], []
    log.setLevel(logging.NOTSET)
    try:
        with contextlib.redirect_stderr(seen):
            yield seen
    finally:
        root.handlers[:], log.handlers[:] = before[0], before[1]
        log.setLevel(before[2])


def told(rank: int, **overrides: Any) -> str:
    with fresh_log() as seen:
        engine = start(**overrides)
        for number in range(4):
            step(engine, number)
    return seen.getvalue()


def told_by_default(rank: int) -> dict[str, str]:
    with fresh_log() as seen:
        engine = start(steps_per_print=1)
        engine(samples()).square().mean().backward()  # its loss stays with the script
        engine.step()
    overflowing = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    with fresh_log() as skipped:
        step(start(fp16=overflowing), factor=1e9)
    return {
        "progress": told(rank, steps_per_print=2),
        "unknown loss": seen.getvalue(),
        "skipped": skipped.getvalue(),
        "timers": told(rank, wall_clock_breakdown=True, steps_per_print=2),
        "state": told(rank, dump_state=True),
        "profile": told(rank, flops_profiler={"enabled": True, "profile_step": 1}),
        "ignored": told(rank, zero_optimization={"stage": 1, "overlap_comm": True}),
        "quiet": told(rank, steps_per_print=2, log_level="error"),
    }


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_rank_0_shows_progress_where_the_script_set_up_no_log(pair: Outcomes) -> None:
    first, second = pair["told_by_default"]
    assert [line.partition(" hpc_ds: ")[2].partition(": ")[0] for line in lines(first["progress"])] == [
        "step 2",
        "step 4",
    ]
    assert all(
        " INFO hpc_ds: step " in line and "loss " in line and "lr 0.1" in line for line in lines(first["progress"])
    )
    assert [line for line in lines(first["unknown loss"]) if "loss" in line] == []
    assert "step 1: lr 0.1" in first["unknown loss"]
    assert "WARNING hpc_ds: step 1 skipped: gradient norm " in first["skipped"]
    assert "loss scale 16 -> 8" in first["skipped"]
    assert first["timers"].count("time (ms)") == 2
    (state,) = [line for line in lines(first["state"]) if "training config: " in line]
    assert json.loads(state.partition("training config: ")[2])["train_micro_batch_size_per_gpu"] == 2
    assert "Small" in first["profile"]
    assert "overlap_comm: has no effect, because" in first["ignored"]
    assert first["quiet"] == ""
    # The others keep still.
    assert second == dict.fromkeys(second, "")


def told_to_handlers(rank: int) -> dict[str, Any]:
    """A script's own logging: before initialize, after it, with a level in the config."""
    found: dict[str, Any] = {}
    for name, when, level, overrides in (
        ("before", "before", logging.INFO, {}),
        ("after", "after", logging.INFO, {}),
        ("too high", "before", logging.WARNING, {}),
        ("config", "before", logging.WARNING, {"log_level": "info"}),
    ):
        own = io.StringIO()
        handler = logging.StreamHandler(own)
        with fresh_log() as seen:
            root, before = logging.getLogger(), logging.getLogger().level
            root.setLevel(level)
            if when == "before":
                root.addHandler(handler)
            engine = start(steps_per_print=1, **overrides)
            if when == "after":
                root.addHandler(handler)
            step(engine)
            root.setLevel(before)
        found[name] = lines(own.getvalue()), seen.getvalue()
    return found


def test_a_scripts_own_log_has_each_line_once(pair: Outcomes) -> None:
    first, second = pair["told_to_handlers"]
    for name in ("before", "after", "config"):
        own, stderr = first[name]
        assert len([line for line in own if line.startswith("step 1: ")]) == 1
        assert stderr == ""
    assert first["too high"] == ([], "")
    assert all(not own for own, _ in second.values())


# monitors


def monitored(folder: Path, **overrides: Any) -> Any:
    return start(csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "job"}, **overrides)


def column(folder: Path, name: str = "lr") -> list[str]:
    path = folder / "job" / f"Train_Samples_{name}.csv"
    return [line.partition(",")[0] for line in path.read_text().splitlines()] if path.exists() else []


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Five steps, of which the save saw three; then a process that goes on from the save."""
    first = monitored(folder)
    for number in range(5):
        step(first, number)
        if number == 2:
            first.save_checkpoint(folder / "saves")
            at_save = column(folder)
    first.destroy()
    before = column(folder)
    second = monitored(folder)
    second.load_checkpoint(folder / "saves")
    taken_back = column(folder)
    for number in range(3, 5):
        step(second, number)
    second.save_checkpoint(folder / "saves")
    after = column(folder), column(folder, "train_loss")
    third = monitored(folder)
    third.load_checkpoint(folder / "empty")
    return {"at save": at_save, "before": before, "taken back": taken_back, "after": after, "fresh": column(folder)}


def test_a_resumed_run_has_each_step_once(pair: Outcomes) -> None:
    seen, _ = pair["resumed"]  # rank 0 writes, so it alone knows when
    steps = ["4", "8", "12", "16", "20"]
    assert seen["at save"] == ["step", *steps[:3]]
    assert seen["before"] == ["step", *steps]
    assert seen["taken back"] == ["step", *steps[:3]]
    assert seen["after"] == (["step", *steps], ["step", *steps])
    assert seen["fresh"] == ["step"]


def weights_only(rank: int, folder: Path) -> list[str]:
    """Weights from elsewhere do not turn the curves back."""
    engine = monitored(folder)
    engine.save_checkpoint(folder / "saves")
    for number in range(2):
        step(engine, number)
    engine.load_checkpoint(folder / "saves", load_module_only=True)
    engine.destroy()
    return column(folder)


def test_loading_weights_alone_keeps_the_curves(pair: Outcomes) -> None:
    assert pair["weights_only"][0] == ["step", "4", "8"]


def let_go(rank: int, folder: Path) -> tuple[list[str], list[str], str]:
    """An engine that is neither saved nor destroyed, and a value of the script's own."""
    engine = monitored(folder)
    step(engine)
    engine(samples()).square().mean().backward()
    engine.step()
    engine.monitor.write_events([("Eval/accuracy", 0.5, engine.global_samples)])
    before = column(folder)
    del engine
    gc.collect()
    own = folder / "job" / "Eval_accuracy.csv"
    return before, [*column(folder), *column(folder, "train_loss")], own.read_text() if rank == 0 else ""


def test_monitors_are_written_when_their_engine_ends(pair: Outcomes) -> None:
    before, after, own = pair["let_go"][0]
    assert before == []
    assert after == ["step", "4", "8", "step", "4"]  # the second loss stayed with the script
    assert own.splitlines()[1] == "8,0.5"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cases: dict[str, Any] = {function.__name__: (function, ()) for function in (told_by_default, told_to_handlers)}
    for function in (resumed, weights_only, let_go):
        cases[function.__name__] = (function, (tmp_path_factory.mktemp(function.__name__),))
    return run_cases(2, cases)
