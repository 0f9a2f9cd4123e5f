"""What a run waits for before it starts: other runs, and how they must end. Kept as ``after.json`` in its folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.errors import SchedulerError
from hpc_ds.run_dir import SWEEP_FILE, RunDir, append_line, is_sweep, read_lines, read_object, runs_in, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.cluster.scheduler import Scheduler

WHEN = {"ok": "afterok", "any": "afterany", "notok": "afternotok"}
"""How a run must end for another to start, and Slurm's word for it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A run waits for another.

    Attributes:
        run_dir: of the other.
        job_id: of the other, now.
        when: it has finished (``ok``), is over however (``any``), or is over and has not finished (``notok``).
    """

    run_dir: Path
    job_id: str
    when: str


def dependency(waits: Sequence[Wait]) -> str | None:
    """Waits as sbatch's ``--dependency`` takes them; None where there are none."""
    parts = []
    for when, word in WHEN.items():
        job_ids = list(dict.fromkeys(_arrays([wait for wait in waits if wait.when == when])))
        if job_ids:
            parts.append(":".join([word, *job_ids]))
    return ",".join(parts) or None


def _arrays(waits: Sequence[Wait]) -> list[str]:
    """The job ids; of a sweep that is waited for as a whole the array's."""
    tasks: dict[tuple[Path, str], int] = {}
    for wait in waits:
        key = wait.run_dir.parent, wait.job_id.partition("_")[0]
        tasks[key] = tasks.get(key, 0) + 1
    whole = {key for key, count in tasks.items() if is_sweep(key[0]) and count == len(runs_in(key[0]))}
    keys = [(wait.run_dir.parent, wait.job_id.partition("_")[0]) for wait in waits]
    return [key[1] if key in whole else wait.job_id for key, wait in zip(keys, waits, strict=True)]


def write_waits(run: RunDir, waits: Sequence[Wait]) -> None:
    """Write down what a run waits for, and with each of those runs that it does."""
    _write(run, waits)
    for wait in waits:
        append_line(RunDir(wait.run_dir).dependents, {"run_dir": str(run.root)}, durable=False)


def read_waits(run: RunDir) -> list[Wait]:
    """What a run waits for."""
    return [
        Wait(Path(wait["run_dir"]), wait["job_id"], wait["when"]) for wait in read_object(run.after).get("after", [])
    ]


def redirect(run: RunDir, old: str, new: str, scheduler: Scheduler) -> list[str]:
    """Let the runs that wait for job ``old`` of a run wait for ``new``, with which the run goes on.

    Returns:
        A sentence for each that could not be told.
    """
    problems = []
    for line in read_lines(run.dependents):
        other = RunDir(Path(line["run_dir"]))
        waits = read_waits(other)
        changed = [replace(wait, job_id=new) if wait.job_id == old else wait for wait in waits]
        job_id = str({**read_object(other.root / SWEEP_FILE), **read_object(other.job)}.get("job_id", ""))
        if changed == waits or not job_id:
            continue
        try:
            job = scheduler.show(job_id)
            if job is not None and job.state == "PENDING":
                scheduler.depend(job_id, dependency(changed) or "")
                _write(other, changed)
        except (SchedulerError, OSError) as error:
            problems.append(f"run {str(other.root)!r}, job {job_id}, waits for job {old}, which is now {new}: {error}")
    return problems


def _write(run: RunDir, waits: Sequence[Wait]) -> None:
    data = [{"run_dir": str(wait.run_dir), "job_id": wait.job_id, "when": wait.when} for wait in waits]
    write_json(run.after, {"after": data})
