"""Monitors: what stands in the files, when it is written, and what a run that resumes takes back."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_ds.config.sections import FileMonitorConfig, WandbConfig
from hpc_ds.engine.monitors import FLUSH_SECONDS, Monitor, monitor_for
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


class Config(NamedTuple):
    tensorboard: FileMonitorConfig = FileMonitorConfig()
    csv_monitor: FileMonitorConfig = FileMonitorConfig()
    wandb: WandbConfig = WandbConfig()


def section(folder: Path, **others: Any) -> FileMonitorConfig:
    return FileMonitorConfig(enabled=True, output_path=str(folder), job_name="mine", **others)


def made(config: Config) -> Monitor:
    monitor = monitor_for(config, rank=0)
    assert monitor is not None
    return monitor


def write_steps(monitor: Monitor, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last + 1):
        monitor.write_step(step * 16, loss=loss / step, lr=0.5, grad_norm=2.0)


def lines(folder: Path, name: str) -> list[str]:
    return (folder / "mine" / f"Train_Samples_{name}.csv").read_text(encoding="utf-8").splitlines()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "mine"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(f"Train/Samples/{name}")]


def test_there_is_one_on_rank_0_where_a_monitor_is_enabled(tmp_path: Path) -> None:
    assert monitor_for(Config(), rank=0) is None
    assert monitor_for(Config(csv_monitor=section(tmp_path)), rank=1) is None
    assert list(tmp_path.iterdir()) == []
    assert monitor_for(Config(csv_monitor=section(tmp_path)), rank=0) is not None


def test_csv_is_as_deepspeed_writes_it(tmp_path: Path) -> None:
    monitor = made(Config(csv_monitor=section(tmp_path)))
    monitor.write_step(16, loss=0.5, lr=0.001, grad_norm=None, loss_scale=65536.0)
    monitor.write_step(32, loss=0.25, lr=0.002, grad_norm=1.5, loss_scale=65536.0)
    monitor.write_events([("Eval/top 1", 0.75, 32)])
    monitor.close()
    assert lines(tmp_path, "train_loss") == ["step,train_loss", "16,0.5", "32,0.25"]
    assert lines(tmp_path, "lr") == ["step,lr", "16,0.001", "32,0.002"]
    assert lines(tmp_path, "loss_scale") == ["step,loss_scale", "16,65536.0", "32,65536.0"]
    assert lines(tmp_path, "grad_norm") == ["step,grad_norm", "32,1.5"]
    assert (tmp_path / "mine" / "Eval_top_1.csv").read_text(encoding="utf-8") == "step,top 1\n32,0.75\n"


def test_without_fp16_there_is_no_loss_scale(tmp_path: Path) -> None:
    monitor = made(Config(csv_monitor=section(tmp_path)))
    write_steps(monitor, 1, 2)
    monitor.close()
    assert not (tmp_path / "mine" / "Train_Samples_loss_scale.csv").exists()


def test_a_step_writes_nothing_until_it_is_flushed_or_some_time_is_over(tmp_path: Path) -> None:
    now = [100.0]
    writers = made(Config(csv_monitor=section(tmp_path)))._writers
    monitor = Monitor(writers, clock=lambda: now[0])
    write_steps(monitor, 1, 3)
    assert list((tmp_path / "mine").iterdir()) == []
    monitor.flush()
    assert len(lines(tmp_path, "lr")) == 4
    now[0] += FLUSH_SECONDS - 1
    write_steps(monitor, 4, 4)
    assert len(lines(tmp_path, "lr")) == 4
    now[0] += 1
    write_steps(monitor, 5, 5)
    assert [line.partition(",")[0] for line in lines(tmp_path, "lr")[1:]] == ["16", "32", "48", "64", "80"]


def test_a_resumed_run_repeats_no_line_of_a_csv(tmp_path: Path) -> None:
    first = made(Config(csv_monitor=section(tmp_path)))
    write_steps(first, 1, 5)
    first.close()
    with (tmp_path / "mine" / "Train_Samples_lr.csv").open("a", encoding="utf-8") as file:
        file.write("9")  # the process was killed in the middle of a line
    foreign = tmp_path / "mine" / "of_somebody_else.csv"
    foreign.write_text("a,b\n100,2\n", encoding="utf-8")
    second = made(Config(csv_monitor=section(tmp_path)))
    second.resumed(3 * 16)
    write_steps(second, 4, 6, loss=100.0)
    second.close()
    assert lines(tmp_path, "train_loss") == [
        "step,train_loss", "16,1.0", "32,0.5", f"48,{1 / 3}", "64,25.0", "80,20.0", f"96,{100 / 6}",
    ]  # fmt: skip
    assert lines(tmp_path, "lr") == ["step,lr", *(f"{step * 16},0.5" for step in range(1, 7))]
    assert foreign.read_text(encoding="utf-8") == "a,b\n100,2\n"


def test_going_back_within_a_process_forgets_what_is_not_written_yet(tmp_path: Path) -> None:
    monitor = made(Config(csv_monitor=section(tmp_path)))
    write_steps(monitor, 1, 3)
    monitor.resumed(16)
    write_steps(monitor, 2, 2, loss=8.0)
    monitor.close()
    assert lines(tmp_path, "train_loss") == ["step,train_loss", "16,1.0", "32,4.0"]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    monitor = made(Config(tensorboard=section(tmp_path)))
    write_steps(monitor, 1, 3)
    monitor.flush()
    assert scalars(tmp_path, "train_loss") == [(16, 1.0), (32, 0.5), (48, pytest.approx(1 / 3))]
    monitor.close()


def test_a_resumed_run_repeats_no_step_in_tensorboard(tmp_path: Path) -> None:
    first = made(Config(tensorboard=section(tmp_path)))
    write_steps(first, 1, 5)
    first.flush()
    first.resumed(3 * 16)  # it loads a checkpoint again
    write_steps(first, 4, 5, loss=20.0)
    first.close()
    second = made(Config(tensorboard=section(tmp_path)))
    second.resumed(4 * 16)
    write_steps(second, 5, 6, loss=60.0)
    second.close()
    wanted = [(16, 1.0), (32, 0.5), (48, pytest.approx(1 / 3)), (64, 5.0), (80, 12.0), (96, 10.0)]
    assert scalars(tmp_path, "train_loss") == wanted


def test_both_at_once_may_share_a_folder(tmp_path: Path) -> None:
    monitor = made(Config(tensorboard=section(tmp_path), csv_monitor=section(tmp_path)))
    write_steps(monitor, 1, 2)
    monitor.close()
    assert scalars(tmp_path, "lr") == [(16, 0.5), (32, 0.5)]
    assert lines(tmp_path, "lr") == ["step,lr", "16,0.5", "32,0.5"]


def test_a_monitor_that_cannot_be_written_ends_and_training_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = made(Config(csv_monitor=section(tmp_path / "gone"), tensorboard=section(tmp_path)))
    (tmp_path / "gone" / "mine").rmdir()
    with caplog.at_level(logging.WARNING, "hpc_ds"):
        for step in (1, 2):
            write_steps(monitor, step, step)
            monitor.flush()
    monitor.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("csv_monitor ")
    assert told[0].endswith("; training goes on without it")
    assert scalars(tmp_path, "lr") == [(16, 0.5), (32, 0.5)]


FAKE_WANDB = """
import json, os
def tell(*what):
    with open(os.environ["WANDB_TOLD"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**kwargs): tell("init", kwargs)
def log(data, step): tell("log", data, step)
def finish(): tell("finish")
"""


def test_wandb_is_told_each_step_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(FAKE_WANDB, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_TOLD", str(tmp_path / "told"))
    importlib.invalidate_caches()
    monitor = made(Config(wandb=WandbConfig(enabled=True, group="g", team="t", project="p")))
    write_steps(monitor, 1, 2)
    monitor.close()
    monkeypatch.delitem(sys.modules, "wandb")
    told = [json.loads(line) for line in (tmp_path / "told").read_text(encoding="utf-8").splitlines()]

    def numbers(loss: float) -> dict[str, float]:
        return {"Train/Samples/train_loss": loss, "Train/Samples/lr": 0.5, "Train/Samples/grad_norm": 2.0}

    assert told == [
        ["init", {"project": "p", "group": "g", "entity": "t"}],
        ["log", numbers(1.0), 16],
        ["log", numbers(0.5), 32],
        ["finish"],
    ]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_at_once_and_on_every_rank(
    package: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = (
        Config(tensorboard=section(tmp_path)) if package == "tensorboard" else Config(wandb=WandbConfig(enabled=True))
    )
    with pytest.raises(
        ConfigError, match=f"{package}.enabled true: the package is not installed; pip install {package}"
    ):
        monitor_for(config, rank)


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"csv_monitor\.output_path '.*file': '.*mine' cannot be made: .*; name another"
    ):
        monitor_for(Config(csv_monitor=section(tmp_path / "file")), rank=0)
