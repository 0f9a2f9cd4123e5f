"""Run folders as the real code leaves them, without the days that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_ds.run_dir import RunDir, append_line, write_json

if TYPE_CHECKING:
    from pathlib import Path


def made(folder: Path, name: str = "gpt-1", job_id: str = "25", scheduler: str = "slurm", **config: Any) -> RunDir:
    """A submitted run."""
    run = RunDir(folder / name)
    for place in (run.root, run.local, run.logs, run.checkpoints):
        place.mkdir(parents=True)
    write_json(run.config, {"name": "gpt", **config})
    write_json(run.site, {"name": scheduler, "scheduler": scheduler})
    write_json(run.job, {"job_id": job_id})
    write_json(run.provenance, {"submitted": 1000.0})
    return run


def opened(run: RunDir, number: int, at: float, **fields: Any) -> None:
    """The ledger's line of an attempt that begins at a moment of the test's choice."""
    append_line(
        run.ledger, {"event": "opened", "number": number, "job_id": "25", "nodes": "n1", "opened": at, **fields}
    )


def closed(run: RunDir, number: int, at: float, cause: str, **fields: Any) -> None:
    append_line(run.ledger, {"event": "closed", "number": number, "closed": at, "cause": cause, **fields})


def event(run: RunDir, kind: str, attempt: int, at: float, step: int, **fields: Any) -> None:
    line = {"event": kind, "attempt": attempt, "time": at, "step": step, **fields}
    append_line(run.events, line, durable=False)


def steps(run: RunDir, attempt: int, begin: float, numbers: range, seconds: float) -> float:
    """Steps that take so long each, the first of which ends ``seconds`` after ``begin``; returns when the last is done."""
    at = begin
    for number in numbers:
        at += seconds
        event(run, "step", attempt, at, number, loss=1.0 / number, lr=0.1, seconds=seconds)
    return at
