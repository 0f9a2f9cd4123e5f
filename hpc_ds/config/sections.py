"""The sections of the training config: what each key means, its default, and the values it takes.

Every field here does something in the engine; keys that do nothing, or that are refused, stand in ``known_keys.py``.
Spelling and defaults are DeepSpeed's. Where DeepSpeed takes a whole number it takes ``5e8`` too, and so do we.

Source: https://www.deepspeed.ai/docs/config-json, and the defaults of release 0.19.8.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hpc_ds.config.model import Model


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stage(value: object) -> object:
    if isinstance(value, bool):  # which would pass for 0 or 1
        raise ValueError("not a ZeRO stage; use 0, 1, 2 or 3")  # noqa: TRY004 - pydantic wants this one
    return int(value) if isinstance(value, str) and value in {"0", "1", "2", "3"} else _whole(value)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _section(value: object) -> object:
    return {} if value is None else value


_TYPES = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}
_LONG_TYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def _type(value: object) -> object:
    if not isinstance(value, str):
        return value
    name = value.lower().removeprefix("torch.")
    return _TYPES.get(name, name)


def _long_type(value: object) -> object:
    if value is None:
        return "bfloat16"
    if not isinstance(value, str):
        return value
    name = value.lower().removeprefix("torch.")
    return _LONG_TYPES.get(name, name)


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Type = Annotated[Literal["fp16", "bf16", "fp32"], BeforeValidator(_type)]
LongType = Annotated[Literal["bfloat16", "float16"], BeforeValidator(_long_type)]
Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_stage)]
TagValidation = Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail"]
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]
ReduceOp = Annotated[Literal["mean", "sum"], BeforeValidator(_lower)]


class OptimizerConfig(Model):
    """``{"type": "AdamW", "params": {"lr": 1e-3}}``."""

    type: str = Field(
        description="`Adam`, `AdamW`, `Adagrad`, `SGD`, `Lamb`, `Lion`, `Muon`, or a name of `torch.optim`"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="the optimizer's arguments, `lr` above all")


class SchedulerConfig(Model):
    """``{"type": "WarmupDecayLR", "params": {"total_num_steps": 1000}}``."""

    type: str = Field(
        description="`WarmupLR`, `WarmupDecayLR`, `WarmupCosineLR`, `LRRangeTest`, `OneCycle`, or a name of "
        "`torch.optim.lr_scheduler`"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="the schedule's arguments; see below")


class Fp16Config(Model):
    """fp16 compute with loss scaling; ``loss_scale`` 0 is dynamic."""

    enabled: bool = Field(default=False, description="compute in fp16, with a loss scale")
    auto_cast: bool = Field(default=False, description="cast floating-point inputs of the model to fp16")
    loss_scale: NonNegative = Field(0.0, description="a fixed loss scale; 0: a dynamic one")
    initial_scale_power: Annotated[int, Field(ge=0, le=60), BeforeValidator(_whole)] = Field(
        16, description="the dynamic scale starts at 2 to this power"
    )
    loss_scale_window: Positive = Field(1000, description="good steps after which the dynamic scale doubles")
    hysteresis: Positive = Field(2, description="overflows until the dynamic scale is halved")
    consecutive_hysteresis: bool = Field(
        default=False,
        description="each good step refills the hysteresis, not only a doubling",
    )
    min_loss_scale: AboveZero = Field(1.0, description="the smallest dynamic scale; an overflow there ends the run")


class Bf16Config(Model):
    """bf16 compute; there is no loss scale."""

    enabled: bool = Field(default=False, description="compute in bf16")
    check_grad_overflow: bool = Field(default=True, description="skip a step whose gradients are not finite")


class AutocastConfig(Model):
    """``torch.autocast`` around forward, over fp32 parameters."""

    enabled: bool = Field(default=False, description="run forward under torch.autocast; parameters stay fp32")
    dtype: LongType = Field("bfloat16", description='"bfloat16" or "float16", the latter with a loss scale')


class DataTypesConfig(Model):
    """Types other than those that fp16 and bf16 imply."""

    grad_accum_dtype: Type | None = Field(None, description="of accumulated gradients; `null`: the compute type")
    param_dtype: Type | None = Field(None, description="must be what fp16 or bf16 says; only checked")
    buffer_dtype: Type | None = Field(None, description="of floating-point buffers; `null`: as they are")


class OffloadConfig(Model):
    """Where a part of the training state is kept between its uses."""

    device: Literal["none", "cpu"] = Field("none", description='"cpu" keeps it in host memory')
    pin_memory: bool = Field(default=True, description="page-locked host memory, where there is a GPU")


class OffloadOptimizerConfig(OffloadConfig):
    """Where masters and optimizer state are kept."""


class OffloadParamConfig(OffloadConfig):
    """Where parameter shards are kept, and with them their gradients and optimizer state."""


def _list(value: Any) -> Any:
    """One name for a list of one, as in DeepSpeed."""
    return [value] if isinstance(value, str) else value


_MIXTURES = [
    f"transformers.models.{kind}.modeling_{kind}.{name}SparseMoeBlock"
    for kind, name in (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
]


class LeafModuleConfig(Model):
    """Modules of which ranks may use different parts in a step at stage 3: mixtures of experts."""

    classes: Annotated[list[str], BeforeValidator(_list)] = Field(
        default_factory=lambda: list(_MIXTURES), description="stage 3: classes of such modules, by name"
    )
    names: Annotated[list[str], BeforeValidator(_list)] = Field(
        default_factory=list, description="stage 3: such modules by their names in the model"
    )
    name_suffixes: Annotated[list[str], BeforeValidator(_list)] = Field(
        default_factory=list, description="stage 3: such modules by the ends of their names"
    )


class ZeroConfig(Model):
    """What is sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""

    stage: Stage = Field(
        0, description="what is sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too"
    )
    reduce_bucket_size: Positive = Field(500_000_000, description="stages 0-2: elements in one collective on gradients")
    offload_optimizer: Annotated[OffloadOptimizerConfig, BeforeValidator(_section)] = Field(
        default_factory=OffloadOptimizerConfig
    )
    offload_param: Annotated[OffloadParamConfig, BeforeValidator(_section)] = Field(default_factory=OffloadParamConfig)
    leaf_module: LeafModuleConfig = Field(default_factory=LeafModuleConfig)
    blocks: list[str] | None = Field(
        None, description="ours: class names of the modules that are gathered as one; `null`: found by themselves"
    )

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in host memory."""
        return "cpu" in {self.offload_optimizer.device, self.offload_param.device}

    @property
    def pins(self) -> bool:
        """Whether what is kept in host memory shall be page-locked."""
        kept = (section for section in (self.offload_optimizer, self.offload_param) if section.device == "cpu")
        return any(section.pin_memory for section in kept)


class ActivationCheckpointingConfig(Model):
    """DeepSpeed's ``activation_checkpointing`` section, as far as it has a meaning here."""

    cpu_checkpointing: bool = Field(
        default=False,
        description="what activation checkpointing keeps is kept in host memory",
    )


