"""The training config: DeepSpeed's JSON keys, spelling and defaults.

A key is a field of a model here or in ``sections.py`` (the engine does it), or stands in one of the two tables of
``known_keys.py`` (accepted without effect, or refused). Anything else is unknown and refused with the nearest known
key. docs/config.md is made from these (``table.py``).

Source: https://www.deepspeed.ai/docs/config-json, and the defaults of release 0.19.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from hpc_ds.config.batch import BatchSizes, resolve_batch_sizes
from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED, REFUSED, REFUSED_VALUES
from hpc_ds.config.known_names import (
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REQUIRED,
    SCHEDULE_EXTRAS,
    SCHEDULES,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULES,
)
from hpc_ds.config.model import Model, check, key_in_words, nearest, section_of
from hpc_ds.config.sections import (
    AboveZero,
    ActivationCheckpointingConfig,
    AutocastConfig,
    Bf16Config,
    CheckpointSection,
    CompileConfig,
    DataTypesConfig,
    FileMonitorConfig,
    FlopsProfilerConfig,
    Fp16Config,
    LogLevel,
    NonNegative,
    OptimizerConfig,
    Positive,
    ReduceOp,
    SchedulerConfig,
    Type,
    WandbConfig,
    Whole,
    ZeroConfig,
)
from hpc_ds.config.spelling import Spelled, look_up, spelled
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "ACCEPTED",
    "REFUSED",
    "BatchSizes",
    "Bf16Config",
    "Fp16Config",
    "OptimizerConfig",
    "Reading",
    "SchedulerConfig",
    "TrainingConfig",
    "ZeroConfig",
    "load_training",
    "read_training",
    "resolve_batch_sizes",
    "sections",
]


class TrainingConfig(Model):
    """One training config, checked."""

    train_batch_size: Positive | None = Field(None, description="samples in one step of the optimizer, over all ranks")
    train_micro_batch_size_per_gpu: Positive | None = Field(None, description="samples in one forward of one rank")
    gradient_accumulation_steps: Positive | None = Field(None, description="forwards and backwards in one step")
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None
    fp16: Fp16Config = Field(default_factory=Fp16Config)
    bf16: Bf16Config = Field(default_factory=Bf16Config)
    torch_autocast: AutocastConfig = Field(default_factory=AutocastConfig)
    gradient_clipping: NonNegative = Field(1.0, description="largest norm of all gradients together; 0: no clipping")
    prescale_gradients: bool = Field(default=False, description="divide gradients before they are summed, not after")
    gradient_predivide_factor: AboveZero = Field(
        1.0, description="divide gradients by it before the sum, and by the rest of the world size after"
    )
    gradient_allreduce_op: ReduceOp = Field(
        "mean", description='"mean" of the ranks\' gradients, or their "sum" (not at stage 3)'
    )
    communication_data_type: Type | None = Field(
        None, description="type in which gradients are reduced; `null`: that of the gradients"
    )
    data_types: DataTypesConfig = Field(default_factory=DataTypesConfig)
    zero_optimization: ZeroConfig = Field(
        default_factory=ZeroConfig, description="`true` is stage 1 and `false` stage 0, with a warning"
    )
    zero_allow_untested_optimizer: bool = Field(
        default=False, description="let an optimizer that we do not know update ranges of parameters, at stages 1 to 3"
    )
    activation_checkpointing: ActivationCheckpointingConfig = Field(default_factory=ActivationCheckpointingConfig)
    compile: CompileConfig = Field(default_factory=CompileConfig)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    dataloader_drop_last: bool = Field(default=False, description="leave out the last samples where they fill no batch")
    steps_per_print: Positive | None = Field(None, description="print progress every so many steps; `null` or 0: never")
    wall_clock_breakdown: bool = Field(default=False, description="time forward, backward and step")
    dump_state: bool = Field(default=False, description="print the effective config on rank 0")
    log_level: LogLevel | None = Field(None, description="level of our log; `null`: as the script set it")
    flops_profiler: FlopsProfilerConfig = Field(default_factory=FlopsProfilerConfig)
    tensorboard: FileMonitorConfig = Field(default_factory=FileMonitorConfig)
    csv_monitor: FileMonitorConfig = Field(default_factory=FileMonitorConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    seed: Whole = Field(0, description="ours: of the data order")

    @property
    def compute(self) -> str:
        """The type of forward and backward: ``fp16``, ``bf16``, or ``fp32`` where the module's own is meant."""
        if self.fp16.enabled:
            return "fp16"
        return "bf16" if self.bf16.enabled else "fp32"

    @model_validator(mode="after")
    def _one_precision(self) -> TrainingConfig:
        if self.fp16.enabled and self.bf16.enabled:
            raise ValueError("fp16.enabled, bf16.enabled: both are true; enable one of them")
        asked = self.data_types.param_dtype
        if asked not in {None, self.compute}:
            raise ValueError(
                f"data_types.param_dtype {asked!r}: parameters compute in {self.compute!r}; enable fp16 or bf16, or leave "
                "param_dtype out"
            )
        return self

    @model_validator(mode="after")
    def _stage_allows(self) -> TrainingConfig:
        zero = self.zero_optimization
        if zero.stage == 3 and self.gradient_allreduce_op == "sum":
            raise ValueError("gradient_allreduce_op 'sum': not supported at ZeRO stage 3; use 'mean', or a lower stage")
        for name, section, lowest in (
            ("offload_optimizer", zero.offload_optimizer, 1),
            ("offload_param", zero.offload_param, 3),
        ):
            if section.device != "none" and zero.stage < lowest:
                raise ValueError(
                    f"zero_optimization.{name}.device {section.device!r}: ZeRO stage {zero.stage} cannot offload this; "
                    f"use stage {lowest if lowest == 3 else '1, 2 or 3'}"
                )
        return self


