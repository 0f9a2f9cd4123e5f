"""Site ``local``: this machine as a cluster of one node, for one job at a time a run folder.

Each job has a keeper (local_keeper.py), a detached process that is to the job what slurmctld and slurmd are on a
cluster: it starts the job script, watches the clock, and sends the signals that Slurm would send, in Slurm's order.
This file is the client: it starts a keeper, reads the state the keeper writes, and leaves requests for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.cluster.shell import outside_jobs
from hpc_ds.errors import RefusedError, SchedulerError, SubmitError
from hpc_ds.run_dir import read_object, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.run_dir import RunDir
    from hpc_ds.sweep_dir import SweepDir

_START_TIMEOUT_S = 20.0
BUSY = 17
"""Exit code of a keeper that found another one at work on its run."""


def start_array(sweep: SweepDir, numbers: Sequence[int], throttle: int, *, wait: bool = False) -> str:
    """Start the runs of a sweep, ``throttle`` at a time, by a process of its own; returns its id.

    With ``wait`` the first starts after what stands in ``after.json`` of the sweep.

    Raises:
        SubmitError: it did not start.
    """
    sweep.local.mkdir(exist_ok=True)
    words = [str(throttle), *map(str, numbers), *(["wait"] if wait else [])]
    with (sweep.local / "array.log").open("ab") as log:
        array = subprocess.Popen(
            [sys.executable, "-m", "hpc_ds.cluster.local_array", str(sweep.root), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=outside_jobs(os.environ),
            cwd=sweep.root,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while read_object(sweep.local / "state.json").get("pid") != array.pid:
        if array.poll() is not None or time.monotonic() > deadline:
            array.kill()
            raise SubmitError(f"sweep {str(sweep.root)!r}: did not start; look into {sweep.local / 'array.log'}")
        time.sleep(0.01)
    array.returncode = 0  # it outlives us on purpose; this keeps Popen from warning about it
    return f"local-{array.pid}"


class Local:
    """The scheduler of one run on this machine."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._state = run.local / "state.json"
        self._requests = run.local / "requests"

    def submit(self, run: RunDir, after: str | None = None, exclude: Sequence[str] = ()) -> str:  # noqa: ARG002
        """Start the keeper of a job, detached from this terminal; with ``after`` it waits for the runs in ``after.json``.

        Raises:
            SubmitError: the run has a live job already, or the keeper did not start.
        """
        return self.start(["wait"] if after else [])

    def start(self, words: Sequence[str]) -> str:
        """Start a keeper with further words on its command line; see there.

        Raises:
            SubmitError: the run has a live job already, or the keeper did not start.
        """
        run = self._run
        self._requests.mkdir(parents=True, exist_ok=True)
        with run.scheduler_log.open("ab") as log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "hpc_ds.cluster.local_keeper", str(run.root), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=outside_jobs(os.environ),
                cwd=run.root,  # Python looks for modules in the current folder first
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while read_object(self._state).get("pid") != keeper.pid:
            if keeper.poll() == BUSY:
                raise SubmitError(f"run {str(run.root)!r}: its job is still there; cancel it, or wait a moment")
            if keeper.poll() is not None or time.monotonic() > deadline:
                keeper.kill()
                raise SubmitError(f"run {str(run.root)!r}: its keeper did not start; look into {run.scheduler_log}")
            time.sleep(0.01)
        keeper.returncode = 0  # it outlives us on purpose; this keeps Popen from warning about it
        return str(read_object(self._state)["job_id"])

    def show(self, job_id: str) -> JobState | None:
        """What the keeper wrote last; a job whose keeper is gone counts as lost with its node."""
        data = read_object(self._state)
        if not data or job_id not in {"", data["job_id"]}:
            return None
        job = JobState(**data["job"])
        if job.active and not job.held and not process.is_alive(data["pid"], data["started"]):
            return JobState(state="NODE_FAIL", reason="the keeper of the job is gone", restarts=job.restarts)
        return job

    def cancel(self, job_id: str) -> None:
        """End the job for good."""
        job = self.show(job_id)
        if job is not None and job.held:
            data = read_object(self._state)
            write_json(self._state, {**data, "job": {**data["job"], "state": "CANCELLED", "held": False}})
            return
        self._request(job_id, "cancel")

    def preempt(self, job_id: str) -> None:
        """Preempt with grace time: the first signals now, the others after the site's ``grace_s``."""
        self._request(job_id, "preempt")

    def requeue(self, job_id: str) -> None:
        """End this start of the job and start it again."""
        self._request(job_id, "requeue")

    def hold(self, job_id: str) -> None:
        """End this start of the job, to be started again when released."""
        self._request(job_id, "hold")

    def release(self, job_id: str) -> None:
        """Start a held job again: under a keeper of its own, with a job id of its own."""
        raise SchedulerError(f"job {job_id}: a held job of site local has no keeper to release it; submit it again")

    def exclude(self, job_id: str, nodes: Sequence[str]) -> None:
        """Refused: there is one node."""
        raise RefusedError(f"job {job_id}: site local has one node, so {', '.join(nodes)} cannot be left out")

    def depend(self, job_id: str, dependency: str) -> None:
        """Nothing to do: a keeper looks at the other runs, not at their jobs."""

    def kill_wait_s(self) -> float:
        """The site's, as the run keeps it."""
        return float(read_object(self._run.site).get("kill_wait_s", 30.0))

    def down(self, nodes: Sequence[str]) -> list[str]:  # noqa: ARG002
        """None: of another machine nothing is known."""
        return []

    def _request(self, job_id: str, action: str) -> None:
        data = read_object(self._state)
        if not data or data["job_id"] != job_id:
            raise SchedulerError(f"job {job_id}: not known on this machine; look at `hpcds status`")
        if not process.is_alive(data["pid"], data["started"]):
            raise SchedulerError(f"job {job_id}: it ended already; look at `hpcds status`")
        try:
            self._requests.mkdir(parents=True, exist_ok=True)
            write_json(self._requests / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json", {"action": action})
        except OSError as error:
            raise SchedulerError(f"job {job_id}: its keeper cannot be asked: {error.strerror}; make room") from None
        with contextlib.suppress(ProcessLookupError):
            os.kill(data["pid"], signal.SIGUSR1)
