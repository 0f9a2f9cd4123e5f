"""Ranks as plain processes of this machine, for the supervisor: each writes to a log of its own."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.launch.failure import Failure, TaskEnd
from hpc_ds.launch.ranks import MERGED, RankGroup, RankSpec
from hpc_ds.launch.runner import CHECKPOINTED, rank_log
from hpc_ds.run_dir import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SAY_S = 3.0
_PATIENCE_S = 10.0


class LocalRunner:
    """``world_size`` processes, each with a log of its own, that die with the supervisor."""

    def __init__(
        self, argv: list[str], environ: Mapping[str, str], world_size: int, logs: Path, step_file: Path
    ) -> None:
        self._argv = argv
        self._environ = dict(environ)
        self._world_size = world_size
        self._logs = logs
        self._step_file = step_file
        self._ranks = RankGroup()
        self._codes: list[int] = []
        self._end_at: float | None = None
        self._ended_by_us = False
        self.ends: list[TaskEnd] = []
        self.failure: Failure | None = None
        self.due_to: str | None = None
        self.lost_node = ""
        self.reported: set[str] = set()

    def start(self) -> None:
        """Start all ranks, and name them in the step file for the keeper to signal."""
        self._logs.mkdir(parents=True, exist_ok=True)
        for rank in range(self._world_size):
            with rank_log(self._logs, rank).open("ab") as log:
                spec = RankSpec(rank, self._argv, {**self._environ, **self._identity(rank)})
                self._ranks.start(spec, log.fileno(), MERGED)
        write_json(self._step_file, {"ranks": [[pid, process.start_time(pid)] for pid in self._ranks.pids.values()]})

    def _identity(self, rank: int) -> dict[str, str]:
        size = str(self._world_size)
        return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}

    def poll(self) -> int | None:
        """The exit code of all ranks together, once all have ended."""
        # Of several that ended between two looks, one killed by a signal is the cause and the others its victims.
        for end in sorted(self._ranks.ended(), key=lambda end: (end.exit_code <= 128, end.rank)):
            self._codes.append(end.exit_code)
            if end.exit_code not in {0, CHECKPOINTED} and not self._ended_by_us:
                self.ends.append(TaskEnd(end.rank, os.uname().nodename, end.exit_code, time.time()))
        if self.ends and not self._ended_by_us:
            # The others get time to say what they saw.
            self._end_at = self._end_at or time.monotonic() + _SAY_S
            if time.monotonic() > self._end_at:
                self.terminate()
        self._ranks.look_at_the_clock()
        if self._ranks.living:
            return None
        if self.ends:
            return self.ends[0].exit_code
        failed = next((code for code in self._codes if code not in {0, CHECKPOINTED}), None)
        return failed if failed is not None else (CHECKPOINTED if CHECKPOINTED in self._codes else 0)

    def be_patient(self) -> None:
        """Do not end the others yet, though one has failed: it is not known why."""
        if self._end_at is not None:
            self._end_at = time.monotonic() + _SAY_S

    def terminate(self) -> None:
        """SIGTERM to all ranks, and SIGKILL to those that are still there ten seconds later."""
        self._ended_by_us = True
        self._ranks.end(signal.SIGTERM, _PATIENCE_S)
