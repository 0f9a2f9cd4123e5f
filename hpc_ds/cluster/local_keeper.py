"""The keeper of one local job: slurmctld and slurmd in one small process.

It runs the job script, and does to it what Slurm does (facts measured on Slurm 22.05):

| event                  | at once                                      | later                              | then       |
|------------------------|----------------------------------------------|------------------------------------|------------|
| time limit - lead      | the warning signal, CONT to the ranks        |                                    |            |
| time limit             | CONT, TERM to script and all below it        | KILL after kill_wait_s             | TIMEOUT    |
| cancel                 | the same                                     | KILL after kill_wait_s             | CANCELLED  |
| requeue, hold          | the same; restarts + 1                       | KILL after kill_wait_s             | runs again |
| preempt                | CONT, TERM to the ranks only; preempting     | after grace_s as requeue           | runs again |

On its command line, after the run folder: ``wait`` (for ``after.json``), and ``as=JOBID``, for a task of a sweep.
The limits stand in the job script, as lines ``#LOCAL key=value``. The ranks are those that the local runner names in
``local/step.json``. Orphans are adopted, so that nothing of a job outlives it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.cluster.local import BUSY
from hpc_ds.cluster.local_wait import verdict
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.run_dir import RunDir, read_object, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

_WAKE = {signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
_LONGEST_SLEEP_S = 1.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What the ``#LOCAL key=value`` lines of a job script ask for.

    Attributes:
        time_limit_s: how long one start may run; None for no limit.
        lead_s: how long before the limit the ranks are warned.
        signal: what they are warned with.
        grace_s: between the first signal of a preemption and the last.
        kill_wait_s: between SIGTERM and SIGKILL.
    """

    time_limit_s: float | None
    lead_s: float
    signal: signal.Signals
    grace_s: float
    kill_wait_s: float

    @classmethod
    def of(cls, script: str) -> Limits:
        """The limits in the text of a script."""
        lines = dict(re.findall(r"^#LOCAL (\w+)=(.*)$", script, flags=re.MULTILINE))
        limit = lines.get("time_limit_s")
        return cls(
            time_limit_s=None if limit is None else float(limit),
            lead_s=float(lines.get("lead_s", "0")),
            signal=signal.Signals[f"SIG{lines.get('signal', 'USR2')}"],
            grace_s=float(lines.get("grace_s", "20")),
            kill_wait_s=float(lines.get("kill_wait_s", "30")),
        )


