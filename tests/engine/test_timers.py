"""wall_clock_breakdown: the line it prints, from a clock of our own; and on CUDA, that it does not wait."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import pytest
import torch

from hpc_ds.engine.timers import StepTimers

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _all_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "hpc_ds"):
        yield


def take_steps(timers: StepTimers, clock: Clock, first: int, last: int, micro_batches: int = 1) -> None:
    for step in range(first, last + 1):
        for _ in range(micro_batches):
            for part, seconds in (("fwd", 0.25), ("bwd", 0.5)):
                with timers.measure(part):
                    clock.now += seconds
        with timers.measure("step"):
            clock.now += 0.25
        timers.step_done(step)


def test_a_line_has_the_means_of_the_steps_since_the_last(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    timers = StepTimers(enabled=True, device=CPU, train_batch_size=16, steps_per_print=2, clock=clock)
    take_steps(timers, clock, 1, 4)
    take_steps(timers, clock, 5, 6, micro_batches=2)
    assert caplog.messages == [
        "step 2: time (ms) | fwd: 250.00 | bwd: 500.00 | step: 250.00 | samples/s: 16.0",
        "step 4: time (ms) | fwd: 250.00 | bwd: 500.00 | step: 250.00 | samples/s: 16.0",
        f"step 6: time (ms) | fwd: 500.00 | bwd: 1000.00 | step: 250.00 | samples/s: {16 / 1.75:.1f}",
    ]


def test_after_a_resume_the_first_line_counts_the_steps_it_saw(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    timers = StepTimers(enabled=True, device=CPU, train_batch_size=16, clock=clock)
    take_steps(timers, clock, 8, 10)
    assert caplog.messages == ["step 10: time (ms) | fwd: 250.00 | bwd: 500.00 | step: 250.00 | samples/s: 16.0"]


@pytest.mark.parametrize(("steps_per_print", "lines"), [(None, 2), (1, 20), (float("inf"), 0)])
def test_how_often(steps_per_print: float | None, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    take_steps(
        StepTimers(enabled=True, device=CPU, train_batch_size=16, steps_per_print=steps_per_print, clock=clock),
        clock,
        1,
        20,
    )
    assert len(caplog.messages) == lines


def test_switched_off_it_reads_no_clock_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    readings = []
    timers = StepTimers(
        enabled=False, device=CPU, train_batch_size=16, steps_per_print=1, clock=lambda: readings.append(1) or 0.0
    )
    at_the_start = len(readings)
    take_steps(timers, Clock(), 1, 3)
    assert len(readings) == at_the_start
    assert caplog.messages == []


def test_what_raises_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    timers = StepTimers(enabled=True, device=CPU, train_batch_size=16, steps_per_print=1, clock=clock)

    def fail() -> None:
        with timers.measure("fwd"):
            clock.now += 5
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    take_steps(timers, clock, 1, 1)
    assert "fwd: 250.00" in caplog.messages[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_device_is_timed_and_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    timers = StepTimers(enabled=True, device=device, train_batch_size=16, steps_per_print=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timers.measure("fwd"):
            torch.cuda._sleep(50_000_000)
        timers.step_done(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    timers.step_done(2)
    found = re.search(r"fwd: ([0-9.]+)", caplog.messages[0])
    assert found is not None
    assert float(found.group(1)) > 1.0  # 50 million cycles take tens of milliseconds on any device, over two steps
