"""Spans of time as a person reads them."""

from __future__ import annotations

import time

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def span(seconds: float) -> str:
    """``45 s``, ``5 min``, ``2.5 h``, ``3.1 d``."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}" if unit == "min" else f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def moment(when: float, now: float | None = None) -> str:
    """A time of day, with its date where that is another one than today's."""
    now = time.time() if now is None else now
    same_day = time.localtime(when)[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", time.localtime(when))