@dataclass(frozen=True, slots=True)
class Reading:
    """A config, and how it was written.

    Attributes:
        config: the checked config.
        warnings: one for each key that was accepted and does nothing, or was written in an old way.
        spelled: the data in today's spelling, with what was "auto" and what was old.
    """

    config: TrainingConfig
    warnings: list[str]
    spelled: Spelled

    def source(self, key: str) -> str:
        """Where the value of a dotted key comes from: ``file``, ``auto``, ``default``, or an old spelling."""
        if key in self.spelled.old:
            return f"deprecated spelling {self.spelled.old[key]}"
        parts = key.split(".")
        if any(".".join(parts[: end + 1]) in self.spelled.autos for end in range(len(parts))):
            return "auto"
        return "file" if look_up(self.spelled.data, key)[0] else "default"


def load_training(data: dict[str, Any], file: str = "training config") -> tuple[TrainingConfig, list[str]]:
    """Check a DeepSpeed config.

    Returns:
        The config, and one warning for each key that was accepted and does nothing.

    Raises:
        ConfigError: an unknown or refused key, or a value out of range.
    """
    reading = read_training(data, file)
    return reading.config, reading.warnings


def read_training(data: Mapping[str, Any], file: str = "training config") -> Reading:
    """Check a DeepSpeed config, and remember how it was written.

    Raises:
        ConfigError: an unknown or refused key, or a value out of range.
    """
    found = spelled(data, file)
    _refuse_unknown(found.data, file)
    _refuse(found.data, file)
    kept, ignored = _without_accepted(found.data)
    config: TrainingConfig = check(TrainingConfig, kept, file)
    warnings = found.warnings + [f"{file}: {key}: has no effect, because {ACCEPTED[key].reason}" for key in ignored]
    return Reading(config, warnings + _check_names(config, found, file), found)


def sections() -> Iterator[tuple[str, type[Model]]]:
    """Every section: its dotted key with a dot behind it ("" for the top), and its model."""
    yield from _sections(TrainingConfig, "")


def _sections(model: type[Model], at: str) -> Iterator[tuple[str, type[Model]]]:
    yield at, model
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _sections(inner, f"{at}{name}.")


