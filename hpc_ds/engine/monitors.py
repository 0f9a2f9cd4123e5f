"""Monitors: the curves of training as CSV files, for TensorBoard, or for Weights & Biases.

Rank 0 keeps events in memory and writes them at saves, at the end, and once in a while between; a step only appends to a
list. A run that resumes takes back what it wrote after the checkpoint, so that each step stands there once. (Weights &
Biases takes nothing back: name the run by WANDB_RUN_ID and set WANDB_RESUME, and it passes over what it has seen.)

Source: https://www.deepspeed.ai/docs/config-json, "Monitoring Module"; file names and headers as DeepSpeed writes them.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import logging
import os
import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hpc_ds.config.sections import FileMonitorConfig, WandbConfig

log = logging.getLogger("hpc_ds")

FLUSH_SECONDS = 30.0


class _Event(NamedTuple):
    name: str
    value: float
    samples: int
    time: float  # seconds since the epoch


class _Writer(Protocol):
    name: str

    def write(self, events: list[_Event]) -> None: ...

    def resumed(self, samples: int) -> None: ...

    def close(self) -> None: ...


class MonitorsConfig(Protocol):
    """The part of the training config that says which monitors there are."""

    @property
    def tensorboard(self) -> FileMonitorConfig:
        """Events for TensorBoard."""

    @property
    def csv_monitor(self) -> FileMonitorConfig:
        """One CSV file an event."""

    @property
    def wandb(self) -> WandbConfig:
        """A run of Weights & Biases."""


def monitor_for(config: MonitorsConfig, rank: int) -> Monitor | None:
    """The monitors that the config enables; None where there are none, and on all ranks but 0.

    Raises:
        ConfigError: on every rank, that a package is missing; on rank 0, that a folder cannot be made.
    """
    if config.tensorboard.enabled:
        _need("tensorboard")
    if config.wandb.enabled:
        _need("wandb")
    if rank != 0:
        return None
    writers: list[_Writer] = []
    if config.tensorboard.enabled:
        writers.append(_TensorBoard(_folder("tensorboard", config.tensorboard)))
    if config.csv_monitor.enabled:
        writers.append(_Csv(_folder("csv_monitor", config.csv_monitor)))
    if config.wandb.enabled:
        writers.append(_Wandb(config.wandb))
    return Monitor(writers) if writers else None


class Monitor:
    """What rank 0 tells to all monitors at once."""

    def __init__(self, writers: list[Any], clock: Callable[[], float] = time.time) -> None:
        self._writers: list[_Writer] = writers
        self._clock = clock
        self._waiting: list[_Event] = []
        self._flushed = clock()

    def write_step(
        self,
        samples: int,
        loss: float | None,
        lr: float,
        grad_norm: float | None = None,
        loss_scale: float | None = None,
    ) -> None:
        """Keep the numbers of one step.

        Args:
            samples: those that all ranks have seen so far, this step's included; the x axis.
            loss: mean over ranks and micro-batches; None where it is not known.
            lr: of the first parameter group.
            grad_norm: before clipping; None for a step that overflowed.
            loss_scale: of fp16; None without.
        """
        numbers = {"train_loss": loss, "lr": lr, "grad_norm": grad_norm, "loss_scale": loss_scale}
        self.write_events(
            [(f"Train/Samples/{name}", value, samples) for name, value in numbers.items() if value is not None]
        )

    def write_events(self, event_list: Iterable[tuple[str, float, int]]) -> None:
        """Keep events of a script's own: name, value, and samples seen so far."""
        now = self._clock()
        self._waiting += [_Event(name, float(value), samples, now) for name, value, samples in event_list]
        if now - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is kept. A monitor that cannot be written is left out from then on: training matters more."""
        events, self._waiting = self._waiting, []
        self._flushed = self._clock()
        if events:
            self._tell(lambda writer: writer.write(events))

    def resumed(self, samples: int) -> None:
        """Take back what was written beyond the checkpoint that training goes on from.

        Args:
            samples: those seen at that checkpoint; 0 where there was none.
        """
        self._waiting = [event for event in self._waiting if event.samples <= samples]
        self._tell(lambda writer: writer.resumed(samples))

    def close(self) -> None:
        """Write what is kept, and end the monitors."""
        self.flush()
        self._tell(lambda writer: writer.close())
        self._writers = []

    def _tell(self, act: Callable[[_Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                act(writer)
            except OSError as error:
                log.warning("%s: cannot be written: %s; training goes on without it", writer.name, error)
                self._writers.remove(writer)


class _Csv:
    """``Train/Samples/lr`` goes to ``Train_Samples_lr.csv``: a header ``step,lr``, then a line a step."""

    def __init__(self, folder: Path) -> None:
        self.name = f"csv_monitor {str(folder)!r}"
        self._folder = folder

    def write(self, events: list[_Event]) -> None:
        for name, group in groupby(sorted(events, key=lambda event: event.name), key=lambda event: event.name):
            path = self._folder / (name.replace("/", "_").replace(" ", "_") + ".csv")
            with path.open("a", newline="", encoding="utf-8") as file:
                lines = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    lines.writerow(["step", name.rpartition("/")[2]])
                lines.writerows((event.samples, event.value) for event in group)

    def resumed(self, samples: int) -> None:
        for path in self._folder.glob("*.csv"):
            header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            if header.startswith("step,"):
                kept = [line for line in lines if _is_whole(line) and int(line.partition(",")[0]) <= samples]
                fresh = path.with_suffix(".csv.part")
                fresh.write_text("".join(f"{line}\n" for line in (header, *kept)), encoding="utf-8")
                fresh.replace(path)

    def close(self) -> None:
        """Every write closes its file."""


def _is_whole(line: str) -> bool:
    """Whether a line was written to its end; a process that was killed leaves half of one."""
    step, _, value = line.partition(",")
    try:
        float(value)
    except ValueError:
        return False
    return step.isascii() and step.isdigit()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self.name = f"tensorboard {str(folder)!r}"
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None

    def write(self, events: list[_Event]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step)
        for event in events:
            self._writer.add_scalar(event.name, event.value, event.samples, walltime=event.time)
        self._writer.flush()

    def resumed(self, samples: int) -> None:
        """TensorBoard forgets what older files have from the purge step on, once a newer file names it."""
        self.close()
        self._purge_step = samples + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb:
    name = "wandb"

    def __init__(self, config: WandbConfig) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._wandb.init(project=config.project, group=config.group, entity=config.team)

    def write(self, events: list[_Event]) -> None:
        # wandb shows a step when the next one comes, so all of a step go in one call
        for samples, group in groupby(events, key=lambda event: event.samples):
            self._wandb.log({event.name: event.value for event in group}, step=samples)

    def resumed(self, samples: int) -> None:
        """Weights & Biases takes nothing back."""

    def close(self) -> None:
        self._wandb.finish()


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package}.enabled true: the package is not installed; pip install {package}, or set it to false",
            key=f"{package}.enabled",
            value=True,
        )


def _folder(section: str, config: FileMonitorConfig) -> Path:
    folder = Path(config.output_path).expanduser() / config.job_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise ConfigError(
            f"{section}.output_path {config.output_path!r}: {str(folder)!r} cannot be made: {error}; name another folder",
            key=f"{section}.output_path",
            value=config.output_path,
        ) from None
    if not writable:
        raise ConfigError(
            f"{section}.output_path {config.output_path!r}: {str(folder)!r} is not writable; name another folder",
            key=f"{section}.output_path",
            value=config.output_path,
        )
    return folder
