"""What a job asks for: the shape of ``job.json``.

Every key but ``script`` or ``command`` has a default. The table of keys stands in docs/job.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hpc_ds.config.model import Model
from hpc_ds.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_URL = re.compile(r"https?://[^\s/?#]+[^\s]*", re.ASCII)
_LONGEST_AUTO_LEAD_S, _SHORTEST_AUTO_LEAD_S, _AUTO_LEAD_SHARE = 180, 30, 0.1


def time_limit_s(text: str) -> int:
    """Seconds of a time limit as Slurm writes it.

    ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``. Source: the sbatch manual, ``--time``.

    Raises:
        ValueError: the text is none of these, or stands for no time at all.
    """
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", text)
    if not match:
        raise ValueError("not a time limit; use minutes, HH:MM:SS or D-HH:MM:SS")
    days, *fields = match.groups()
    numbers = [int(field) for field in fields if field is not None]
    # Without days the last of two fields is seconds; with days the first is hours.
    weights = [3600, 60, 1] if days is not None or len(numbers) == 3 else [60, 1]
    seconds = int(days or 0) * 86400 + sum(n * weight for n, weight in zip(numbers, weights, strict=False))
    if seconds <= 0:
        raise ValueError("no time at all; leave it out for the cluster's default")
    return seconds


def check_variable_names(names: Any) -> None:
    """Refuse what no shell takes as the name of a variable.

    Raises:
        ValueError: one is not a name.
    """
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is not a variable name; use letters, digits and _")


def check_option_names(names: Any) -> None:
    """Refuse what is not the name of an sbatch option.

    Raises:
        ValueError: one is not a name.
    """
    for name in names:
        if not _OPTION.fullmatch(name):
            raise ValueError(f'{name!r} is not an option name; write it without dashes, such as "mail-type"')


def is_run_name(text: str) -> bool:
    """Whether a run may have this name: it becomes part of file names and of Slurm's listings."""
    return _NAME.fullmatch(text) is not None


def _time_limit(text: str) -> str:
    time_limit_s(text)
    return text


def _one_line(text: str) -> str:
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("has a line break or control character; use plain text on one line")
    return text


def without_nul(words: list[str] | None) -> list[str] | None:
    """Refuse words that no program can be given.

    Raises:
        ValueError: one has a NUL character.
    """
    if any("\0" in word for word in words or ()):
        raise ValueError("has a NUL character; no program can be given one")
    return words


Line = Annotated[str, AfterValidator(_one_line)]
Positive = Annotated[int, Field(ge=1)]
Minutes = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Resources(Model):
    """What to ask the cluster for."""

    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    tasks_per_node: Positive | None = Field(None, description="ranks on a node; default: one per GPU, else 1")
    cpus_per_task: Positive | None = None
    mem: Line | None = Field(None, description="memory of a node, as sbatch --mem takes it")
    time: Annotated[str, AfterValidator(_time_limit)] | None = None
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    exclude: list[Line] = Field(default_factory=list, description="nodes not to use")
    sbatch: dict[str, Line | int | bool | None] = Field(
        default_factory=dict, description="any other sbatch option; true or null for one without a value"
    )

    @field_validator("sbatch")
    @classmethod
    def _option_names(cls, options: dict[str, Any]) -> dict[str, Any]:
        check_option_names(options)
        if options.get("array"):
            raise ValueError("array: its tasks would share one run folder; submit a run for each of them")
        return options

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.ranks_per_node


CONTAINERS = ("apptainer", "pyxis", "shifter", "edf")
_ENVIRONMENTS = ("venv", "conda")
# Ranks would not learn which run they belong to.
_CUT_OFF = ("-e", "--cleanenv", "-C", "--containall")