def _refuse_unknown(data: dict[str, Any], file: str) -> None:
    """Unknown keys, before the models see them: keys that are only listed can be meant as well."""
    listed = [key.rpartition(".") for key in (*ACCEPTED, *REFUSED, *ALIASES, *DEPRECATED)]
    for at, model in sections():
        section = at.removesuffix(".")
        holder = look_up(data, section)[1] if section else data
        known = {*model.model_fields, *(name for of, _, name in listed if of == section)}
        for name in holder if isinstance(holder, dict) else ():
            if name not in known:
                key = f"{at}{name}"
                raise ConfigError(f"{file}: {key_in_words(key)}: unknown key; {_cure(name, known)}", file=file, key=key)


def _cure(name: str, known: set[str]) -> str:
    """The key that was meant: in another section by this very name, else the nearest here."""
    elsewhere = [f"{at}{name}" for at, model in sections() if at and name in model.model_fields]
    return f"did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else nearest(name, list(known))


def _refuse(data: dict[str, Any], file: str) -> None:
    for key, (default, reason) in REFUSED.items():
        found, value = look_up(data, key)
        if found and not _asks_nothing(value, default):
            raise ConfigError(f"{file}: {key}: refused, because {reason}", file=file, key=key, value=value)
    for (key, word), reason in REFUSED_VALUES.items():
        if look_up(data, key)[1] == word:
            raise ConfigError(f"{file}: {key} {word!r}: refused, because {reason}", file=file, key=key, value=word)


def _asks_nothing(value: object, default: object) -> bool:
    if value is None or value == {} or (value is False and default is not True):
        return True
    if isinstance(value, dict):
        section = {**default, **value} if isinstance(default, dict) else value
        return section.get("enabled") is False or section.get("device") == "none"
    return isinstance(value, bool) == isinstance(default, bool) and value == default


def _without_accepted(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Without the keys that do nothing: those of ``ACCEPTED`` (named), and refused ones that are switched off."""
    ignored = [key for key in ACCEPTED if look_up(data, key)[0]]
    for key in (*ignored, *(key for key in REFUSED if look_up(data, key)[0])):
        data = _without(data, key.split("."))
    return data, ignored


def _without(data: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    if len(path) == 1:
        return {key: value for key, value in data.items() if key != path[0]}
    return {**data, path[0]: _without(data[path[0]], path[1:])}


def _check_names(config: TrainingConfig, found: Spelled, file: str) -> list[str]:
    """Warnings about names that only an installed torch may know.

    Raises:
        ConfigError: a name that we refuse, or a wrong parameter of one of our schedules.
    """
    warnings = []
    if config.optimizer is not None:
        name = config.optimizer.type
        if name.lower() in REFUSED_OPTIMIZERS:
            reason = REFUSED_OPTIMIZERS[name.lower()]
            raise ConfigError(
                f"{file}: optimizer.type {name!r}: refused, because {reason}",
                file=file,
                key="optimizer.type",
                value=name,
            )
        known = {*OPTIMIZERS, *TORCH_OPTIMIZERS}
        if name.lower() not in {word.lower() for word in known}:
            warnings.append(_unsure(file, "optimizer.type", name, "torch.optim", sorted(known)))
    if config.scheduler is not None:
        name, known = config.scheduler.type, {*SCHEDULES, *TORCH_SCHEDULES}
        if name in SCHEDULES:
            _check_schedule(config.scheduler, found, file)
        elif name not in known:
            warnings.append(_unsure(file, "scheduler.type", name, "torch.optim.lr_scheduler", sorted(known)))
    return warnings


def _unsure(file: str, key: str, name: str, where: str, known: list[str]) -> str:
    return f"{file}: {key} {name!r}: not known here; the engine looks for it in {where}: {nearest(name, known)}"


def _check_schedule(scheduler: SchedulerConfig, found: Spelled, file: str) -> None:
    known = SCHEDULES[scheduler.type]
    for name in scheduler.params:
        if name not in known and name not in SCHEDULE_EXTRAS:
            key = f"scheduler.params.{name}"
            raise ConfigError(
                f"{file}: {key_in_words(key)}: unknown to {scheduler.type}; {nearest(name, list(known))}",
                file=file,
                key=key,
            )
    for name, default in known.items():
        key = f"scheduler.params.{name}"
        if default is REQUIRED and name not in scheduler.params and not found.autos & {key, "scheduler.params"}:
            raise ConfigError(f"{file}: {key}: missing; {scheduler.type} needs it", file=file, key=key)
