"""What the rest of hpc_ds asks of a scheduler, and what it gets back. Slurm's words are the common ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.run_dir import RunDir

ACTIVE = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "SIGNALING",
        "RESIZING",
        "STOPPED",
        "STAGE_OUT",
        "REQUEUED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
    }
)
HELD = frozenset({"REQUEUE_HOLD", "SPECIAL_EXIT"})


@dataclass(frozen=True, slots=True)
class JobState:
    """What the scheduler knows of a job at one moment.

    Attributes:
        state: Slurm's base state, such as ``RUNNING``.
        reason: why it waits or ended, such as ``TimeLimit``; "None" where there is none.
        restarts: how often it was started again.
        preempting: a preemption with grace time is under way (Slurm's PreemptTime is set).
        end_time: seconds since the epoch at which it will be ended; None where there is no limit.
        nodes: the folded node list; empty while it waits.
        held: it waits for a person.
        may_requeue: the scheduler takes a request to queue it again (``--requeue``).
        start_time: seconds since the epoch at which it started, or is expected to; None where nobody knows.
    """

    state: str
    reason: str = "None"
    restarts: int = 0
    preempting: bool = False
    end_time: float | None = None
    nodes: str = ""
    held: bool = False
    may_requeue: bool = True
    start_time: float | None = None

    @property
    def active(self) -> bool:
        """Whether the scheduler will still do something with the job."""
        return self.state in ACTIVE


class Scheduler(Protocol):
    """A scheduler, as far as a run needs one.

    Every method raises SchedulerError when it cannot be done: RefusedError where asking again would not help.
    """

    def submit(self, run: RunDir, after: str | None = None, exclude: Sequence[str] = ()) -> str:
        """Queue the script of a run, on none of the nodes ``exclude``.

        ``after`` is a job that must have ended first, or a dependency in Slurm's words, such as ``afterok:12``.
        """

    def show(self, job_id: str) -> JobState | None:
        """What it knows of a job; None when it knows no such job (any more)."""

    def cancel(self, job_id: str) -> None:
        """End the job for good."""

    def preempt(self, job_id: str) -> None:
        """Send the first signal of a preemption to the ranks."""

    def requeue(self, job_id: str) -> None:
        """End this start of the job and queue it again."""

    def hold(self, job_id: str) -> None:
        """End this start of the job and queue it again, held until a person releases it."""

    def exclude(self, job_id: str, nodes: Sequence[str]) -> None:
        """Let a waiting job start on none of these nodes."""

    def depend(self, job_id: str, dependency: str) -> None:
        """Let a waiting job wait for this instead, in Slurm's words."""

    def kill_wait_s(self) -> float:
        """Seconds between the SIGTERM and the SIGKILL at the end of a job."""

    def down(self, nodes: Sequence[str]) -> list[str]:
        """Those of some nodes that are known not to work; one that takes no new jobs does work."""

    def release(self, job_id: str) -> None:
        """Let a held job start."""