class Runtime(Model):
    """Which Python the job runs with, and in which container its ranks run."""

    kind: Literal["current", "venv", "conda", "apptainer", "pyxis", "shifter", "edf"] = "current"
    path: Line | None = Field(None, description="the environment's folder, for kinds venv and conda")
    image: Line | None = Field(
        None, description="the container's image; for kind edf its environment file, or its name"
    )
    options: list[Line] = Field(default_factory=list, description="further options of the container's runtime")
    binds: list[Line] = Field(
        default_factory=list, description="folders that ranks need in the container: PATH or PATH:WHERE"
    )
    python: Line = Field("python", description="the interpreter in the container, for a script")

    @property
    def in_container(self) -> bool:
        """Whether the ranks run in a container; the supervisor never does."""
        return self.kind in CONTAINERS

    @model_validator(mode="after")
    def _what_the_kind_needs(self) -> Runtime:
        for name, value, kinds in (("path", self.path, _ENVIRONMENTS), ("image", self.image, CONTAINERS)):
            if (self.kind in kinds) != (value is not None):
                raise ValueError(
                    f"{name} {value!r} does not fit kind {self.kind!r}; kinds {', '.join(kinds)} need one, no other has one"
                )
        if not self.in_container and (self.options or self.binds):
            raise ValueError(f"options, binds: of a container, which kind {self.kind!r} is not; leave them out")
        for bind in self.binds:
            if not bind.startswith("/") or any(char in bind for char in ",;$"):
                raise ValueError(f"binds {bind!r}: not PATH or PATH:WHERE; begin with / and use none of , ; $")
        cut_off = [option for option in self.options if self.kind == "apptainer" and option in _CUT_OFF]
        if cut_off:
            raise ValueError(
                f"options {cut_off[0]!r}: would hide from the ranks which run they belong to; leave it out"
            )
        return self


class Checkpoint(Model):
    """When and where the engine saves by itself."""

    dir: Line | None = Field(None, description="default: checkpoints/ in the run folder")
    every_steps: Positive | None = None
    every_minutes: Minutes | Literal["auto"] | None = Field(
        30.0, description='"auto": as often as loses the least time, from the cost of a save and the failures so far'
    )
    shortest_minutes: Minutes = Field(2.0, description='the least that "auto" chooses')
    longest_minutes: Minutes = Field(60.0, description='the most that "auto" chooses')
    keep: Positive | None = Field(3, description="how many to keep; null keeps all")
    keep_every: Positive | None = Field(None, description="besides, keep those whose step is a multiple of this")
    async_: bool = Field(
        default=True, alias="async", description="saves that the engine makes by itself are written behind the training"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Checkpoint:
        if self.shortest_minutes > self.longest_minutes:
            raise ValueError(
                f"checkpoint.shortest_minutes {self.shortest_minutes:g}: above longest_minutes {self.longest_minutes:g}; "
                "exchange them"
            )
        return self


class Restart(Model):
    """How the run ends an attempt, and how often it may start again."""

    signal: Literal["USR2", "USR1", "TERM", "INT", "HUP"] = "USR2"
    lead: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="seconds before the time limit at which ranks are told to save"
    )
    max_crashes: Annotated[int, Field(ge=0)] = 3
    max_hangs: Annotated[int, Field(ge=0)] = 3
    max_restarts: Annotated[int, Field(ge=0)] | None = None
    hang_minutes: Minutes | None = Field(
        30.0, description="without any progress for so long a run counts as hung; null: it is never looked at"
    )
    max_excluded_nodes: Annotated[int, Field(ge=0)] = Field(
        3, description="how many nodes that failed twice are no longer asked for"
    )


class Notify(Model):
    """Whom to tell when an attempt ends. A hook that fails, hangs or is missing never hurts the run."""

    command: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="program and arguments, run on the batch host; it reads the event as JSON from its input"
    )
    url: Line | None = Field(None, description="where the event is sent by POST, as JSON; http or https")

    @field_validator("command")
    @classmethod
    def _no_nul(cls, words: list[str] | None) -> list[str] | None:
        return without_nul(words)

    @field_validator("url")
    @classmethod
    def _web_address(cls, url: str | None) -> str | None:
        if url is not None and not _URL.fullmatch(url):
            raise ValueError("not a web address; write https://host/path without blanks")
        return url


class Preflight(Model):
    """How the nodes are looked at before the ranks start."""

    always: bool = Field(
        default=False,
        description="before each attempt; else before the first, after one that failed, and on nodes that are new to the run",
    )
    limit_minutes: Minutes = Field(5.0, description="after so long it counts as failed")
    slow: Literal["warn", "fail"] = Field(
        "fail", description="what a node is that is less than half as fast as the others: worth a warning, or unfit"
    )


