"""Site local: what starts the runs of a sweep, in their order, so many at a time.

One process for all that wait, which are PENDING in its name; each run that starts gets a keeper of its own
(local_keeper.py), which goes on without this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.cluster.local import Local
from hpc_ds.cluster.local_wait import verdict
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.errors import SchedulerError
from hpc_ds.run_dir import RunDir, read_object, write_json
from hpc_ds.sweep_dir import SweepDir

if TYPE_CHECKING:
    from collections.abc import Sequence

_WAKE = {signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
_LOOK_EVERY_S = 0.5


class Array:
    """The runs of a sweep from the first start to the last."""

    def __init__(self, sweep: SweepDir, throttle: int, numbers: Sequence[int]) -> None:
        self._sweep = sweep
        self._throttle = throttle
        self._name = f"local-{os.getpid()}"
        self._waiting = {number: sweep.run(number) for number in numbers}
        self._running: list[RunDir] = []

    def run(self, *, wait: bool = False) -> None:
        """Run them all; with ``wait`` after what stands in ``after.json`` of the sweep."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAKE)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number, run in self._waiting.items():
            run.local.mkdir(exist_ok=True)
            for left in (run.local / "requests").glob("*.json"):
                left.unlink(missing_ok=True)
            self._change(number, run, "PENDING", "Dependency" if wait else "JobArrayTaskLimit")
            write_json(run.job, self._job(number, run), durable=False)
        write_json(self._sweep.local / "state.json", {"pid": os.getpid()})
        if wait and not self._wait():
            return
        while self._waiting or self._running:
            self._running = [run for run in self._running if _runs(run)]
            self._take_requests()  # after that look: who cancels all, cancels those that wait first
            while self._waiting and len(self._running) < self._throttle:
                self._start_next()
            if self._is_told_to_end():
                return  # those that wait count as lost with their node
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass

    @staticmethod
    def _is_told_to_end() -> bool:
        """Wait until something happens; whether it is the end."""
        woken = signal.sigtimedwait(_WAKE, _LOOK_EVERY_S)
        return woken is not None and woken.si_signo in {signal.SIGTERM, signal.SIGINT}

    def _wait(self) -> bool:
        """Wait for other runs; whether those of this sweep may start at last."""
        while self._waiting and (now := verdict(RunDir(self._sweep.root))) != "go":
            self._take_requests()
            if now == "never":
                for number, run in self._waiting.items():
                    self._change(number, run, "CANCELLED", "DependencyNeverSatisfied")
                return False
            if self._is_told_to_end():
                return False
        return True

    def _job_id(self, number: int) -> str:
        return f"{self._name}_{number}"

    def _job(self, number: int, run: RunDir) -> dict[str, object]:
        """What ``job.json`` of a run says now: written here, because only this process knows its own id in time."""
        job_id, before = self._job_id(number), read_object(run.job)
        earlier = [*before.get("earlier", []), before["job_id"]] if before.get("job_id") else []
        now = (run.local / "state.json").stat().st_mtime
        queued = {**before.get("queued", {}), job_id: now}
        site = read_object(run.site).get("name")
        return {"job_id": job_id, "site": site, "submitted": now, "earlier": earlier, "queued": queued}

    def _start_next(self) -> None:
        number = next(iter(self._waiting))
        run = self._waiting.pop(number)
        try:
            Local(run).start([f"as={self._job_id(number)}"])
        except (SchedulerError, OSError) as error:
            sys.stderr.write(f"hpcds: task {number}: {error}\n")
            with contextlib.suppress(OSError):
                self._change(number, run, "FAILED", "its keeper did not start")
        else:
            self._running.append(run)

    def _take_requests(self) -> None:
        for number, run in list(self._waiting.items()):
            requests = list((run.local / "requests").glob("*.json"))
            if any(read_object(path).get("action") == "cancel" for path in requests):
                self._change(number, self._waiting.pop(number), "CANCELLED", "None")
            for path in requests:
                path.unlink(missing_ok=True)

    def _change(self, number: int, run: RunDir, state: str, reason: str) -> None:
        pid = os.getpid()
        identity = {"job_id": self._job_id(number), "pid": pid, "started": process.start_time(pid)}
        job = asdict(JobState(state, reason))
        write_json(run.local / "state.json", {**identity, "job": job}, durable=False)


def _runs(run: RunDir) -> bool:
    job = Local(run).show("")
    return job is not None and job.active and not job.held


if __name__ == "__main__":
    words = sys.argv[3:]
    array = Array(SweepDir(Path(sys.argv[1])), int(sys.argv[2]), [int(word) for word in words if word.isdigit()])
    array.run(wait="wait" in words)
