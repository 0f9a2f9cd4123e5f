"""Tell whoever wants to know that an attempt has ended: ``notify`` of the job.

It is a courtesy: the hook runs beside what follows the attempt, and a requeue comes no later for it. What is missing,
fails or hangs is said in the job's log, and nothing more.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from hpc_ds.supervise.say import say

if TYPE_CHECKING:
    from hpc_ds.cluster.hook import Hook
    from hpc_ds.config.job import JobConfig
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt

_LONGEST_EVENT = 40_000  # a pipe takes it at once, so that nobody waits for a hook to read
_PATIENCE_S = 22.0
_PATIENCE_BEFORE_THE_NEXT_S = 3.0


class Notice:
    """What is said of the end of one attempt."""

    def __init__(self, run: RunDir, job: JobConfig, attempt: Attempt) -> None:
        self._hook: Hook | None = None
        self._patience_s = _PATIENCE_S if attempt.action in {"finish", "leave"} else _PATIENCE_BEFORE_THE_NEXT_S
        if job.notify.command is None and job.notify.url is None:
            return
        from hpc_ds.cluster.hook import Hook  # what it loads costs every supervisor megabytes

        event = {"event": "attempt_ended", "run_dir": str(run.root), "name": job.name, **asdict(attempt)}
        if len(json.dumps(event)) > _LONGEST_EVENT:
            event |= {"failure": None, "detail": attempt.detail[:1000]}
        try:
            self._hook = Hook(event, job.notify.command, job.notify.url, home=run.root, workdir=job.workdir)
        except OSError as error:
            say(f"notify: {error}")

    def finish(self) -> None:
        """Give it a moment before this process ends, and the job with it."""
        if self._hook is not None:
            self._hook.finish(self._patience_s)
