"""Site local: whether what a run waits for (``after.json``) has happened. Its keeper looks now and then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.cluster.local import Local
from hpc_ds.run_dir import RunDir, read_object

if TYPE_CHECKING:
    from collections.abc import Mapping


def verdict(run: RunDir) -> str:
    """``go``, ``wait``, or ``never``: what it waits for cannot happen any more."""
    verdicts = [_verdict(wait) for wait in read_object(run.after).get("after", [])]
    return next((word for word in ("never", "wait") if word in verdicts), "go")


def _verdict(wait: Mapping[str, str]) -> str:
    job = Local(RunDir(Path(wait["run_dir"]))).show("")
    if job is not None and job.active and not (job.held and wait["when"] == "notok"):  # as Slurm has it
        return "wait"
    finished = job is not None and job.state == "COMPLETED"
    return "go" if wait["when"] == "any" or (wait["when"] == "ok") == finished else "never"
