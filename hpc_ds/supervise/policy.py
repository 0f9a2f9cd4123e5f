"""Why an attempt ended, and what follows from it: two tables. Elapsed time decides nothing.

| cause        | how it is known                                                       | what follows                            |
|--------------|-----------------------------------------------------------------------|-----------------------------------------|
| finished     | exit 0                                                                | nothing                                 |
| preempted    | PreemptTime is set, or srun's messages say so                         | requeue, then hold still                |
| requeued     | the scheduler counts a restart already                                | nothing: it starts again by itself      |
| node_failure | the same, and srun's messages name a lost node; or NODE_FAIL          | nothing, or requeue                     |
| walltime     | the scheduler says TimeLimit; or exit 75 near the limit               | requeue; hold after three without a step |
| cancelled    | the job is ending, for none of the reasons above                      | nothing                                 |
| stopped      | exit 75 or 143, and the scheduler knows of no reason                  | requeue; hold after three without a step |
| preflight    | the preflight found that the ranks should not be started here         | requeue elsewhere, or hold              |
| hang         | no rank moved any more, and the supervisor ended them                 | as after a crash                        |
| crashed      | any other exit                                                        | requeue after progress, else hold       |
| lost         | the attempt was never closed                                          | its successor is what follows           |

Leaving without a requeue inside a grace period ends the job for good on Slurm before 24.05 (the job counts as
completed), so a preempted run is requeued by us and not by its end. Crashes use up ``max_crashes``, hangs
``max_hangs``; nothing else does.
"""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from hpc_ds.launch.runner import CHECKPOINTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.config.job import Restart
    from hpc_ds.supervise.ledger import Attempt

