"""The story of a run that is over, for the person who waited for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_ds.report.plot import curve
from hpc_ds.report.status import status_of
from hpc_ds.run_dir import read_lines

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt


def losses(events: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> loss; of a step that was taken again, the last one counts."""
    return {event["step"]: event["loss"] for event in events if event.get("event") == "step"}


def summary(run: RunDir) -> list[str]:
    """Attempts and why each ended, steps lost, the loss curve with its restarts, and where everything is."""
    status, events = status_of(run), read_lines(run.events)
    restarts = [event["step"] for event in events if event.get("event") == "resumed"]
    by_step = losses(events)
    lines = [f"{status.name}: {status.state} ({status.reason})", ""]
    lines += [_attempt_line(attempt) for attempt in status.attempts]
    lines.append("")
    if by_step:
        first, last = by_step[min(by_step)], by_step[max(by_step)]
        lines.append(f"  steps {max(by_step)}   lost {status.steps_lost}   loss {first:.3f} -> {last:.3f}")
        lines.append("")
        lines += curve(sorted(by_step.items()), restarts)
        lines.append("")
    lines.append(f"  run folder  {status.run_dir}")
    return lines


def _attempt_line(attempt: Attempt) -> str:
    seconds = f"{attempt.closed - attempt.opened:6.1f} s" if attempt.closed else "      - s"
    steps = f"steps {attempt.first_step}-{attempt.last_step}" if attempt.first_step is not None else "no step"
    return f"  attempt {attempt.number}   {seconds}   {steps:<16} {attempt.cause or 'running':<10} {attempt.detail}"
