"""What a cluster offers and how it wants to be asked: the shape of ``site_configs/*.json``.

A site, a partition and a QOS are all *places*: what one of them says of walltime, nodes or GPUs bounds a job that goes
there. ``sources`` says of each field where it comes from and whether that was verified; docs/sites.md has the table.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hpc_ds.config.job import Line, Positive, check_option_names, check_variable_names, time_limit_s
from hpc_ds.config.model import Model

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Container = Literal["apptainer", "pyxis", "shifter", "edf"]


def _time_limit(text: str) -> str:
    time_limit_s(text)
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}; mend it") from None
    return text


def _date(text: str) -> str:
    if not re.fullmatch(r"20\d\d(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?", text):
        raise ValueError("not a date; write YYYY, YYYY-MM or YYYY-MM-DD")
    return text


TimeLimit = Annotated[str, AfterValidator(_time_limit)]


class Source(Model):
    """Where a field comes from."""

    source: Line = Field(description="a page, a repository, or the command that said so")
    date: Annotated[str, AfterValidator(_date)] | None = Field(None, description="of the source, as far as it is known")
    verified: bool = Field(
        default=True, description="false: seen in somebody's script, old, or supposed; listed at submit"
    )


class WalltimeStep(Model):
    """The longest time of jobs up to a size."""

    nodes: Positive | None = Field(None, description="up to so many nodes; null: any number")
    time: TimeLimit = Field(description="as sbatch takes it")


class Place(Model):
    """What a site, a partition or a QOS offers a job there; null: nothing is known."""

    walltime: TimeLimit | list[WalltimeStep] | None = Field(
        None, description="longest time of one start, or a list of them by number of nodes"
    )
    default_time: TimeLimit | None = Field(None, description="what a job gets that asks for no time")
    min_nodes: Positive | None = Field(None, description="fewest nodes of a job")
    max_nodes: Positive | None = Field(None, description="most nodes of a job")
    max_node_hours: Seconds | None = Field(None, description="most nodes x hours of a job")
    max_jobs: Positive | None = Field(None, description="most jobs of a user at a time")
    gpus_per_node: Positive | None = Field(None, description="GPUs, as Slurm counts them, of a node")
    cpus_per_node: Positive | None = Field(None, description="cores of a node that jobs may use")
    cpus_per_gpu: Positive | None = Field(
        None, description="cores that belong to a GPU; default: cpus_per_node / gpus_per_node"
    )
    whole_nodes: Literal["always", "several"] | None = Field(
        None, description="nodes are given whole: always, or to jobs of several nodes"
    )
    constraint: Line | None = Field(None, description="node features to ask for where the job names none")
    interfaces: list[Line] = Field(default_factory=list, description="network interfaces, for NCCL and RCCL")
    allreduce_gb_s: Rate | None = Field(
        None,
        description="GB/s that each rank's link carries in a large all-reduce over several nodes, when all is well",
    )
    preemption: Literal["off", "requeue", "cancel", "suspend"] | None = Field(
        None, description="what may happen to a job in favour of others"
    )
    preemption_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="seconds between the first signal of a preemption and the last"
    )

    @field_validator("walltime")
    @classmethod
    def _rising_sizes(cls, walltime: str | list[WalltimeStep] | None) -> str | list[WalltimeStep] | None:
        if isinstance(walltime, list):
            sizes = [step.nodes or math.inf for step in walltime]
            if not sizes or any(size >= after for size, after in itertools.pairwise(sizes)):
                raise ValueError("not a list by rising number of nodes, null last; sort it")
        return walltime


class AccountRule(Model):
    """How jobs say who pays."""

    required: bool = Field(default=False, description="no job starts without")
    pattern: Annotated[Line, AfterValidator(_pattern)] | None = Field(
        None, description="regular expression that the whole name matches"
    )
    form: Line | None = Field(None, description="the form in words, for messages")


class Detect(Model):
    """By what a machine is known to belong to this cluster; one that fits is enough."""

    cluster_names: list[Line] = Field(default_factory=list, description="Slurm's ClusterName")
    hosts: list[Line] = Field(default_factory=list, description="host names; * and ? as in file names")
    variables: dict[str, list[Line]] = Field(
        default_factory=dict, description="environment variable -> its values here"
    )


class SiteConfig(Place):
    """One cluster."""

    name: str = Field(description="that of the file")
    description: str = Field(description="the cluster, and who runs it")
    scheduler: Literal["slurm", "local"] = Field(description="local: this machine, without Slurm")
    template: str = Field("slurm.sbatch.j2", description="file in templates/ that the job script is made from")
    gpu_request: Literal["gpus_per_node", "gres", "gpus_per_task", "gpus"] = Field(
        "gpus_per_node", description="how GPUs are asked for: on a node, by gres, for a rank, or for the job in all"
    )
    gpu_vendor: Literal["nvidia", "amd"] | None = Field(None, description="whose GPUs; for containers")
    memory: Literal["allowed", "forbidden", "whole_node", "required"] = Field(
        "allowed", description="--mem: as the job says, never, 0 where the job says nothing, or the job must say it"
    )
    sbatch_ntasks: Literal["allowed", "forbidden"] = Field(
        "allowed", description="whether sbatch takes --ntasks and --cpus-per-task; srun always does"
    )
    reserved_cpus: Positive | None = Field(None, description="cores of a node that the system keeps")
    default_partition: Line | None = Field(None, description="where Slurm puts a job that names no partition")
    default_qos: Line | None = Field(None, description="what Slurm gives a job that names no QOS")
    partitions: dict[str, Place] = Field(default_factory=dict, description="partition -> what holds there")
    qos: dict[str, Place] = Field(default_factory=dict, description="QOS -> what holds there")
    account: AccountRule | None = Field(None, description="how jobs say who pays")
    requeue: Literal["allowed", "refused"] = Field("allowed", description="whether a job may be queued again")
    requeued_on_node_failure: bool | None = Field(None, description="whether Slurm itself does so then")
    export: Literal["ALL", "NONE"] | None = Field(None, description="sbatch --export")
    sbatch: dict[str, Line] = Field(default_factory=dict, description="options that every job here carries")
    modules: list[Line] = Field(default_factory=list, description="modules that every job here loads")
    setup: list[Line] = Field(default_factory=list, description="shell lines that every job here starts with")
    env: dict[str, Line] = Field(default_factory=dict, description="variables that every job here gets")
    srun: list[Line] = Field(default_factory=list, description="options that every srun here carries")
    srun_full_node: list[Line] = Field(
        default_factory=list, description="further ones where ranks take every GPU of a node, one each"
    )
    containers: list[Container] = Field(default_factory=list, description="container runtimes there are")
    container_options: dict[Container, list[Line]] = Field(
        default_factory=dict, description="container runtime -> options that it always gets here"
    )
    port_range: Annotated[list[Port], Field(min_length=2, max_length=2)] | None = Field(
        None, description="first and last port on which rank 0 may listen; null: any free one"
    )
    scratch: Line | None = Field(None, description="where run folders and checkpoints belong")
    purge_days: Positive | None = Field(None, description="days after which files there are removed")
    internet: bool | None = Field(None, description="whether compute nodes reach the internet")
    detect: Detect | None = Field(None, description="by what `hpcds site detect` knows the cluster")
    notes: list[Line] = Field(default_factory=list, description="what else a user should know")
    sources: dict[str, Source] = Field(
        default_factory=dict, description="field, such as env.NCCL_NET or partitions.gpu.walltime -> where it is from"
    )
    grace_s: Seconds = Field(
        20.0, description="local only: seconds between the first signal of a preemption and the last"
    )
    kill_wait_s: Seconds = Field(
        30.0, description="local only: seconds between SIGTERM and SIGKILL at the end of a job"
    )

    @field_validator("sbatch")
    @classmethod
    def _options(cls, options: dict[str, str]) -> dict[str, str]:
        check_option_names(options)
        return options

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        check_variable_names(env)
        return env

    @field_validator("port_range")
    @classmethod
    def _rising(cls, ports: list[int] | None) -> list[int] | None:
        if ports is not None and ports[0] > ports[1]:
            raise ValueError("the first port is above the last; exchange them")
        return ports

    @model_validator(mode="after")
    def _sources_of_what_is_there(self) -> SiteConfig:
        data = self.model_dump(mode="json", exclude={"sources"}, exclude_unset=True)
        for field in self.sources:
            if not _stands_in(data, field):
                raise ValueError(f"sources.{field}: this file has no such field; name one that it has")
        return self

    @property
    def unverified(self) -> list[str]:
        """Fields of which it is not verified that they are so."""
        return sorted(field for field, source in self.sources.items() if not source.verified)

    def source_of(self, field: str) -> tuple[str, Source] | None:
        """What ``sources`` says of a field, or of the section around it."""
        while field:
            if field in self.sources:
                return field, self.sources[field]
            field = field.rpartition(".")[0]
        return None


def _stands_in(data: Any, field: str) -> bool:
    """Whether a dotted key stands in plain data. Names of partitions may have dots too."""
    if not isinstance(data, dict):
        return False
    for name, value in data.items():
        if field == name or (field.startswith(f"{name}.") and _stands_in(value, field[len(name) + 1 :])):
            return True
    return False
