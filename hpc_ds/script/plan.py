"""What a job will do and cost, before it is queued: the plan that ``hpcds submit --dry-run`` prints."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.config.job import lead_s, time_limit_s
from hpc_ds.config.load import in_words
from hpc_ds.config.memory import STAGES, memory_of
from hpc_ds.config.site_rules import check_job, fitted
from hpc_ds.config.training import load_training, resolve_batch_sizes

if TYPE_CHECKING:
    from hpc_ds.cluster.precheck import Answer
    from hpc_ds.config.batch import BatchSizes
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(frozen=True, slots=True)
class Plan:
    """A job in numbers.

    Attributes:
        name, site: of the job.
        nodes, ranks_per_node, world_size: how many, and the ranks in all.
        gpus: in all.
        cpus_per_task: cores of a rank; None: the cluster's default.
        time_limit_s: of one start; None: the cluster's default.
        hours_unit: ``GPU-hours``, or ``node-hours`` where no GPU is asked for.
        hours: what one start costs if it takes its whole time; None where there is no limit.
        hours_per_hour: what an hour of it costs.
        lead_s: seconds before the limit at which the ranks begin to save, until saves were measured.
        signal: by which they are told.
        checkpoint: when the engine saves by itself, in words.
        batch: the batch arithmetic; None where the training config has no batch size.
        stage: of ZeRO; None without a training config.
        memory: stage -> bytes that a rank holds; empty where the number of parameters is not known.
        parameters: trainable ones.
        start: seconds since the epoch at which the scheduler expects it to start; None where it does not say.
        tasks: jobs of this shape, for a sweep.
        unverified: facts in the site file that nobody has checked.
        warnings: what is worth a look.
    """

    name: str
    site: str
    nodes: int
    ranks_per_node: int
    world_size: int
    gpus: int
    cpus_per_task: int | None
    time_limit_s: int | None
    hours_unit: str
    hours: float | None
    hours_per_hour: float
    lead_s: int
    signal: str
    checkpoint: str
    batch: BatchSizes | None
    stage: int | None
    memory: dict[int, float]
    parameters: int | None
    start: float | None = None
    tasks: int = 1
    unverified: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """The same as plain data."""
        batch = self.batch
        sizes = None if batch is None else {
            "train_batch_size": batch.train,
            "train_micro_batch_size_per_gpu": batch.micro,
            "gradient_accumulation_steps": batch.accumulation,
        }  # fmt: skip
        return asdict(self) | {"batch": sizes, "memory": {str(stage): held for stage, held in self.memory.items()}}


def plan_of(
    job: JobConfig, site: SiteConfig, answer: Answer | None = None, tasks: int = 1, *, check: bool = True
) -> Plan:
    """The plan of a job.

    Args:
        job: what is asked for.
        site: where.
        answer: what the scheduler said when it was asked.
        tasks: how many of it a sweep has.
        check: hold it against the site's limits.

    Raises:
        ConfigError: it can never start on this site.
    """
    resources, world_size = job.resources, job.resources.world_size
    warnings = check_job(job, site) if check else []
    gpus = resources.nodes * resources.gpus_per_node
    limit = None if resources.time is None else time_limit_s(resources.time)
    per_hour = float(gpus or resources.nodes)
    batch, stage, memory = None, None, {}
    if isinstance(job.training, dict):
        config, said = load_training(job.training, "job: training")
        warnings += said
        stage = config.zero_optimization.stage
        if config.train_batch_size is not None or config.train_micro_batch_size_per_gpu is not None:
            batch = resolve_batch_sizes(config, world_size, in_words(resources))
        if job.parameters is not None:
            memory = {one: memory_of(config, one, world_size, job.parameters).total for one in STAGES}
    if answer is not None and answer.warning:
        warnings.append(answer.warning)
    return Plan(
        name=job.name,
        site=site.name,
        nodes=resources.nodes,
        ranks_per_node=resources.ranks_per_node,
        world_size=world_size,
        gpus=gpus,
        cpus_per_task=fitted(job, site).cpus_per_task,
        time_limit_s=limit,
        hours_unit="GPU-hours" if gpus else "node-hours",
        hours=None if limit is None else round(per_hour * limit / 3600 * tasks, 4),
        hours_per_hour=per_hour,
        lead_s=lead_s(job),
        signal=job.restart.signal,
        checkpoint=_saves(job),
        batch=batch,
        stage=stage,
        memory=memory,
        parameters=job.parameters,
        start=None if answer is None else answer.start,
        tasks=tasks,
        unverified=site.unverified,
        warnings=warnings,
    )


def plan_lines(plan: Plan) -> list[str]:
    """The plan in words."""
    rows = [
        ("shape", _shape(plan)),
        ("time", _time(plan)),
        (
            "saves",
            f"{plan.checkpoint}; {plan.lead_s} s before the limit, told by {plan.signal}, until saves are measured",
        ),
        ("batch", _batch(plan)),
        *(("memory" if row == 0 else "", line) for row, line in enumerate(_memory(plan))),
        ("cost", _cost(plan)),
    ]
    if plan.start is not None:
        rows.append(("start", f"expected {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(plan.start))}"))
    if plan.unverified:
        rows.append(("site", f"{plan.site}: not verified: {', '.join(plan.unverified)}"))
    rows += [("warning", warning) for warning in plan.warnings]
    return [f"{title:<8} {text}" for title, text in rows]


def _shape(plan: Plan) -> str:
    what = f"{plan.tasks} jobs of " if plan.tasks > 1 else ""
    gpus = f", {_count(plan.gpus, 'GPU')} in all" if plan.gpus else ", no GPU"
    cores = "" if plan.cpus_per_task is None else f", {_count(plan.cpus_per_task, 'core')} each"
    nodes, ranks = _count(plan.nodes, "node"), _count(plan.ranks_per_node, "rank")
    return f"{what}{nodes} x {ranks} = {_count(plan.world_size, 'rank')}{cores}{gpus}"


def _time(plan: Plan) -> str:
    if plan.time_limit_s is None:
        return "no limit asked for: the cluster's default (--time sets one)"
    return f"at most {span(plan.time_limit_s)} a start; the run goes on beyond it with the next one"


def _batch(plan: Plan) -> str:
    batch = plan.batch
    if batch is None:
        return "no batch size in a training config" if plan.stage is not None else "no training config"
    return (
        f"train_batch_size {batch.train} = micro-batch {batch.micro} x accumulation {batch.accumulation} x "
        f"{_count(batch.world_size, 'rank')}"
    )


def _memory(plan: Plan) -> list[str]:
    if plan.stage is None:
        return ["not known without a training config"]
    if not plan.memory:
        return ["not known; give the number of parameters, such as --set parameters=7000000000"]
    stages = [f"stage {stage}{'*' if stage == plan.stage else ''} {_size(held)}" for stage, held in plan.memory.items()]
    return [
        f"a rank, {plan.parameters:,} parameters: {', '.join(stages)}",
        "* this job; activations and what is in flight come on top",
    ]


def _cost(plan: Plan) -> str:
    if plan.hours is None:
        return f"{plan.hours_per_hour * plan.tasks:g} {plan.hours_unit} an hour"
    return f"at most {plan.hours:g} {plan.hours_unit} " + ("a start" if plan.tasks == 1 else "if each starts once")


def _saves(job: JobConfig) -> str:
    checkpoint = job.checkpoint
    words = []
    if checkpoint.every_minutes == "auto":
        words.append(f"every {checkpoint.shortest_minutes:g} to {checkpoint.longest_minutes:g} min")
    elif checkpoint.every_minutes is not None:
        words.append(f"every {checkpoint.every_minutes:g} min")
    if checkpoint.every_steps is not None:
        words.append(f"every {_count(checkpoint.every_steps, 'step')}")
    return " and ".join(words) or "none but at a stop"


def span(seconds: float) -> str:
    """A time such as ``1 d 4 h`` or ``30 min``."""
    parts, left = [], int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(held: float) -> str:
    unit = 0
    while held >= 1024 and unit < len(_UNITS) - 1:
        held, unit = held / 1024, unit + 1
    return f"{held:.3g} {_UNITS[unit]}"
