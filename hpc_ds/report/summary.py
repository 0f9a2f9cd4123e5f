"""The story of a run, for the person who waited for it: what to say, not how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.report.plot import curve
from hpc_ds.report.status import OVER, Status, status_of
from hpc_ds.run_dir import read_lines

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in words.

    Attributes:
        attempts: for each, its number, seconds, steps, cause and detail.
        totals: steps, steps lost and loss, in one line; empty before the first step.
        curve: the loss, with a mark where the run went on after a restart.
    """

    status: Status
    attempts: list[tuple[str, str, str, str, str]]
    totals: str
    curve: list[str]


def losses(events: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> loss; of a step that was taken again, the last one counts."""
    return {
        event["step"]: event["loss"] for event in events if event.get("event") == "step" and event["loss"] is not None
    }


def summary(run: RunDir) -> Summary:
    """Attempts and why each ended, steps lost, and the loss curve with its restarts."""
    status, events = status_of(run), read_lines(run.events)
    restarts = [event["step"] for event in events if event.get("event") == "resumed"]
    by_step = losses(events)
    totals = ""
    if by_step:
        first, last = by_step[min(by_step)], by_step[max(by_step)]
        totals = f"{max(by_step)} steps, {status.steps_lost} lost, loss {first:.3f} -> {last:.3f}"
    rows = [_row(attempt, "lost" if status.state in OVER else "running") for attempt in status.attempts]
    return Summary(status, rows, totals, curve(sorted(by_step.items()), restarts))


def _row(attempt: Attempt, open_means: str) -> tuple[str, str, str, str, str]:
    seconds = f"{attempt.closed - attempt.opened:.1f}" if attempt.closed else ""
    steps = f"{attempt.first_step}-{attempt.last_step}" if attempt.first_step is not None else "none"
    return str(attempt.number), seconds, steps, attempt.cause or open_means, attempt.detail