class FlopsProfilerConfig(Model):
    """One step in detail: operations, time and parameters of each module."""

    enabled: bool = Field(default=False, description="profile one step")
    recompute_fwd_factor: NonNegative = Field(0.0, description="forwards repeated in backward, 1.0 for all of it")
    profile_step: Positive = Field(1, description="which step")
    module_depth: Annotated[int, Field(ge=-1), BeforeValidator(_whole)] = Field(
        -1, description="depth that is printed; -1: the deepest"
    )
    top_modules: Positive = Field(1, description="modules named at each depth")
    detailed: bool = Field(default=True, description="print every module too")
    output_file: str | None = Field(None, description="file it is written to; `null`: the log")


class FileMonitorConfig(Model):
    """A monitor that writes files."""

    enabled: bool = Field(default=False, description="write lr, loss scale and step times there")
    output_path: str = Field("", description="folder; empty: one where the script started")
    job_name: str = Field("DeepSpeedJobName", min_length=1, description="folder in it")


class WandbConfig(Model):
    """The Weights & Biases monitor."""

    enabled: bool = Field(default=False, description="write lr, loss scale and step times there")
    group: str | None = Field(None, description="group of the run")
    team: str | None = Field(None, description="who owns it")
    project: str = Field("deepspeed", description="project of the run")


class CompileConfig(Model):
    """``torch.compile``, block by block."""

    enabled: bool = Field(default=False, description="torch.compile each block")
    backend: str = Field("inductor", description="backend of torch.compile")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of torch.compile")


class CheckpointSection(Model):
    """DeepSpeed's ``checkpoint`` section, as far as it has a meaning here."""

    tag_validation: TagValidation = Field(
        "Warn", description='ranks that give different tags: "Ignore", "Warn" or "Fail"; the case does not matter'
    )
