"""Why an attempt ended, and what follows from it: two tables. Elapsed time decides nothing.

| cause     | how it is known                                             | what follows                                 |
|-----------|-------------------------------------------------------------|----------------------------------------------|
| finished  | exit 0                                                      | nothing                                      |
| preempted | the scheduler says so (PreemptTime is set)                  | requeue, then hold still                     |
| requeued  | the scheduler counts a restart already                      | nothing: it starts again by itself           |
| node_failure | the same, and srun's messages name a lost node           | nothing: it starts again by itself           |
| walltime  | the scheduler says TimeLimit; or exit 75 near the limit     | requeue; hold after three without a step     |
| cancelled | the job is ending, for none of the reasons above            | nothing                                      |
| stopped   | exit 75 or 143, and the scheduler knows of no reason               | requeue; hold after three without a step     |
| crashed   | any other exit                                              | requeue after progress, else hold            |
| lost      | the attempt was never closed                                | its successor is what follows                |

Leaving without a requeue inside a grace period ends the job for good on Slurm before 24.05 (the job counts as
completed), so a preempted run is requeued by us and not by its end. Only a crash uses up ``max_crashes``.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.launch.runner import CHECKPOINTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.config.job import Restart
    from hpc_ds.supervise.ledger import Attempt

# Slurm sends the signal of --signal up to a minute early, and looks at its clock every half minute.
_EARLY_S = 90
_VAIN_STOPS = 3
_ASKED = {"stopped", "walltime"}
# 75, or dead by a signal that asks to stop, before the rank listened for it (torch takes long to load).
_TOLD = {CHECKPOINTED, 128 + signal.SIGTERM, 128 + signal.SIGUSR2}
_ENDING = {"CANCELLED", "COMPLETING", "COMPLETED", "DEADLINE", "REVOKED"}
_BY_WORDS = {"PREEMPTION": "preempted", "NODE FAILURE": "node_failure"}


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known when all ranks have ended.

    Attributes:
        exit_code: of all ranks together.
        job: the scheduler's word on the job; None where it gave none.
        restarts_before: restarts when the attempt began.
        terminated: the supervisor itself was told to end.
        due_to: why the scheduler ended the ranks, in its words, where it said so.
        lead_s: of the warning before the time limit.
        now: seconds since the epoch.
    """

    exit_code: int
    job: JobState | None
    restarts_before: int
    terminated: bool
    due_to: str | None
    lead_s: int
    now: float

    @property
    def requeued(self) -> bool:
        """Whether the scheduler has queued the job again already."""
        return self.job is not None and self.job.restarts > self.restarts_before


def cause_of(ended: Ended) -> str:
    """Why the attempt ended."""
    if ended.exit_code == 0:
        return "finished"
    if ended.job is not None and (word := _schedulers_word(ended, ended.job)):
        return word
    if ended.job is None and ended.terminated and ended.exit_code != CHECKPOINTED:
        return "cancelled"
    return "stopped" if ended.exit_code in _TOLD else "crashed"


def _schedulers_word(ended: Ended, job: JobState) -> str | None:
    if job.preempting:
        return "preempted"
    if ended.requeued:
        # Without grace time a preemption, a lost node and an administrator's requeue look alike but for these words.
        return _BY_WORDS.get(ended.due_to or "", "requeued")
    if job.state == "NODE_FAIL":
        return "node_failure"
    if job.state == "TIMEOUT" or job.reason == "TimeLimit":
        return "walltime"
    if job.state == "PREEMPTED":
        return "preempted"
    if job.state in _ENDING:
        return "cancelled"
    near_limit = job.end_time is not None and ended.now > job.end_time - ended.lead_s - _EARLY_S
    return "walltime" if near_limit and ended.exit_code in _TOLD else None


def action_after(
    cause: str, last_step: int | None, before: Sequence[Attempt], limits: Restart, *, joined: bool = True
) -> tuple[str, str]:
    """What follows, and why in words: finish, requeue, hold or leave.

    Args:
        cause: from ``cause_of``.
        last_step: of this attempt; None where it took no step.
        before: the earlier attempts.
        limits: how often the run may start again.
        joined: the run's program tells us of its steps, so one that takes none makes no progress.
    """
    before = _since_a_person_resumed(before)
    if cause == "finished":
        return "finish", "all ranks finished"
    if cause == "cancelled":
        return "leave", "cancelled: nothing is requeued"
    restarts = sum(attempt.cause not in {"finished", "cancelled"} for attempt in before)
    if limits.max_restarts is not None and restarts >= limits.max_restarts:
        return "hold", f"held: it was started again {restarts} times, and restart.max_restarts is {limits.max_restarts}"
    if joined and cause in _ASKED and _stops_in_vain(last_step, before):
        return (
            "hold",
            f"held: it was started {_VAIN_STOPS} times in a row without taking a step; is its time limit too short?",
        )
    if cause == "crashed":
        return _after_crash(last_step, [attempt for attempt in before if attempt.cause == "crashed"], limits)
    return "requeue", f"{cause}: queued again"


def _since_a_person_resumed(before: Sequence[Attempt]) -> Sequence[Attempt]:
    """The attempts that count: a person who resumes a held or cancelled run has given it a new chance."""
    stops = [place for place, attempt in enumerate(before) if attempt.action == "hold" or attempt.cause == "cancelled"]
    return before[stops[-1] + 1 :] if stops else before


def _stops_in_vain(last_step: int | None, before: Sequence[Attempt]) -> bool:
    """Whether a program that always exits with 75, or a limit shorter than its start, would go on for ever."""
    recent = before[len(before) - _VAIN_STOPS + 1 :] if len(before) >= _VAIN_STOPS - 1 else ()
    return last_step is None and bool(recent) and all(a.cause in _ASKED and a.last_step is None for a in recent)


def _after_crash(last_step: int | None, crashes: Sequence[Attempt], limits: Restart) -> tuple[str, str]:
    if last_step is None:
        return "hold", "held: it crashed before its first step, and would again"
    reached = max((crash.last_step for crash in crashes if crash.last_step is not None), default=None)
    if reached is not None and last_step <= reached:
        return "hold", f"held: it crashed at step {last_step}, no further than the crash before (step {reached})"
    if len(crashes) >= limits.max_crashes:
        return "hold", f"held: crash number {len(crashes) + 1}, and restart.max_crashes is {limits.max_crashes}"
    return "requeue", f"crashed after progress to step {last_step}: queued again"


def excluded_nodes(attempts: Sequence[Attempt], limit: int) -> list[str]:
    """Nodes that the end of at least two attempts is blamed on: the last ``limit`` of them, newest last."""
    blamed = [attempt.node for attempt in attempts if attempt.node]
    twice = dict.fromkeys(node for node in reversed(blamed) if blamed.count(node) > 1)
    return list(twice)[:limit][::-1] if limit > 0 else []
