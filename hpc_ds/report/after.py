"""``--after RUN[:ok|any|notok]``: which run is meant, and whether there is still anything to wait for.

Slurm answers for jobs that slurmctld still knows; of a run that is over the ledger knows more, and for longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.errors import ConfigError
from hpc_ds.report.status import statuses_of
from hpc_ds.run_dir import read_object
from hpc_ds.script.waiting import WHEN, Wait
from hpc_ds.sweep_dir import runs_named

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hpc_ds.cluster.queue import Queue
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.report.status import Status
    from hpc_ds.run_dir import RunDir


def read_waits(texts: Sequence[str], runs: Path, site: SiteConfig, queue: Queue) -> list[Wait]:
    """What a new run on ``site`` has to wait for; runs that are over already are left out.

    Raises:
        RunError: no run is meant.
        ConfigError: what is asked for cannot happen any more, or the run is on another scheduler.
    """
    waits = []
    for text in texts:
        name, when = _split(text)
        found = runs_named(name, runs)
        for run, status in zip(found, statuses_of(found, queue), strict=True):
            waits += _wait(text, run, when, status, site)
    return waits


def _split(text: str) -> tuple[str, str]:
    name, colon, when = text.rpartition(":")
    if not colon:
        return text, "ok"
    if when not in WHEN or not name:
        raise ConfigError(
            f"--after {text!r}: {when!r} is no way to end; write RUN, RUN:ok, RUN:any or RUN:notok", value=text
        )
    return name, when


def _wait(text: str, run: RunDir, when: str, status: Status, site: SiteConfig) -> list[Wait]:
    here = str(read_object(run.site).get("scheduler"))
    if here != site.scheduler:
        raise ConfigError(
            f"--after {text!r}: that run is on {here}, which {site.scheduler} knows nothing of", value=text
        )
    held = status.state == "held" and status.queue_state is not None and when != "notok"  # it may go on
    going = held or status.state in {"waiting", "running", "ending", "unknown"}
    if going and status.job_id:
        return [Wait(run.root, status.job_id, when)]
    if when == "any" or (when == "ok") == (status.state == "finished"):
        return []
    raise ConfigError(
        f"--after {text!r}: that run is over ({status.state}), so this one could never start; use another condition",
        value=text,
    )
