"""Ranks as plain processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.launch.failure import Failure, TaskEnd
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
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._end_at: float | None = None
        self._kill_at: float | None = None
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
                self._ranks.append(
                    subprocess.Popen(
                        self._argv,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**self._environ, **self._identity(rank)},
                        start_new_session=True,
                        preexec_fn=process.child_setup(die_with_parent=signal.SIGKILL),  # noqa: PLW1509 - see there
                    )
                )
        write_json(self._step_file, {"ranks": [[rank.pid, process.start_time(rank.pid)] for rank in self._ranks]})

    def _identity(self, rank: int) -> dict[str, str]:
        size = str(self._world_size)
        return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}

    def poll(self) -> int | None:
        """The exit code of all ranks together, once all have ended."""
        codes = [rank.poll() for rank in self._ranks]
        self._look_for_failure(codes)
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            process.send((rank.pid for rank in self._ranks if rank.returncode is None), signal.SIGKILL)
        if None in codes:
            return None
        if self.ends:
            return self.ends[0].exit_code
        ended = next((code for code in codes if code not in {0, CHECKPOINTED, None}), None)
        if ended is not None:
            return 128 - ended if ended < 0 else ended
        return CHECKPOINTED if CHECKPOINTED in codes else 0

    def _look_for_failure(self, codes: list[int | None]) -> None:
        if self._kill_at is not None:
            return  # what ends now was ended by us
        known = {end.rank for end in self.ends}
        # Of several that ended between two looks, one killed by a signal is the cause and the others its victims.
        for _, rank, code in sorted((code > 0, rank, code) for rank, code in enumerate(codes) if code):
            if code != CHECKPOINTED and rank not in known:
                exit_code = 128 - code if code < 0 else code
                self.ends.append(TaskEnd(rank, os.uname().nodename, exit_code, time.time()))
        if self.ends:
            # The others get time to say what they saw.
            self._end_at = self._end_at or time.monotonic() + _SAY_S
            if time.monotonic() > self._end_at:
                self.terminate()

    def be_patient(self) -> None:
        """Do not end the others yet, though one has failed: it is not known why."""
        if self._end_at is not None:
            self._end_at = time.monotonic() + _SAY_S

    def terminate(self) -> None:
        """SIGTERM to all ranks, and SIGKILL to those that are still there ten seconds later."""
        process.send((rank.pid for rank in self._ranks if rank.returncode is None), signal.SIGTERM)
        self._kill_at = self._kill_at or time.monotonic() + _PATIENCE_S
