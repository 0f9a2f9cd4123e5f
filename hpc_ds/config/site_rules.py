"""A job against the rules of a site: the site's defaults filled in, and what would be refused or never start there.

A rule whose source is not verified never refuses a job; it warns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.config.job import time_limit_s
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.config.job import JobConfig, Resources
    from hpc_ds.config.site import Place, SiteConfig

_MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
_TASK_OPTIONS = ("ntasks", "ntasks-per-node", "cpus-per-task")


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why a job does not fit a place.

    Attributes:
        key: of the job file.
        wrong: a sentence without the cure.
        cure: what to do.
        rule: the field of the site file that says so.
    """

    key: str
    value: object
    wrong: str
    cure: str
    rule: str


def asked(job: JobConfig, site: SiteConfig, option: str) -> str | None:
    """The value of an sbatch option as the job, else the site, asks for it; None where neither does."""
    extra = job.resources.sbatch.get(option)
    if extra is not None:
        return None if extra is False else str(extra)
    own = getattr(job.resources, option.replace("-", "_"), None)
    return str(own) if own is not None else site.sbatch.get(option)


def places(job: JobConfig, site: SiteConfig) -> list[tuple[str, Place]]:
    """Where the job goes, the narrowest first: its QOS, its partition, the site; each with its key in the site file.

    Of several partitions the first one that the site file has.
    """
    found: list[tuple[str, Place]] = []
    qos = asked(job, site, "qos") or site.default_qos
    if qos in site.qos:
        found.append((f"qos.{qos}", site.qos[str(qos)]))
    for partition in _partitions(job, site):
        if partition in site.partitions:
            found.append((f"partitions.{partition}", site.partitions[partition]))
            break
    return [*found, ("", site)]


def _partitions(job: JobConfig, site: SiteConfig) -> list[str]:
    return [name for name in (asked(job, site, "partition") or site.default_partition or "").split(",") if name]


def said(job: JobConfig, site: SiteConfig, name: str) -> tuple[str, object]:
    """The value of a field of the narrowest place that has one, and its key in the site file; else (name, None)."""
    for where, place in places(job, site):
        value = getattr(place, name)
        if value is not None and value != []:
            return f"{where}.{name}".lstrip("."), value
    return name, None