class Keeper:
    """One job from its first start to its end.

    Attributes:
        job: the state as clients see it; written to ``local/state.json`` at every change.
    """

    def __init__(self, run: RunDir, lock: int, job_id: str | None = None) -> None:
        self.limits = Limits.of(run.script.read_text(encoding="utf-8"))
        self._run = run
        self._lock = lock
        self._identity = {
            "job_id": job_id or f"local-{os.getpid()}",
            "pid": os.getpid(),
            "started": process.start_time(os.getpid()),
        }
        self.job = JobState("PENDING")
        self._shown = False

    def keep(self, *, wait: bool = False) -> None:
        """Run the job until it ends for good or is held; with ``wait`` only after what stands in ``after.json``."""
        process.adopt_orphans()
        for left in (self._run.local / "requests").glob("*.json"):  # for a keeper before this one
            left.unlink(missing_ok=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAKE)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if wait and not self._wait():
            return
        while self._run_once() == "requeue":
            pass

    def _wait(self) -> bool:
        """Wait in the queue; whether the job may start at last."""
        self.change(state="PENDING", reason="Dependency")
        while (now := verdict(self._run)) == "wait":
            woken = signal.sigtimedwait(_WAKE, _LOOK_EVERY_S)
            if "cancel" in self.requests():
                self.change(state="CANCELLED", reason="None")
                return False
            if woken is not None and woken.si_signo in {signal.SIGTERM, signal.SIGINT}:
                self.change(state="NODE_FAIL", reason="the keeper was told to end")
                return False
        if now == "never":  # Slurm does so where it is told to (kill_invalid_depend); else it keeps the job for ever
            self.change(state="CANCELLED", reason="DependencyNeverSatisfied")
        return now == "go"

    def change(self, **fields: object) -> None:
        """Change the state of the job and show it to clients."""
        self.job = replace(self.job, **fields)  # type: ignore[arg-type] # the callers are in this class
        self._show()

    def show_again(self) -> None:
        """Write the state down, where that failed before."""
        if not self._shown:
            self._show()

    def _show(self) -> None:
        """Write the state down; on a full disk it is tried again later."""
        try:
            write_json(self._run.local / "state.json", {**self._identity, "job": asdict(self.job)})
            self._shown = True
        except OSError:
            self._shown = False

    def _run_once(self) -> str:
        """One start of the job; returns how it ended: requeue, hold or end."""
        limit_s = self.limits.time_limit_s
        end = None if limit_s is None else time.time() + limit_s
        self.change(state="RUNNING", reason="None", preempting=False, end_time=end, nodes=os.uname().nodename)
        with self._run.scheduler_log.open("ab") as log:
            batch = subprocess.Popen(
                ["/bin/bash", str(self._run.script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(self._lock,),  # the supervisor holds it too, so that it outlives a killed keeper
                preexec_fn=process.child_setup(die_with_parent=signal.SIGTERM),  # noqa: PLW1509 - see there
                env={**os.environ, "HPCDS_LOCAL_JOB": str(self._identity["job_id"])},
            )
        ending = _Ending(self, batch)
        ending.watch(warn_at=None if end is None else end - self.limits.lead_s)
        if ending.then in {"requeue", "hold"}:
            state = "PENDING" if ending.then == "requeue" else "SPECIAL_EXIT"
            reason = "None" if ending.then == "requeue" else "JobHeldUser"
            self.change(state=state, reason=reason, end_time=None, nodes="", held=ending.then == "hold")
        else:
            self.change(
                state=ending.state or ("COMPLETED" if batch.returncode == 0 else "FAILED"), end_time=time.time()
            )
        return ending.then

    def ranks(self) -> list[int]:
        """The rank processes of the running step."""
        step = read_object(self._run.local / "step.json")
        return [pid for pid, started in step.get("ranks", []) if process.is_alive(pid, started)]

    def requests(self) -> list[str]:
        """The actions that clients ask for, oldest first; each is handed out once."""
        actions = []
        with contextlib.suppress(FileNotFoundError):  # the run folder was removed below us
            for path in sorted((self._run.local / "requests").glob("*.json")):
                actions.append(str(read_object(path).get("action")))
                path.unlink(missing_ok=True)
        return actions


class _Ending:
    """How one start of a job comes to its end.

    Attributes:
        then: what follows: requeue, hold or end.
        state: the job's last state, where an event decided it.
    """

    def __init__(self, keeper: Keeper, batch: subprocess.Popen[bytes]) -> None:
        self._keeper = keeper
        self._batch = batch
        self._kill_at: float | None = None
        self._grace_ends_at: float | None = None
        self._warn_at: float | None = None
        self.then = "end"
        self.state: str | None = None

    def watch(self, warn_at: float | None) -> None:
        """Follow the job until nothing of it is left."""
        self._warn_at = warn_at
        while self._batch.poll() is None:
            self._sleep()
            for action in self._keeper.requests():
                self._act(action)
            self._look_at_the_clock()
            self._keeper.show_again()
        self._sweep()

    def _sleep(self) -> None:
        awaited = (self._grace_ends_at, self._warn_at, self._limit()) if self._kill_at is None else (self._kill_at,)
        marks = [mark for mark in awaited if mark]
        pause = min([mark - time.time() for mark in marks] + [_LONGEST_SLEEP_S])
        woken = signal.sigtimedwait(_WAKE, max(pause, 0.0))
        if woken is not None and woken.si_signo in {signal.SIGTERM, signal.SIGINT}:
            self._end("NODE_FAIL", "the keeper was told to end", "end")
        _reap_adopted(self._batch.pid)

    def _act(self, action: str) -> None:
        if action == "cancel":
            self._end("CANCELLED", "None", "end")
        elif action in {"requeue", "hold"} and (self._kill_at is None or self.state == "TIMEOUT"):
            self.state = None
            self._again(action)
        elif action == "preempt" and self._grace_ends_at is None and self._kill_at is None:
            self._grace_ends_at = time.time() + self._keeper.limits.grace_s
            self._keeper.change(preempting=True, end_time=self._grace_ends_at)
            process.send(self._keeper.ranks(), signal.SIGCONT, signal.SIGTERM)

    def _look_at_the_clock(self) -> None:
        now = time.time()
        if self._kill_at is not None and now >= self._kill_at:
            process.send(self._everything(), signal.SIGKILL)
            self._kill_at = now + 1.0
        elif self._kill_at is None and self._grace_ends_at is not None and now >= self._grace_ends_at:
            self._again("requeue")
        elif self._kill_at is None and (limit := self._limit()) is not None and now >= limit:
            self._end("TIMEOUT", "TimeLimit", "end")
        elif self._warn_at is not None and now >= self._warn_at:
            self._warn_at = None
            process.send(self._keeper.ranks(), self._keeper.limits.signal, signal.SIGCONT)

    def _limit(self) -> float | None:
        return None if self._grace_ends_at is not None else self._keeper.job.end_time

    def _again(self, then: str) -> None:
        self._keeper.change(state="COMPLETING", restarts=self._keeper.job.restarts + 1, preempting=False)
        self._terminate(then)

    def _end(self, state: str, reason: str, then: str) -> None:
        self.state = state
        self._keeper.change(state="COMPLETING", reason=reason)
        self._terminate(then)

    def _terminate(self, then: str) -> None:
        self.then = then
        if self._kill_at is None:
            self._kill_at = time.time() + self._keeper.limits.kill_wait_s
        process.send(self._everything(), signal.SIGCONT, signal.SIGTERM)

    def _everything(self) -> list[int]:
        return process.descendants(os.getpid())

    def _sweep(self) -> None:
        """End what the script left behind, politely first where there is still time."""
        patience = time.time() + min(self._keeper.limits.kill_wait_s, 2.0)
        while left := self._everything():
            process.send(left, signal.SIGTERM if time.time() < patience else signal.SIGKILL)
            time.sleep(0.02)
            _reap_adopted(self._batch.pid)


def _reap_adopted(batch: int) -> None:
    """Collect ended orphans; the script itself is left to Popen."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != batch:
            os.waitpid(ended.si_pid, 0)


def main(root: Path, words: Sequence[str] = ()) -> int:
    """Keep the job of a run; two keepers of one run would start its ranks twice, so the second leaves."""
    run = RunDir(root)
    with (run.local / "lock").open(
        "w"
    ) as lock:  # held until this process and the supervisor have ended, however they end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return BUSY
        job_id = next((word.removeprefix("as=") for word in words if word.startswith("as=")), None)
        Keeper(run, lock.fileno(), job_id).keep(wait="wait" in words)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