class JobConfig(Model):
    """One job, as a user asks for it."""

    name: str = "run"
    script: Line | None = None
    args: list[str] = Field(default_factory=list)
    command: Annotated[list[str], Field(min_length=1)] | None = None
    compat: Literal["deepspeed"] | None = Field(
        None, description="what hpc_ds is also called: import deepspeed finds it"
    )
    workdir: Line | None = Field(None, description="where the ranks start; default: the job file's folder")
    site: Line = "auto"
    resources: Resources = Field(default_factory=Resources)
    training: Line | dict[str, Any] | None = Field(None, description="the DeepSpeed JSON, or its file")
    env: dict[str, str] = Field(default_factory=dict)
    env_from: list[str] = Field(default_factory=list, description="variables taken from the submitting shell")
    setup: list[str] = Field(default_factory=list, description="shell lines before the ranks start")
    runtime: Runtime = Field(default_factory=Runtime)
    templates: Line | None = Field(None, description="folder whose templates come before the shipped ones")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    restart: Restart = Field(default_factory=Restart)
    launcher: Literal["srun"] = "srun"
    steps: Positive | None = Field(None, description="how many steps the run takes in all; for the ETA only")
    parameters: Annotated[int, Field(ge=1, le=10**18)] | None = Field(
        None, description="trainable parameters of the model; for the memory in the plan only"
    )
    snapshot: bool = Field(default=False, description="run from a copy of the files that git tracks")
    notify: Notify = Field(default_factory=Notify)
    preflight: bool | Preflight = Field(
        default=False, description="look at the nodes before the ranks start, and go elsewhere where one is unfit"
    )
    inputs: list[Line] = Field(default_factory=list, description="files and folders that must be there at submit")

    @property
    def preflight_options(self) -> Preflight | None:
        """How the nodes are looked at; None where they are not."""
        if isinstance(self.preflight, Preflight):
            return self.preflight
        return Preflight() if self.preflight else None

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not is_run_name(name):
            raise ValueError(
                "not a run name; use letters, digits and . _ + @ -, at most 100, the first a letter or digit"
            )
        return name

    @field_validator("args", "command")
    @classmethod
    def _no_nul(cls, words: list[str] | None) -> list[str] | None:
        return without_nul(words)

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        _check_variables(env)
        if any("\0" in value for value in env.values()):
            raise ValueError("has a NUL character; no environment can hold one")
        return env

    @field_validator("env_from")
    @classmethod
    def _variable_names(cls, names: list[str]) -> list[str]:
        _check_variables(names)
        return names

    @model_validator(mode="after")
    def _one_program(self) -> JobConfig:
        if (self.script is None) == (self.command is None):
            given = "both" if self.script is not None else "neither"
            raise ValueError(f"script, command: {given} given; give one of them")
        return self


def _check_variables(names: Any) -> None:
    check_variable_names(names)
    for name in names:
        if name.startswith(("SLURM_", "HPCDS_")):
            raise ValueError(f"{name!r} is set by the launcher itself; leave it out")


def lead_s(job: JobConfig) -> int:
    """Seconds before the time limit at which ranks are told to save.

    ``auto`` is a tenth of the limit, at least 30 and at most 180; 60 where there is no limit.

    Raises:
        ConfigError: the job would be told to stop before it has begun.
    """
    limit = time_limit_s(job.resources.time) if job.resources.time is not None else None
    if job.restart.lead != "auto":
        lead = job.restart.lead
    elif limit is None:
        lead = 60
    else:
        lead = int(min(max(limit * _AUTO_LEAD_SHARE, _SHORTEST_AUTO_LEAD_S), _LONGEST_AUTO_LEAD_S))
    if limit is not None and limit <= lead:
        raise ConfigError(
            f"resources.time {job.resources.time!r}: not longer than restart.lead {lead} s, so the job would be told to "
            "stop at once; ask for more time",
            key="resources.time",
            value=job.resources.time,
        )
    return lead


def python_of(job: JobConfig) -> str:
    """The interpreter of the batch host: that of the ranks too, where these are in no container."""
    return sys.executable if job.runtime.path is None else str(Path(job.runtime.path) / "bin" / "python")