def gpus_per_rank(resources: Resources) -> int:
    """GPUs of each rank where they are asked for by rank.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    each, left = divmod(resources.gpus_per_node, resources.ranks_per_node)
    if left:
        raise ConfigError(
            f"resources.gpus_per_node {resources.gpus_per_node}: not a multiple of the {resources.ranks_per_node} ranks "
            "on a node, as this site asks for GPUs by rank; change resources.tasks_per_node",
            key="resources.gpus_per_node",
            value=resources.gpus_per_node,
        )
    return each


def fitted(job: JobConfig, site: SiteConfig) -> Resources:
    """The job's resources with what the site knows better than the job: cores for each rank, memory, node features."""
    resources, changes = job.resources, dict[str, object]()
    if resources.cpus_per_task is None and "cpus-per-task" not in {*resources.sbatch, *site.sbatch}:
        _, per_gpu = said(job, site, "cpus_per_gpu")
        cpus, gpus = said(job, site, "cpus_per_node")[1], said(job, site, "gpus_per_node")[1]
        if per_gpu is None and isinstance(cpus, int) and isinstance(gpus, int):
            per_gpu = cpus // gpus
        if isinstance(per_gpu, int) and resources.gpus_per_node:
            changes["cpus_per_task"] = max(1, per_gpu * resources.gpus_per_node // resources.ranks_per_node)
    if site.memory == "whole_node" and not any(asked(job, site, option) for option in _MEMORY_OPTIONS):
        changes["mem"] = "0"
    constraint = said(job, site, "constraint")[1]
    if constraint is not None and asked(job, site, "constraint") is None and "constraint" not in resources.sbatch:
        changes["constraint"] = constraint
    return resources.model_copy(update=changes) if changes else resources


def takes_full_nodes(job: JobConfig, site: SiteConfig) -> bool:
    """Whether the job's ranks take every GPU of their nodes, one each."""
    gpus = said(job, site, "gpus_per_node")[1]
    return gpus == job.resources.gpus_per_node == job.resources.ranks_per_node


def check_job(job: JobConfig, site: SiteConfig) -> list[str]:
    """Refuse what the site would refuse, or would never start; returns warnings.

    Raises:
        ConfigError: one sentence with the key, its value, and what is allowed.
    """
    if site.scheduler == "local":
        _refuse_options_of_srun(job, site)
        return []
    warnings = []
    for one in (*_requests(job, site), *_shape(job, site), *_account(job, site), *_time(job, site)):
        known = site.source_of(one.rule)
        if known is None or known[1].verified:
            raise ConfigError(f"{_subject(one)}: {one.wrong}; {one.cure}", key=one.key, value=one.value)
        warnings.append(f"{_subject(one)}: {one.wrong} (not verified: {known[1].source}); {one.cure}")
    return [*warnings, *_surprises(job, site)]


def _refuse_options_of_srun(job: JobConfig, site: SiteConfig) -> None:
    if job.runtime.kind in {"pyxis", "edf"}:
        raise ConfigError(
            f"runtime.kind {job.runtime.kind!r}: an option of srun, which site {site.name!r} does not have; use apptainer",
            key="runtime.kind",
            value=job.runtime.kind,
        )


def _subject(complaint: Complaint) -> str:
    return complaint.key if complaint.value is None else f"{complaint.key} {complaint.value!r}"


def _requests(job: JobConfig, site: SiteConfig) -> Iterator[Complaint]:
    """What may not be asked for at all, or must be."""
    extra = job.resources.sbatch
    memory = next((option for option in _MEMORY_OPTIONS if asked(job, site, option) is not None), None)
    if site.memory == "forbidden" and memory is not None:
        key = "resources.mem" if memory == "mem" and "mem" not in extra else f"resources.sbatch.{memory}"
        wrong = f"site {site.name!r} gives memory by cores and GPUs, and refuses --{memory}"
        yield Complaint(key, asked(job, site, memory), wrong, "leave it out", "memory")
    if site.memory == "required" and memory is None:
        wrong = f"missing; site {site.name!r} starts no job without it"
        yield Complaint("resources.mem", None, wrong, "say how much a node is to give", "memory")
    for option in _TASK_OPTIONS:
        if site.sbatch_ntasks == "forbidden" and extra.get(option):
            wrong = f"sbatch of site {site.name!r} refuses it"
            cure = "use resources.tasks_per_node and resources.cpus_per_task, which srun is told"
            yield Complaint(f"resources.sbatch.{option}", extra[option], wrong, cure, "sbatch_ntasks")
    resources = job.resources
    if site.gpu_request == "gpus_per_task" and resources.gpus_per_node % resources.ranks_per_node:
        gpus_per_rank(resources)


def _shape(job: JobConfig, site: SiteConfig) -> Iterator[Complaint]:
    """Nodes, GPUs and cores."""
    resources = job.resources
    for where, place in places(job, site):
        there = _in_words(site, where)
        if place.max_nodes is not None and resources.nodes > place.max_nodes:
            wrong = f"{there} gives a job at most {place.max_nodes}"
            yield Complaint("resources.nodes", resources.nodes, wrong, "ask for fewer", _rule(where, "max_nodes"))
        if place.min_nodes is not None and resources.nodes < place.min_nodes:
            wrong = f"{there} is for jobs of at least {place.min_nodes}"
            yield Complaint("resources.nodes", resources.nodes, wrong, "ask for more", _rule(where, "min_nodes"))
    rule, gpus = said(job, site, "gpus_per_node")
    if isinstance(gpus, int) and resources.gpus_per_node > gpus:
        wrong = f"a node of {_in_words(site, rule.rpartition('.')[0])} has {gpus}"
        yield Complaint("resources.gpus_per_node", resources.gpus_per_node, wrong, "ask for fewer, or more nodes", rule)
    full = gpus is None or resources.gpus_per_node == gpus
    if said(job, site, "whole_nodes")[1] == "several" and resources.nodes > 1 and resources.gpus_per_node and not full:
        wrong = f"site {site.name!r} gives jobs of several nodes whole nodes only, which have {gpus}"
        cure = f"ask for {gpus}, or for one node"
        yield Complaint("resources.gpus_per_node", resources.gpus_per_node, wrong, cure, "whole_nodes")
    rule, cpus = said(job, site, "cpus_per_node")
    per_task = fitted(job, site).cpus_per_task
    if isinstance(cpus, int) and per_task is not None and per_task * resources.ranks_per_node > cpus:
        wrong = (
            f"{resources.ranks_per_node} ranks of them on a node of {_in_words(site, rule.rpartition('.')[0])}, where "
        )
        yield Complaint("resources.cpus_per_task", per_task, f"{wrong}jobs may use {cpus}", "ask for fewer", rule)


def _account(job: JobConfig, site: SiteConfig) -> Iterator[Complaint]:
    rule, account = site.account, asked(job, site, "account")
    if rule is None:
        return
    form = f", of the form {rule.form}" if rule.form else ""
    if account is None:
        if rule.required:
            wrong = f"missing; site {site.name!r} starts no job without"
            yield Complaint("resources.account", None, wrong, f"name yours{form}", "account.required")
    elif rule.pattern is not None and not re.fullmatch(rule.pattern, account):
        wrong = f"not an account as site {site.name!r} has them"
        cure = f"write one{form or f' that matches {rule.pattern}'}"
        yield Complaint("resources.account", account, wrong, cure, "account.pattern")


def longest_s(place: Place, nodes: int) -> int | None:
    """The longest time, in seconds, of a job of so many nodes there; None where none is known."""
    limits = []
    if isinstance(place.walltime, str):
        limits.append(time_limit_s(place.walltime))
    elif place.walltime is not None:
        fitting = [step.time for step in place.walltime if step.nodes is None or nodes <= step.nodes]
        limits += [time_limit_s(time) for time in fitting[:1]]
    if place.max_node_hours is not None:
        limits.append(int(place.max_node_hours * 3600 / nodes))
    return min(limits, default=None)


def _time(job: JobConfig, site: SiteConfig) -> Iterator[Complaint]:
    resources = job.resources
    if resources.time is None:
        return
    for where, place in places(job, site):
        longest = longest_s(place, resources.nodes)
        if longest is not None and time_limit_s(resources.time) > longest:
            size = "1 node" if resources.nodes == 1 else f"{resources.nodes} nodes"
            wrong = f"{_in_words(site, where)} lets a job of {size} run for {in_hours(longest)} at most"
            cure = "ask for less, a run goes on beyond it"
            rule = _rule(where, "walltime" if place.walltime is not None else "max_node_hours")
            yield Complaint("resources.time", resources.time, wrong, cure, rule)


def _surprises(job: JobConfig, site: SiteConfig) -> Iterator[str]:
    """What is allowed, and may not be what was meant."""
    resources = job.resources
    default = said(job, site, "default_time")[1]
    if resources.time is None and asked(job, site, "time") is None and isinstance(default, str):
        yield f"resources.time: not given; site {site.name!r} ends such a job after {in_hours(time_limit_s(default))}"
    gpus = said(job, site, "gpus_per_node")[1]
    if said(job, site, "whole_nodes")[1] == "always" and isinstance(gpus, int) and 0 < resources.gpus_per_node < gpus:
        yield (
            f"resources.gpus_per_node {resources.gpus_per_node}: nodes are given and charged whole here, and one has {gpus}"
        )
    for partition in _partitions(job, site):
        if site.partitions and partition not in site.partitions:
            known = ", ".join(sorted(site.partitions))
            yield f"resources.partition {partition!r}: the file of site {site.name!r} knows only {known}"
    qos = asked(job, site, "qos")
    if qos is not None and site.qos and qos not in site.qos:
        yield f"resources.qos {qos!r}: the file of site {site.name!r} knows only {', '.join(sorted(site.qos))}"
    if job.runtime.in_container and site.containers and job.runtime.kind not in site.containers:
        known = ", ".join(site.containers)
        yield f"runtime.kind {job.runtime.kind!r}: the file of site {site.name!r} knows only {known}"
    if site.requeue == "refused":
        yield f"site {site.name!r}: jobs may not be queued again; a run goes on in jobs of their own instead"


def in_hours(seconds: int) -> str:
    """Seconds as Slurm writes a time limit: ``HH:MM:SS``."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _rule(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _in_words(site: SiteConfig, where: str) -> str:
    """``partitions.gpu`` -> partition 'gpu' of site 'x'."""
    section, _, name = where.partition(".")
    kind = {"partitions": "partition", "qos": "QOS"}.get(section)
    return f"{kind} {name!r} of site {site.name!r}" if kind else f"site {site.name!r}"
