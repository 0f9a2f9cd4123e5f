"""Where the time of a run went, and how much of what it was given moved it forward.

    goodput = training / allocated

- *allocated*: from an attempt's begin to its end, summed over attempts, as the ledger has it.
- Each second of it is one of
  - *start_up*: from the attempt's begin to the end of its first step, less what a step takes (the median); all of an
    attempt without a step; less its preflight.
  - *preflight*: in looking at the nodes before the ranks started.
  - *training*: in steps that counted, saves left out.
  - *lost*: in steps that did not: those beyond what the next attempt with steps went on from; after the last attempt,
    unless it finished or goes on, those beyond the newest checkpoint.
  - *saving*: for how long steps stood still for saves.
  - *other*: the rest, such as agreeing to stop, a hang, or waiting to be ended.
- Outside of the allocation there are *queueing*: from a submission, or the end of an attempt that was queued again, to
  the begin of the next; and *stopped*: from the end of an attempt that nothing followed to a person's `hpcds resume`.

How long a step took is what rank 0 wrote in events.jsonl (``seconds``). Hours are seconds times GPUs of the attempt, or
ranks where it had no GPU. Where slurmdbd knows the jobs, its allocated time stands beside ours: it counts from the
start of the job script, and starts that never got as far as a ledger.
"""

from __future__ import annotations

import re
import time
from array import array
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.slurm import Slurm
from hpc_ds.report.progress import world_size
from hpc_ds.report.status import status_of
from hpc_ds.run_dir import read_object
from hpc_ds.tail import each

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hpc_ds.report.status import Status
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt

IN_ALLOCATION = ("training", "preflight", "start_up", "saving", "lost", "other")
OUTSIDE = ("queueing", "stopped")
_HOUR_S = 3600.0


@dataclass(slots=True)
class Split:
    """Seconds of one attempt, or of all."""

    training: float = 0.0
    preflight: float = 0.0
    start_up: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    other: float = 0.0
    queueing: float = 0.0
    stopped: float = 0.0

    @property
    def allocated(self) -> float:
        """Seconds that the run was given."""
        return self.training + self.preflight + self.start_up + self.saving + self.lost + self.other

    def as_data(self) -> dict[str, float]:
        """Rounded, with the sum."""
        return {"allocated": round(self.allocated, 3), **{name: round(s, 3) for name, s in asdict(self).items()}}


