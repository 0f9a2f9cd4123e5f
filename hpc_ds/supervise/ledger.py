"""The ledger of a run: ``attempts.jsonl``, one line when an attempt opens and one when it closes.

An attempt that was opened and never closed had a supervisor that was killed before it could say why; the next one
closes it as ``lost``, or as ``node_failure`` where its node is down.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.layout import newest_step
from hpc_ds.errors import NodeListError, RunError
from hpc_ds.launch.node_list import expand
from hpc_ds.run_dir import append_line, read_lines, read_object
from hpc_ds.supervise.progress import Progress
from hpc_ds.supervise.say import say
from hpc_ds.tail import end_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hpc_ds.run_dir import RunDir


_CLAIM_S = 2.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: counted from 1.
        cause: why it ended; None while it runs.
        action: what the supervisor did about it: finish, requeue, successor, hold, leave.
        first_step, last_step: optimizer steps it took; None where it took none.
        saved_step: step of the newest checkpoint when it ended; None where there was none.
        first_step_s: seconds from the start of the attempt to the end of its first step.
        step_s: the longest that a step took, but the first; save_s: what the last save took until it was durable.
        lost_s: seconds that went into steps beyond ``saved_step``, which have to be taken again.
        preflight_s: seconds that the preflight took; None where there was none.
        node: the node that the end is blamed on; empty where none is; several, folded, after a preflight.
        detail: one sentence for a person.
        failure: the rank that failed first, for a crash.
    """

    number: int
    job_id: str = ""
    host: str = ""
    nodes: str = ""
    opened: float = 0.0
    closed: float | None = None
    cause: str | None = None
    action: str | None = None
    exit_code: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    saved_step: int | None = None
    first_step_s: float | None = None
    step_s: float | None = None
    save_s: float | None = None
    lost_s: float | None = None
    preflight_s: float | None = None
    node: str = ""
    detail: str = ""
    failure: dict[str, Any] | None = field(default=None)

    @property
    def node_names(self) -> list[str]:
        """The nodes it ran on, one by one."""
        return _names(self.nodes)

    @property
    def blamed(self) -> list[str]:
        """The nodes that its end is blamed on, one by one."""
        return _names(self.node)


def _names(nodes: str) -> list[str]:
    try:
        return expand(nodes)
    except NodeListError:
        return [nodes]


def read_ledger(run: RunDir) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    attempts: dict[int, dict[str, Any]] = {}
    known = set(Attempt.__dataclass_fields__)
    for line in read_lines(run.ledger):
        number = line.get("number")
        if isinstance(number, int):
            attempts.setdefault(number, {}).update({key: value for key, value in line.items() if key in known})
    return [Attempt(**fields) for _, fields in sorted(attempts.items())]


def open_attempt(
    run: RunDir, job_id: str, host: str, nodes: str, *, down: Callable[[list[str]], list[str]] = lambda _nodes: []
) -> Attempt:
    """Open the next attempt; one that a killed supervisor left open is closed first.

    Two jobs that begin in the same moment do not both get it: the folder of its logs can be made once.

    Args:
        run: whose ledger.
        job_id: of the job that this attempt is.
        host: on which the supervisor runs.
        nodes: of the job.
        down: those of some nodes that do not work now: such a one took its supervisor with it.

    Raises:
        RunError: another job has begun the attempt.
    """
    attempts = read_ledger(run)
    if attempts and attempts[-1].cause is None:
        last = attempts[-1]
        known = {"action": "leave", **outcome(run, last.opened, _read_again(run, last.number))}
        known["closed"] = max(last.opened, _last_sign_of(run, last.number))
        if last.host != host and down([last.host]):
            detail = f"node {last.host} was lost, and the supervisor with it"
            close_attempt(run, last.number, cause="node_failure", node=last.host, detail=detail, **known)
        else:
            detail = "the supervisor was killed before it could say why"
            close_attempt(run, last.number, cause="lost", detail=detail, **known)
    number = _claim(run, attempts[-1].number + 1 if attempts else 1)
    attempt = Attempt(number=number, job_id=job_id, host=host, nodes=nodes, opened=time.time())
    opened = {"number": attempt.number, "job_id": job_id, "host": host, "nodes": nodes, "opened": attempt.opened}
    _write(run, {"event": "opened", **opened})
    return attempt


