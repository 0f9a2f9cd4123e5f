"""The run this rank belongs to: what its job asks of the engine, and the events that rank 0 writes for everybody."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from hpc_ds.run_dir import RunDir, append_line, read_lines, read_object
from hpc_ds.runtime.descent import run_of_this_process

log = logging.getLogger("hpc_ds")

_UNPREPARED = {"crashed", "hang", "lost", "requeued", "node_failure"}  # causes of the ledger


class CurrentRun:
    """The run folder named by HPCDS_RUN_DIR.

    Attributes:
        attempt: which start of the run this is, from 1.
        checkpoints: where it saves.
        every_steps, every_minutes, keep, keep_every: when the engine saves by itself, and how many saves stay.
        bounds_minutes: of the interval that "auto" chooses.
        saves_behind: whether training goes on while such a save is written.
        training: the training config of the job; None where it has none.
    """

    def __init__(self, root: Path, attempt: int) -> None:
        self.files = RunDir(root)
        self.attempt = attempt
        job = read_object(self.files.config)
        checkpoint: dict[str, Any] = job.get("checkpoint", {})
        self.checkpoints = Path(checkpoint.get("dir") or self.files.checkpoints)
        self.every_steps: int | None = checkpoint.get("every_steps")
        self.every_minutes: float | str | None = checkpoint.get("every_minutes")
        self.bounds_minutes = checkpoint.get("shortest_minutes", 2.0), checkpoint.get("longest_minutes", 60.0)
        self.keep: int | None = checkpoint.get("keep")
        self.keep_every: int | None = checkpoint.get("keep_every")
        self.saves_behind: bool = checkpoint.get("async", True)
        self.training: dict[str, Any] | None = job.get("training")

    @classmethod
    def from_environment(cls) -> CurrentRun | None:
        """The run that the supervisor started this rank in; None outside of one, and in what a rank has started."""
        root = run_of_this_process()
        return None if root is None else cls(root, int(os.environ.get("HPCDS_ATTEMPT", "0")))

    def failures_every_s(self) -> float | None:
        """Mean seconds between ends of attempts that nobody could prepare for; None while there was none."""
        opened: dict[Any, float] = {}
        spent, failures = 0.0, 0
        for line in read_lines(self.files.ledger):
            number, begin, end = line.get("number"), line.get("opened"), line.get("closed")
            if line.get("event") == "opened" and begin is not None:
                opened[number] = begin
            elif line.get("event") == "closed" and end is not None and number in opened:
                spent += end - opened.pop(number)
                failures += line.get("cause") in _UNPREPARED
        return spent / failures if failures else None

    def record(self, event: str, **fields: Any) -> None:
        """Add one event. For rank 0 only."""
        line = {"event": event, "attempt": self.attempt, "time": time.time(), **fields}
        try:
            append_line(self.files.events, line, durable=False)
        except OSError as error:  # a full disk: the training need not end because nobody can be told
            log.warning("event %s is not written: %s", event, error.strerror)