_VAIN_STOPS = 3
_ASKED = {"stopped", "walltime"}
_FAILURES = {"crashed": "crashed", "hang": "hung"}
_NOUNS = {"crashed": "crash", "hang": "hang"}
_ENDING = {"CANCELLED", "COMPLETING", "COMPLETED", "DEADLINE", "REVOKED"}
_BY_WORDS = {"PREEMPTION": "preempted", "NODE FAILURE": "node_failure"}
_OVER_WORDS = {**_BY_WORDS, "TIME LIMIT": "walltime"}
_BLAMED = 2
_MOST_PREFLIGHTS = 3  # that fail in a row


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known when all ranks have ended.

    Attributes:
        exit_code: of all ranks together.
        job: the scheduler's word on the job; None where it gave none.
        restarts_before: restarts when the attempt began.
        terminated: the scheduler ends the whole job, or says nothing though the supervisor was told to end.
        due_to: why the scheduler ended the ranks, in its words, where it said so.
        near_limit: it was time to save for the time limit.
        hung: the supervisor ended the ranks because none moved any more.
        overdue: the supervisor ended the ranks because the job ends and they had not stopped.
        joined: the run's program tells us of its steps, so it keeps to our exit codes.
        warning: the signal that announces the time limit.
        unfit: the ranks were not started, because the preflight failed.
    """

    exit_code: int
    job: JobState | None
    restarts_before: int
    terminated: bool
    due_to: str | None
    near_limit: bool = False
    hung: bool = False
    overdue: bool = False
    joined: bool = True
    warning: signal.Signals = signal.SIGUSR2
    unfit: bool = False

    @property
    def told(self) -> bool:
        """Whether the ranks ended as those do that were told to: by 75, or by the signal, before they listened for it.

        torch takes long to load, and until then a signal that asks to stop ends a rank.
        """
        return self.exit_code in {CHECKPOINTED, 128 + signal.SIGTERM, 128 + self.warning}

    @property
    def requeued(self) -> bool:
        """Whether the scheduler has queued the job again already."""
        return self.job is not None and self.job.restarts > self.restarts_before


def cause_of(ended: Ended) -> str:
    """Why the attempt ended."""
    word = _schedulers_word(ended, ended.job) if ended.job is not None else None
    if ended.hung and word != "node_failure":
        return "hang"
    if ended.unfit and word is None and not ended.terminated:
        return "preflight"
    if ended.exit_code == 0 and (ended.joined or word is None):
        return "finished"  # a program that does not know us may end with 0 because it was told to
    if word is not None:
        return word
    if ended.job is None and ended.due_to in _OVER_WORDS:
        return _OVER_WORDS[ended.due_to]
    if ended.job is None and ended.terminated and ended.exit_code != CHECKPOINTED:
        return "cancelled"
    if ended.near_limit and (ended.overdue or ended.told):
        return "walltime"
    return "stopped" if ended.told else "crashed"


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
        return _OVER_WORDS.get(ended.due_to or "", "cancelled")
    return "node_failure" if ended.due_to == "NODE FAILURE" else None


def action_after(
    cause: str,
    last_step: int | None,
    before: Sequence[Attempt],
    limits: Restart,
    *,
    joined: bool = True,
    saved_step: int | None = None,
) -> tuple[str, str]:
    """What follows, and why in words: finish, requeue, hold or leave.

    Args:
        cause: from ``cause_of``.
        last_step: of this attempt; None where it took no step.
        saved_step: of the newest checkpoint; None where there is none.
        before: the earlier attempts.
        limits: how often the run may start again.
        joined: the run's program tells us of its steps, so one that takes none makes no progress.
    """
    before = _since_a_person_resumed(before)
    if cause == "finished":
        return "finish", "all ranks finished"
    if cause == "cancelled":
        return "leave", "cancelled: nothing is requeued"
    if often := _too_often(before, limits):
        return "hold", often
    if joined and cause in _ASKED and (vain := _stops_in_vain(last_step, saved_step, before)):
        return "hold", vain
    if cause in _FAILURES:
        return _after_failure(cause, last_step, before, limits, joined=joined)
    return "requeue", f"{cause}: queued again"


def _too_often(before: Sequence[Attempt], limits: Restart) -> str:
    restarts = sum(attempt.cause not in {"finished", "cancelled"} for attempt in before)
    if limits.max_restarts is None or restarts < limits.max_restarts:
        return ""
    return f"held: it was started again {restarts} times, and restart.max_restarts is {limits.max_restarts}"


def after_preflight(
    unfit: Sequence[str], words: str, before: Sequence[Attempt], limits: Restart, *, elsewhere: bool
) -> tuple[str, str]:
    """What follows a preflight that failed: requeue without the nodes at which it lay, or hold; and why in words.

    Args:
        unfit: those nodes; none where it lay at no node by itself, and would be so anywhere.
        words: what was found.
        before: the earlier attempts.
        limits: how often the run may start again, and how many nodes it may leave out.
        elsewhere: the scheduler may give the job other nodes.
    """
    left_out = {*excluded_nodes(before, len(before)), *unfit}
    before = _since_a_person_resumed(before)
    in_a_row = 1 + sum(1 for _ in takewhile(lambda attempt: attempt.cause == "preflight", reversed(before)))
    why = ""
    if often := _too_often(before, limits):
        why = often
    elif not unfit:
        why = "held: the preflight failed, and not for one node"
    elif not elsewhere:
        why = "held: the preflight failed, and the job has to run on these nodes"
    elif len(left_out) > limits.max_excluded_nodes:
        why = f"held: {len(left_out)} nodes would be left out, and restart.max_excluded_nodes is {limits.max_excluded_nodes}"
    elif in_a_row > _MOST_PREFLIGHTS:
        why = f"held: the preflight failed {in_a_row} times in a row"
    if why:
        return "hold", f"{why}: {words}"
    return "requeue", f"preflight failed: queued again without {', '.join(unfit)}: {words}"


def _since_a_person_resumed(before: Sequence[Attempt]) -> Sequence[Attempt]:
    """The attempts that count: a person who resumes a held or cancelled run has given it a new chance."""
    stops = [place for place, attempt in enumerate(before) if attempt.action == "hold" or attempt.cause == "cancelled"]
    return before[stops[-1] + 1 :] if stops else before


def _stops_in_vain(last_step: int | None, saved_step: int | None, before: Sequence[Attempt]) -> str:
    """Why it would go on for ever: always asked to stop, and never further than ever before; empty where it gets on."""
    furthest = stops = 0
    for cause, *steps in [*((one.cause, one.last_step, one.saved_step) for one in before), ("", last_step, saved_step)]:
        reached = max(step or 0 for step in steps)
        asked = cause in _ASKED or cause == ""  # this one
        stops = stops + 1 if asked and reached <= furthest else 0
        furthest = max(furthest, reached)
    if stops < _VAIN_STOPS:
        return ""
    if furthest == 0:
        return f"held: it was started {stops} times in a row without taking a step; is its time limit too short?"
    return (
        f"held: it was stopped {stops} times in a row without getting beyond step {furthest}; does a save take longer than "
        "restart.lead?"
    )


def _after_failure(
    cause: str, last_step: int | None, before: Sequence[Attempt], limits: Restart, *, joined: bool
) -> tuple[str, str]:
    """A crash or a hang: again if the run got further than at the failure before and the budget of its cause lasts."""
    did = _FAILURES[cause]
    if last_step is None and not _got_on_since_failure(before):
        known = "" if joined else " (it has told of none)"
        return "hold", f"held: it {did} before its first step{known}, and would again"
    failures = [attempt for attempt in before if attempt.cause in _FAILURES]
    further = [
        failure
        for failure in failures
        if last_step is not None and failure.last_step is not None and failure.last_step >= last_step
    ]
    if further:
        earlier = f"the {_NOUNS[str(further[-1].cause)]} before (step {further[-1].last_step})"
        return "hold", f"held: it {did} at step {last_step}, no further than {earlier}"
    count = sum(attempt.cause == cause for attempt in failures)
    name, most = ("max_hangs", limits.max_hangs) if cause == "hang" else ("max_crashes", limits.max_crashes)
    if count >= most:
        return "hold", f"held: {_NOUNS[cause]} number {count + 1}, and restart.{name} is {most}"
    if last_step is None:
        return "requeue", f"{did} before its first step, after attempts that got on: queued again"
    return "requeue", f"{did} after progress to step {last_step}: queued again"


def _got_on_since_failure(before: Sequence[Attempt]) -> bool:
    """Whether any attempt has taken a step since the last one that failed."""
    failed = [place for place, attempt in enumerate(before) if attempt.cause in _FAILURES]
    since = before[failed[-1] + 1 :] if failed else before
    return any(attempt.last_step is not None for attempt in since)


def excluded_nodes(attempts: Sequence[Attempt], limit: int) -> list[str]:
    """Nodes that a preflight found unfit, or that the ends of two attempts or more are blamed on.

    The newest last, at most ``limit`` of them.
    """
    blamed: Counter[str] = Counter()
    for attempt in attempts:
        weight = _BLAMED if attempt.cause == "preflight" else 1
        blamed.update(dict.fromkeys(attempt.blamed, weight))
    named = [node for attempt in attempts for node in attempt.blamed if blamed[node] >= _BLAMED]
    newest_last = list(dict.fromkeys(reversed(named)))
    return newest_last[:limit][::-1] if limit else []