def _claim(run: RunDir, number: int) -> int:
    """Make the attempt with this number, or one after it, ours alone."""
    while True:
        try:
            run.attempt_logs(number).mkdir(parents=True)
        except FileExistsError:
            time.sleep(_CLAIM_S)  # whoever made it writes it into the ledger at once
            if any(attempt.number == number for attempt in read_ledger(run)):
                raise RunError(
                    f"run {str(run.root)!r}: another job began attempt {number} in the same moment; cancel one of them"
                ) from None
            number += 1  # it never got as far: its disk was full, or it was killed
        except OSError:
            return number  # no folder can be made: that is told where logs are opened
        else:
            return number


def _read_again(run: RunDir, number: int) -> Progress:
    progress = Progress(run, number, from_begin=True)
    progress.update()
    return progress


def _last_sign_of(run: RunDir, number: int) -> float:
    """When an attempt was last known to run: the time until the next one began was spent in the queue."""
    signs = [float(event["time"]) for event in end_of(run.events) if event.get("attempt") == number and "time" in event]
    with contextlib.suppress(OSError):
        signs += [path.stat().st_mtime for path in run.beats(number).iterdir()]
    return max(signs, default=0.0)


def close_attempt(run: RunDir, number: int, **fields: Any) -> None:
    """Close an attempt with its cause and what is known about it."""
    _write(run, {"event": "closed", "number": number, "closed": time.time(), **fields})


def note_preflight(run: RunDir, number: int, seconds: float) -> None:
    """Write down what the preflight of an attempt took, while the attempt goes on."""
    _write(run, {"event": "preflight", "number": number, "preflight_s": seconds})


def _write(run: RunDir, line: dict[str, Any]) -> None:
    """Add a line; on a full disk the run goes on without it, because a lost line is better than a lost requeue."""
    try:
        append_line(run.ledger, line)
    except OSError as error:
        say(f"ledger {str(run.ledger)!r}: not written: {error.strerror}: {json.dumps(line)}")


def outcome(run: RunDir, opened: float, progress: Progress) -> dict[str, Any]:
    """What an attempt has achieved, as fields of the ledger."""
    saved = saved_step(run, progress.saved_step)
    first_at = progress.first_step_at
    return {
        "first_step": progress.first_step,
        "last_step": progress.last_step,
        "saved_step": saved,
        "first_step_s": None if first_at is None else round(max(first_at - opened, 0.0), 3),
        "step_s": progress.step_s,
        "save_s": progress.save_s,
        "lost_s": round(progress.lost_s(saved), 3),
    }


def saved_step(run: RunDir, told: int | None = None) -> int | None:
    """The step that a resume would go on from; None where nothing is saved.

    The folder is asked first: a save behind the training may be committed when nobody is left to write of it. Where a
    script saves elsewhere, rank 0's words are all there is.

    Args:
        run: whose checkpoints.
        told: the last save that rank 0 told of, where that is known.
    """
    folder = read_object(run.config).get("checkpoint", {}).get("dir") or run.checkpoints
    committed = None
    with contextlib.suppress(OSError):  # a file server that does not answer as it should
        committed = newest_step(Path(folder))
    if committed is not None or told is not None:
        return committed if committed is not None else told
    said = [int(event["step"]) for event in end_of(run.events) if event.get("event") == "saved"]
    before = [attempt.saved_step for attempt in read_ledger(run) if attempt.saved_step is not None]
    return [*before, *said][-1] if before or said else None
