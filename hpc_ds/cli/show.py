"""How a run looks in a terminal; plain text where it is not one."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_ds.report.summary import Summary

_STYLES = {
    "finished": "green",
    "preempted": "yellow",
    "walltime": "yellow",
    "requeued": "yellow",
    "stopped": "yellow",
    "crashed": "red",
}


def show(story: Summary) -> None:
    """Print the story of a run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or a pipe has no width: lines there are as long as they are.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(highlight=False, width=width)
    status = story.status
    # Text, not markup: reasons and details quote what users and programs wrote, brackets included.
    console.print(Text.assemble(f"{status.name}: ", _styled(status.state), f" ({status.reason})"))
    if story.attempts:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for title in ("attempt", "seconds", "steps", "ended", "why"):
            table.add_column(title, justify="right" if title in {"attempt", "seconds"} else "left")
        for number, seconds, steps, cause, detail in story.attempts:
            table.add_row(number, seconds, steps, Text.assemble(_styled(cause)), Text(detail))
        console.print(table)
    if story.totals:
        console.print(f"{story.totals}\n")
    for line in story.curve:
        console.print(Text(line), no_wrap=True, overflow="crop")
    console.print(Text(f"\nrun folder {status.run_dir}"), soft_wrap=True)


def _styled(word: str) -> tuple[str, str]:
    return word, _STYLES.get(word, "bold")
