"""What the supervisor asks of whatever starts the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.launch.failure import Failure, TaskEnd

CHECKPOINTED = 75
"""Exit code of a rank that saved because it was asked to: start me again (EX_TEMPFAIL of sysexits.h)."""


class Runner(Protocol):
    """Ranks that are started together and end together.

    Attributes:
        ends: ranks that ended badly, in the order in which that was seen, until the runner ended the others itself.
        failure: of the launcher itself, where it could not start the ranks or ended without a word of theirs.
        due_to: why the scheduler ended them, in its words, where it said so: ``PREEMPTION``, ``NODE FAILURE`` ...
        lost_node: the node that the launcher has lost; empty where it has lost none.
        reported: hosts of which some rank was seen to end, well or badly.
    """

    ends: list[TaskEnd]
    failure: Failure | None
    due_to: str | None
    lost_node: str
    reported: set[str]

    def start(self) -> None:
        """Start all ranks."""

    def poll(self) -> int | None:
        """The exit code of all ranks together, once all have ended: 0, 75, or that of a failure."""

    def be_patient(self) -> None:
        """Do not end the others yet, though one has failed: it is not known why."""

    def terminate(self) -> None:
        """End all ranks now."""


def rank_log(folder: Path, rank: int) -> Path:
    """The log of one rank in the log folder of an attempt."""
    return folder / f"rank-{rank}.log"
