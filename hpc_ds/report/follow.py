"""A run as it happens: one line for everything worth telling, until it is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hpc_ds.report.status import OVER, status_of
from hpc_ds.tail import Tail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.run_dir import RunDir

_LOOK_EVERY_S = 0.3
_ASK_EVERY_S = 2.0
_STEP_LINE_EVERY_S = 2.0


def follow(run: RunDir) -> Iterator[str]:
    """Lines about a run, from now until it is over; the last thing it does is return."""
    events, ledger = Tail(run.events), Tail(run.ledger)
    last_step_line = 0.0
    asked = 0.0
    while True:
        over = False
        if time.monotonic() - asked > _ASK_EVERY_S:
            asked, over = time.monotonic(), status_of(run).state in OVER
        for event in sorted(ledger.new() + events.new(), key=_when):
            if "number" in event:
                yield _attempt_line(event)
            elif event.get("event") != "step":
                yield _event_line(event)
            elif time.monotonic() - last_step_line > _STEP_LINE_EVERY_S:
                last_step_line = time.monotonic()
                loss = "-" if event["loss"] is None else f"{event['loss']:.4f}"
                yield f"step {event['step']:>6}   loss {loss}   lr {event['lr']:.2e}"
        if over:
            return
        time.sleep(_LOOK_EVERY_S)


def _when(event: dict[str, Any]) -> float:
    return float(event.get("time") or event.get("closed") or event.get("opened") or 0.0)


def _attempt_line(event: dict[str, Any]) -> str:
    number = event.get("number")
    if event.get("event") == "opened":
        return f"attempt {number} begins on {event.get('nodes') or event.get('host')} (job {event.get('job_id')})"
    return f"attempt {number} ended: {event.get('cause')}; {event.get('detail')}"


def _event_line(event: dict[str, Any]) -> str:
    kind, step = event.get("event"), event.get("step")
    if kind == "saved":
        return f"saved step {step} in {event.get('seconds')} s"
    if kind == "resumed":
        return f"resumed at step {step}"
    if kind == "stopped":
        return f"told to stop by {event.get('told_by')}: step {step} is safe"
    if kind == "initialized":
        return f"{event.get('world_size')} ranks have met"
    if kind == "save_failed":
        return f"step {step} was not saved: {event.get('error')}"
    return f"{kind} at step {step}"
