"""How runs look in a terminal; plain text where it is not one."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, Group
    from rich.table import Table

    from hpc_ds.report.goodput import Goodput, Split
    from hpc_ds.report.status import Status
    from hpc_ds.report.summary import Summary

_STYLES = {
    "finished": "green",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
    "preflight": "yellow",
    "preempted": "yellow",
    "walltime": "yellow",
    "requeued": "yellow",
    "stopped": "yellow",
    "node_failure": "yellow",
    "crashed": "red",
    "hang": "red",
    "failed": "red",
    "held": "red",
}
_PARTS = ("training", "preflight", "start_up", "saving", "lost", "other")


def console() -> Console:
    """Where things are printed: a file or a pipe has no width, lines there are as long as they are."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    return Console(highlight=False, width=width)


def table(titles: Iterable[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> Table:
    """A table of plain texts; a pair is a text and its style."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made, to_the_right = Table(box=box.SIMPLE, pad_edge=False), set(right)
    for title in titles:
        made.add_column(title, justify="right" if title in to_the_right else "left")
    for row in rows:
        # Text, not markup: reasons and details quote what users and programs wrote, brackets included.
        made.add_row(*(Text.assemble(cell) if isinstance(cell, tuple) else Text(_cell(cell)) for cell in row))
    return made


def show(story: Summary) -> None:
    """Print the story of a run."""
    from rich.text import Text

    to = console()
    to.print(told(story.status, story.facts))
    if story.attempts:
        rows = [(number, seconds, steps, styled(cause), why) for number, seconds, steps, cause, why in story.attempts]
        to.print(table(("attempt", "seconds", "steps", "ended", "why"), rows, right=("attempt", "seconds")))
    for line in story.failure:
        to.print(Text(line), soft_wrap=True)
    if story.failure:
        to.print()
    if story.totals:
        to.print(f"{story.totals}\n")
    for line in story.curve:
        to.print(Text(line), no_wrap=True, overflow="crop")
    to.print(Text(f"\nrun folder {story.status.run_dir}"), soft_wrap=True)


def told(status: Status, facts: Sequence[str]) -> Group:
    """A run in a few lines."""
    from rich.console import Group
    from rich.text import Text

    head = Text.assemble(f"{status.name}: ", styled(status.state), f" ({status.reason})")
    return Group(head, *(Text(f"  {line}") for line in facts))


def status_table(found: Sequence[Status]) -> Table:
    """Several runs, a line each."""
    from rich.text import Text

    from hpc_ds.report.summary import quiet_lines
    from hpc_ds.report.words import moment, span

    rows = []
    for one in found:
        step = "" if one.step is None else str(one.step) if one.steps is None else f"{one.step}/{one.steps}"
        start = "" if one.expected_start is None else f", expected at {moment(one.expected_start)}"
        why = "; ".join([one.reason + start, *quiet_lines(one)])
        rate = one.steps_per_s if one.state == "running" else None
        left = "" if one.eta_s is None else span(one.eta_s)
        row = (
            RunDir(Path(one.run_dir)).label,
            styled(one.state),
            step,
            _number(one.loss, ".4f"),
            _number(rate, ".3g"),
            left,
        )
        rows.append((*row, len(one.attempts), one.nodes, one.job_id, why))
    titles = ("run", "state", "step", "loss", "steps/s", "left", "attempts", "nodes", "job", "why")
    made = table(titles, rows, right=("step", "loss", "steps/s", "left", "attempts"))
    if not rows:
        made.caption = Text("no run")
    return made


def status_line(status: Status) -> str:
    """A run in one line, for a log."""
    from hpc_ds.report.summary import quiet_lines, speed

    step = [] if status.step is None else [f"step {status.step}", *speed(status)]
    parts = [f"{RunDir(Path(status.run_dir)).label}: {status.state} ({status.reason})", *step, *quiet_lines(status)]
    return f"{time.strftime('%H:%M:%S')}  {', '.join(parts)}"


def list_table(rows: Sequence[dict[str, Any]], *, paths: bool) -> Table:
    """All runs, a line each."""
    from hpc_ds.report.words import span

    cells = [
        (
            row["run_dir"] if paths else RunDir(Path(row["run_dir"])).label,
            styled(row["state"]),
            row["step"],
            row["attempts"],
            row["job_id"],
            None if row["age_s"] is None else span(row["age_s"]),
        )
        for row in rows
    ]
    return table(("run", "state", "step", "attempts", "job", "age"), cells, right=("step", "attempts", "age"))


def history_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The attempts of a run, a line each."""
    titles = ("attempt", "ended", "then", "nodes", "steps", "seconds", "to 1st step", "lost s", "lost steps", "why")
    cells = []
    for row in rows:
        ended = row["cause"] or ("running" if row["running"] else "lost")
        steps = "none" if row["first_step"] is None else f"{row['first_step']}-{row['last_step']}"
        seconds = [_number(row[key], ".1f") for key in ("seconds", "first_step_s", "lost_s")]
        cells.append(
            (
                row["number"],
                styled(ended),
                row["action"],
                row["nodes"],
                steps,
                *seconds,
                row["lost_steps"],
                row["detail"],
            )
        )
    return table(titles, cells, right=("attempt", "seconds", "to 1st step", "lost s", "lost steps"))


def show_goodput(found: Goodput) -> None:
    """Print where the time of a run went."""
    to, total = console(), found.total
    share = "nothing was allocated yet" if found.goodput is None else f"goodput {found.goodput:.1%}"
    to.print(f"{found.name}: {share}, {total.allocated:.1f} s allocated in {len(found.attempts)} attempt(s)")
    if found.sacct_allocated is not None:
        to.print(f"sacct counts {found.sacct_allocated:.0f} s")
    hours = f"{found.unit}-hours"
    rows: list[Sequence[object]] = [
        (_words(part), f"{getattr(total, part):.1f}", _share(total, part), f"{found.hours[part]:.4g}")
        for part in _PARTS
    ]
    rows += [(f"({part})", f"{getattr(total, part):.1f}", "", "") for part in ("queueing", "stopped")]
    to.print(table(("", "seconds", "share", hours), rows, right=("seconds", "share", hours)))
    names = ("allocated", *_PARTS)
    heads = [_words(name) for name in names]
    causes = [
        (styled(cause), f"{one['attempts']:.0f}", *(f"{one[name]:.4g}" for name in names))
        for cause, one in found.by_cause.items()
    ]
    to.print(table((f"{hours} by cause", "attempts", *heads), causes, right=("attempts", *heads)))
    columns = (*names, "queueing")
    attempts = [
        (one["number"], styled(one["cause"] or "running"), *(f"{one['seconds'][name]:.1f}" for name in columns))
        for one in found.attempts
    ]
    titles = [_words(name) for name in columns]
    to.print(table(("attempt", "ended", *titles), attempts, right=("attempt", *titles)))


def styled(word: str) -> tuple[str, str]:
    """A state or cause in its colour."""
    return word, _STYLES.get(word, "bold")


def _share(total: Split, part: str) -> str:
    return f"{getattr(total, part) / total.allocated:.1%}" if total.allocated > 0 else ""


def _words(name: str) -> str:
    return name.replace("start_up", "start-up")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cell(value: object) -> str:
    return "" if value is None else str(value)