@dataclass(slots=True)
class Steps:
    """The steps that one attempt took, in their order: number and seconds; and step -> seconds that a save of it cost."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    saves: dict[int, float] = field(default_factory=dict)
    first_at: float | None = None
    last_at: float = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """Note one event of the attempt."""
        kind, at, step = event.get("event"), event.get("time"), event.get("step")
        if not isinstance(step, int) or not isinstance(at, int | float):
            return
        if kind == "step":
            took = event.get("seconds")
            self.seconds.append(float(took if isinstance(took, int | float) else max(at - (self.last_at or at), 0.0)))
            self.numbers.append(step)
            self.first_at = at if self.first_at is None else self.first_at
            self.last_at = at
        elif kind == "saved":
            stall = event.get("stall_s", event.get("seconds"))
            self.saves[step] = self.saves.get(step, 0.0) + float(stall or 0.0)


@dataclass(frozen=True, slots=True)
class Goodput:
    """The account of a run.

    Attributes:
        total: seconds of all attempts.
        attempts: seconds of each, with its number, cause, and how many GPUs or ranks it had.
        unit: what hours are of: GPU, or rank where an attempt had no GPU.
        hours: of the allocation and each part of it.
        by_cause: the same of the attempts that ended for each cause, and how many they were.
        sacct_allocated: seconds that slurmdbd counts for the jobs of the run; None where it knows nothing.
    """

    run_dir: str
    name: str
    state: str
    total: Split
    attempts: list[dict[str, Any]]
    unit: str
    hours: dict[str, float]
    by_cause: dict[str, dict[str, float]]
    sacct_allocated: float | None

    @property
    def goodput(self) -> float | None:
        """From 0 to 1; None before anything was allocated."""
        return self.total.training / self.total.allocated if self.total.allocated > 0 else None

    def as_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "run_dir": self.run_dir,
            "name": self.name,
            "state": self.state,
            "goodput": self.goodput,
            "seconds": self.total.as_data(),
            "unit": self.unit,
            "hours": self.hours,
            "hours_by_cause": self.by_cause,
            "sacct_allocated_s": self.sacct_allocated,
            "attempts": self.attempts,
        }


def goodput_of(run: RunDir, status: Status | None = None, now: float | None = None) -> Goodput:
    """Add up a run."""
    status, now = status or status_of(run), time.time() if now is None else now
    attempts, taken = status.attempts, steps_by_attempt(run)
    steps = [taken.get(attempt.number, Steps()) for attempt in attempts]
    ends = [_end(attempt, one, now, over=status.over) for attempt, one in zip(attempts, steps, strict=True)]
    limits = kept_until(attempts, steps, over=status.over)
    splits = [
        split(attempt.opened, end, one, limit, attempt.preflight_s or 0.0)
        for attempt, end, one, limit in zip(attempts, ends, steps, limits, strict=True)
    ]
    _between(run, attempts, ends, splits)
    configs = [_config_of(run, attempt.number) for attempt in attempts]
    gpus = bool(configs) and all(_gpus(config) for config in configs)
    devices = [_gpus(config) if gpus else world_size(config) for config in configs]
    waiting = Split(queueing=_waits_now(run, attempts, ends, now) if status.state == "waiting" else 0.0)
    return Goodput(
        run_dir=status.run_dir,
        name=status.name,
        state=status.state,
        total=_sum([*splits, waiting]),
        attempts=[
            {"number": attempt.number, "cause": attempt.cause, "devices": count, "seconds": one.as_data()}
            for attempt, one, count in zip(attempts, splits, devices, strict=True)
        ],
        unit="GPU" if gpus else "rank",
        hours=_hours(splits, devices),
        by_cause=_by_cause(attempts, splits, devices, "lost" if status.over else "running"),
        sacct_allocated=_accounted(run),
    )


def steps_by_attempt(run: RunDir) -> dict[int, Steps]:
    """Attempt -> the steps it took; reads all events, one by one."""
    found: dict[int, Steps] = {}
    for event in each(run.events):
        number = event.get("attempt")
        if isinstance(number, int):
            found.setdefault(number, Steps()).take(event)
    return found


def kept_until(attempts: Sequence[Attempt], steps: Sequence[Steps], *, over: bool) -> list[int | None]:
    """Of each attempt the last step that counted; None: all of its steps did."""
    limit: int | None = None
    last = attempts[-1] if attempts else None
    if last is not None and last.cause != "finished" and (last.cause is not None or over):
        saved = [attempt.saved_step for attempt in attempts if attempt.saved_step is not None]
        limit = saved[-1] if saved else 0
    limits = []
    for one in reversed(steps):
        limits.append(limit)
        if one.numbers:
            limit = min([one.numbers[0] - 1] if limit is None else [limit, one.numbers[0] - 1])
    return limits[::-1]


def split(opened: float, end: float, steps: Steps, limit: int | None, preflight_s: float = 0.0) -> Split:
    """Where the seconds of one attempt went."""
    until = end if steps.first_at is None else steps.first_at
    preflight_s = min(preflight_s, max(until - opened, 0.0))
    if steps.first_at is None:
        return Split(preflight=preflight_s, start_up=max(end - opened - preflight_s, 0.0))
    first_s = min(steps.seconds[0], median(steps.seconds[1:] or steps.seconds))
    found = Split(preflight=preflight_s, start_up=max(steps.first_at - opened - first_s - preflight_s, 0.0))
    before = None
    for place, (number, took) in enumerate(zip(steps.numbers, steps.seconds, strict=True)):
        seconds = took if place else first_s
        stall = min(steps.saves.get(before, 0.0) if before is not None else 0.0, seconds)
        found.saving += stall
        if limit is None or number <= limit:
            found.training += seconds - stall
        else:
            found.lost += seconds - stall
        before = number
    found.saving += min(steps.saves.get(steps.numbers[-1], 0.0), max(end - steps.last_at, 0.0))
    found.other = max(end - opened - found.allocated, 0.0)
    return found


def _end(attempt: Attempt, steps: Steps, now: float, *, over: bool) -> float:
    if attempt.closed is not None:
        return attempt.closed
    return max(steps.last_at, attempt.opened) if over else now


def _between(run: RunDir, attempts: Sequence[Attempt], ends: Sequence[float], splits: Sequence[Split]) -> None:
    """What passed before each attempt: in the queue, or stopped until a person resumed the run."""
    queued = read_object(run.job).get("queued") or {}
    for place, attempt in enumerate(attempts):
        before = attempts[place - 1] if place else None
        since = ends[place - 1] if place else _submitted(run, attempt.opened)
        gap = max(attempt.opened - since, 0.0)
        stopped = 0.0
        if before is not None and _left(before, same_job=before.job_id == attempt.job_id):
            resumed = attempt.opened if before.job_id == attempt.job_id else queued.get(attempt.job_id, attempt.opened)
            stopped = min(max(resumed - since, 0.0), gap)
        splits[place].stopped, splits[place].queueing = stopped, gap - stopped


def _left(attempt: Attempt, *, same_job: bool) -> bool:
    """Whether nothing would have followed an attempt by itself; Slurm may have queued the job of a lost one again."""
    return attempt.action == "hold" or attempt.cause == "cancelled" or (attempt.cause == "lost" and not same_job)


def _waits_now(run: RunDir, attempts: Sequence[Attempt], ends: Sequence[float], now: float) -> float:
    queued = read_object(run.job).get("queued") or {}
    since = max([*ends[-1:], *queued.values()], default=_submitted(run, now)) if attempts else _submitted(run, now)
    return max(now - since, 0.0)


def _submitted(run: RunDir, otherwise: float) -> float:
    told = read_object(run.provenance).get("submitted")
    return float(told) if isinstance(told, int | float) else otherwise


def _config_of(run: RunDir, attempt: int) -> dict[str, Any]:
    """The job as it was for an attempt: ``hpcds resume --set`` keeps the one before."""
    numbers = [re.fullmatch(r"config-before-attempt-(\d+)\.json", path.name) for path in run.root.iterdir()]
    later = sorted(int(match[1]) for match in numbers if match and int(match[1]) > attempt)
    return read_object(run.config_before(later[0]) if later else run.config)


def _gpus(config: Mapping[str, Any]) -> int:
    resources = config.get("resources") or {}
    return int(resources.get("nodes") or 1) * int(resources.get("gpus_per_node") or 0)


def _sum(splits: Sequence[Split]) -> Split:
    return Split(**{name: sum(getattr(one, name) for one in splits) for name in (*IN_ALLOCATION, *OUTSIDE)})


def _hours(splits: Sequence[Split], devices: Sequence[int]) -> dict[str, float]:
    pairs = list(zip(splits, devices, strict=True))
    names = ("allocated", *IN_ALLOCATION)
    return {name: round(sum(getattr(one, name) * count for one, count in pairs) / _HOUR_S, 6) for name in names}


def _by_cause(
    attempts: Sequence[Attempt], splits: Sequence[Split], devices: Sequence[int], open_means: str
) -> dict[str, dict[str, float]]:
    groups: dict[str, list[tuple[Split, int]]] = {}
    for attempt, one, count in zip(attempts, splits, devices, strict=True):
        groups.setdefault(attempt.cause or open_means, []).append((one, count))
    return {
        cause: {"attempts": len(pairs), **_hours([one for one, _ in pairs], [count for _, count in pairs])}
        for cause, pairs in groups.items()
    }


def _accounted(run: RunDir) -> float | None:
    job = read_object(run.job)
    if read_object(run.site).get("scheduler") == "local" or not job.get("job_id"):
        return None
    accounts = Slurm().accounts([str(job_id) for job_id in (*job.get("earlier", []), job["job_id"])])
    return float(sum(account.elapsed_s for account in accounts)) if accounts else None
