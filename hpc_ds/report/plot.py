"""A curve in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEVELS = " ▁▂▃▄▅▆▇█"


def curve(
    points: Sequence[tuple[int, float]], marks: Sequence[int] = (), *, width: int = 64, height: int = 10
) -> list[str]:
    """Lines of text that show ``points`` (x, y), with a vertical bar at each x of ``marks``.

    Each column is the mean of the points that fall into it.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]  # a diverged run has others
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    span = max(last - first, 1)

    def column(x: int) -> int:
        return min(int((x - first) / span * (width - 1)), width - 1)

    columns: list[list[float]] = [[] for _ in range(width)]
    for x, y in points:
        columns[column(x)].append(y)
    heights = _filled([sum(ys) / len(ys) if ys else None for ys in columns])
    low, high = min(heights), max(heights)
    scale = (high - low) or 1.0
    marked = {column(x) for x in marks if first <= x <= last}
    lines = []
    for row in range(height - 1, -1, -1):
        cells = [_cell((value - low) / scale * height, row) for value in heights]
        text = "".join("│" if place in marked and cell == " " else cell for place, cell in enumerate(cells))
        label = f"{high:8.3f}" if row == height - 1 else f"{low:8.3f}" if row == 0 else " " * 8
        lines.append(f"{label} ┤{text}")
    pointers = "".join("▲" if place in marked else " " for place in range(width))
    lines.append(f"{'step':>8}  {first:<{width // 2}}{last:>{width - width // 2}}")
    if marked:
        lines.append(f"{'restart':>8}  {pointers.rstrip()}")
    return lines


def _cell(value: float, row: int) -> str:
    return _LEVELS[max(0, min(8, round((value - row) * 8)))] if row else _LEVELS[max(1, min(8, round(value * 8)))]


def _filled(values: list[float | None]) -> list[float]:
    """Gaps take the value before them."""
    filled: list[float] = []
    for value in values:
        filled.append(
            value if value is not None else filled[-1] if filled else next(v for v in values if v is not None)
        )
    return filled
