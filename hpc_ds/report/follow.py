"""A run as it happens: one line for everything worth telling, until it is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.queue import Queue
from hpc_ds.report.status import status_of
from hpc_ds.tail import Tail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.run_dir import RunDir

_LOOK_EVERY_S = 0.3
_ASK_EVERY_S = 2.0
_STEP_LINE_EVERY_S = 2.0


def follow(run: RunDir, queue: Queue | None = None, *, from_now: bool = False) -> Iterator[str]:
    """Lines about a run until it is over; the last thing it does is return.

    Args:
        run: which one.
        queue: what asks its scheduler; one for the whole command.
        from_now: leave out what has happened already.
    """
    queue = queue or Queue()
    events, ledger = (Tail(path, at=_size(path) if from_now else 0) for path in (run.events, run.ledger))
    told, asked, over = _Told(), 0.0, False
    while True:
        if attempts := ledger.new():
            queue.expect_news()
        if time.monotonic() - asked > _ASK_EVERY_S:
            asked, over = time.monotonic(), status_of(run, queue).over
        # What was written until the end is read after it was seen.
        yield from told.lines(attempts + ledger.new() + events.new())
        if over:
            return
        time.sleep(_LOOK_EVERY_S)


class _Told:
    """What of the events is worth a line: of many steps only one every two seconds."""

    def __init__(self) -> None:
        self._step_line = 0.0

    def lines(self, events: list[dict[str, Any]]) -> Iterator[str]:
        for event in sorted(events, key=_when):
            if "number" in event:
                yield _attempt_line(event)
            elif event.get("event") != "step":
                yield _event_line(event)
            elif time.monotonic() - self._step_line > _STEP_LINE_EVERY_S:
                self._step_line = time.monotonic()
                yield _step_line(event)


def _size(path: Any) -> int:
    try:
        return int(path.stat().st_size)
    except OSError:
        return 0


def _when(event: dict[str, Any]) -> float:
    return float(event.get("time") or event.get("closed") or event.get("opened") or 0.0)


def _step_line(event: dict[str, Any]) -> str:
    loss, rate = event.get("loss"), event.get("lr")
    told = "-" if loss is None else f"{loss:.4f}"
    return f"step {event['step']:>6}   loss {told}" + ("" if rate is None else f"   lr {rate:.2e}")


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
