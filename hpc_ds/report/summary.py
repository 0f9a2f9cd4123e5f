"""The story of a run, for the person who waited for it: what to say, not how it looks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.report.plot import curve
from hpc_ds.report.status import Status, status_of
from hpc_ds.report.words import moment, span
from hpc_ds.tail import sample_of

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt

_QUIET_NAMED = 5


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in words.

    Attributes:
        facts: what there is to say of it at this moment, a line each.
        attempts: for each, its number, seconds, steps, cause and detail.
        failure: the rank that failed first and the end of what it said, a line each.
        totals: steps, steps lost and loss, in one line; empty before the first step.
        curve: the loss, with a mark where the run went on after a restart.
    """

    status: Status
    facts: list[str]
    attempts: list[tuple[str, str, str, str, str]]
    failure: list[str]
    totals: str
    curve: list[str]


def losses(events: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> loss; of a step that was taken again, the last one counts."""
    return {
        event["step"]: event["loss"] for event in events if event.get("event") == "step" and event["loss"] is not None
    }


def summary(run: RunDir, status: Status | None = None) -> Summary:
    """Attempts and why each ended, steps lost, and the loss curve with its restarts."""
    status = status or status_of(run)
    restarts = [attempt.first_step for attempt in status.attempts[1:] if attempt.first_step is not None]
    by_step = losses(sample_of(run.events))
    totals = ""
    if by_step:
        first, last = by_step[min(by_step)], by_step[max(by_step)]
        totals = f"{max(by_step)} steps, {status.steps_lost} lost, loss {first:.3f} -> {last:.3f}"
    rows = [_row(attempt, status) for attempt in status.attempts]
    drawn = curve(sorted(by_step.items()), restarts)
    return Summary(status, facts(status), rows, failure_lines(status), totals, drawn)


def facts(status: Status, now: float | None = None) -> list[str]:
    """What there is to say of a run that goes on, or waits."""
    now = time.time() if now is None else now
    lines = []
    if status.expected_start is not None:
        lines.append(f"expected to start at {_until(status.expected_start, now)}")
    if not status.over and status.step is not None:
        lines.append(", ".join([f"step {status.step}{_of(status.steps)}", *speed(status)]))
    if status.nodes:
        limit = "" if status.ends_at is None else f", until {_until(status.ends_at, now)}"
        lines.append(f"on {status.nodes}{limit}")
    if status.excluded_nodes:
        lines.append(f"not on {', '.join(status.excluded_nodes)}")
    return lines + quiet_lines(status)


def speed(status: Status) -> list[str]:
    """Steps and samples in a second, and what is left."""
    parts = []
    if status.state == "running" and status.steps_per_s is not None:
        parts.append(f"{status.steps_per_s:.3g} steps/s")
        if status.samples_per_s is not None:
            parts.append(f"{status.samples_per_s:.4g} samples/s")
    if status.eta_s is not None:
        parts.append(f"{span(status.eta_s)} to go")
    return parts


def quiet_lines(status: Status) -> list[str]:
    """The ranks that are silent or still for long."""
    lines = []
    for one in status.quiet_ranks[:_QUIET_NAMED]:
        where = f" ({one['where']})" if one["where"] else ""
        step = "" if one["step"] is None else f" at step {one['step']}"
        lines.append(
            f"rank {one['rank']} on {one['host']}: {one['how']} for {span(one['seconds'])}, {one['phase']}{step}{where}"
        )
    more = len(status.quiet_ranks) - len(lines)
    return [*lines, f"and {more} more ranks"] if more else lines


def failure_lines(status: Status) -> list[str]:
    """Who failed first, how, and the end of its traceback."""
    failure = status.failure
    if failure is None:
        return []
    who = "the launcher" if failure.get("rank") is None else f"rank {failure['rank']} on {failure.get('host')}"
    return [f"failed first: {who}, {failure.get('how')}", *(f"    {line}" for line in failure["traceback"])]


def _of(steps: int | None) -> str:
    return "" if steps is None else f" of {steps}"


def _until(when: float, now: float) -> str:
    return f"{moment(when, now)} ({'in ' + span(when - now) if when > now else 'now'})"


def _row(attempt: Attempt, status: Status) -> tuple[str, str, str, str, str]:
    seconds = f"{attempt.closed - attempt.opened:.1f}" if attempt.closed else ""
    steps = f"{attempt.first_step}-{attempt.last_step}" if attempt.first_step is not None else "none"
    if attempt.cause is None and status.state == "running" and status.steps_per_s is not None:
        steps = f"to {status.step}"
    return str(attempt.number), seconds, steps, attempt.cause or ("lost" if status.over else "running"), attempt.detail
