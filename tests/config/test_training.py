"""The DeepSpeed JSON: which keys do something, which do nothing, which are refused, and the batch arithmetic."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED, REFUSED
from hpc_ds.config.training import TrainingConfig, load_training, sections
from hpc_ds.errors import ConfigError


def section(key: str, value: Any) -> dict[str, Any]:
    """``a.b`` and 1 -> ``{"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    # These sections are not complete without a type.
    for name, kind in (("optimizer", "AdamW"), ("scheduler", "WarmupLR")):
        if isinstance(value.get(name), dict):
            value[name].setdefault("type", kind)
    return value


# What a config is that says nothing in this key's section.
def nothing(key: str) -> TrainingConfig:
    return load_training({"optimizer": {"type": "AdamW"}} if key.startswith("optimizer.") else {})[0]


# What stands under zero_optimization -> the stage.
STAGES: list[tuple[Any, int]] = [
    ({"stage": 0}, 0),
    ({"stage": 1}, 1),
    ({"stage": 2}, 2),
    ({"stage": 3}, 3),
    ({}, 0),
    ("auto", 0),
    ({"stage": "auto"}, 0),
    (True, 1),
    (False, 0),
    ({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8}, 2),
    ({"stage": "2"}, 2),
    ({"stage": 3.0}, 3),
]


@pytest.mark.parametrize(("given", "stage"), STAGES, ids=str)
def test_the_stage_is_found(given: Any, stage: int) -> None:
    assert load_training({"zero_optimization": given})[0].zero_optimization.stage == stage
    assert load_training({})[0].zero_optimization.stage == 0


@pytest.mark.parametrize("given", [True, False])
def test_a_bare_true_or_false_is_warned_about(given: bool) -> None:
    warnings = load_training({"zero_optimization": given})[1]
    assert warnings == [
        f'zero_optimization {str(given).lower()}: read as stage {int(given)}; write {{"stage": {int(given)}}}'
    ]


def test_what_trl_writes_at_the_top_is_passed_over_and_no_other_dotted_key() -> None:
    given = {"zero_optimization": {"stage": 3}, "zero_optimization.reduce_bucket_size": 64}
    config, warnings = load_training(given, "f")
    assert config == load_training({"zero_optimization": {"stage": 3}})[0]
    assert warnings == [
        "f: 'zero_optimization.reduce_bucket_size' at the top: has no effect; write it into the section zero_optimization"
    ]
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage: unknown key"):
        load_training({"zero_optimization.stage": 3})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage 4: not one of the choices; use 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": "4"}}, "zero_optimization.stage '4': not one of the choices"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage True: not a ZeRO stage; use 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": 1.5}}, "zero_optimization.stage 1.5: not one of the choices"),
    ({"zero_optimization": {"stage": -1}}, "zero_optimization.stage -1: not one of the choices"),
    ({"zero_optimization": 2}, "zero_optimization 2: not a section; give a section in { }"),
    ({"zero_optimization": None}, "zero_optimization None: not a section"),
    ({"zero_optimization": [1]}, "zero_optimization [1]: not a section"),
    ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag: unknown key; did you mean 'stage'?"),
    ({"gradient_cliping": 1}, "gradient_cliping: unknown key; did you mean 'gradient_clipping'?"),
    ({"fp16": {"enable": True}}, "fp16.enable: unknown key; did you mean 'enabled'?"),
    ({"fp16": True}, "fp16 True: not a section"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled 1: neither true nor false"),
    ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale -1: out of range"),
    ({"fp16": {"loss_scale": math.nan}}, "fp16.loss_scale nan: not a finite number"),
    ({"fp16": {"loss_scale": math.inf}}, "fp16.loss_scale inf: not a finite number"),
    ({"fp16": {"hysteresis": 0}}, "fp16.hysteresis 0: out of range"),
    ({"fp16": {"initial_scale_power": 16.5}}, "fp16.initial_scale_power 16.5: not a whole number"),
    ({"fp16": {"min_loss_scale": 0}}, "fp16.min_loss_scale 0: out of range; it must be greater than 0"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled, bf16.enabled: both are true"),
    ({"fp16": {"enabled": True}, "bfloat16": {"enabled": True}}, "fp16.enabled, bf16.enabled: both are true"),
    ({"gradient_clipping": -1}, "gradient_clipping -1: out of range"),
    ({"gradient_clipping": "1"}, "gradient_clipping '1': not a number"),
    ({"train_batch_size": 0}, "train_batch_size 0: out of range"),
    ({"train_batch_size": 8.5}, "train_batch_size 8.5: not a whole number"),
    ({"train_batch_size": True}, "train_batch_size True: not a whole number"),
    ({"train_micro_batch_size_per_gpu": -1}, "train_micro_batch_size_per_gpu -1: out of range"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0: out of range"),
    ({"communication_data_type": "int8"}, "communication_data_type 'int8': not one of the choices"),
    ({"optimizer": {"params": {}}}, "optimizer.type: missing; it has no default"),
    ({"optimizer": "AdamW"}, "optimizer 'AdamW': not a section"),
    ({"optimizer": {"type": "AdamW", "lr": 1}}, "optimizer.lr: unknown key; known: legacy_fusion, params, type"),
    ({"scheduler": {"params": {}}}, "scheduler.type: missing"),
    ({"checkpoint": {"tag_validation": "Maybe"}}, "checkpoint.tag_validation 'Maybe': not one of the choices"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size 0: out of range"),
    (
        {"zero_optimization": {"reduce_bucket_size": 5.5}},
        "zero_optimization.reduce_bucket_size 5.5: not a whole number",
    ),
    ({"zero_optimization": {"blocks": "Block"}}, "zero_optimization.blocks 'Block': not a list"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.device 'nvme': refused, because NVMe offload is not supported; use \"cpu\"",
    ),
    (
        {"zero_optimization": {"offload_param": {"device": "nvme"}}},
        "zero_optimization.offload_param.device 'nvme': refused, because NVMe",
    ),
    (
        {"zero_optimization": {"offload_param": {"device": "disk"}}},
        "zero_optimization.offload_param.device 'disk': not one of the choices; use 'none' or 'cpu'",
    ),
    ({"zero_optimization": {"offload_param": "cpu"}}, "zero_optimization.offload_param 'cpu': not a section"),
    (
        {"zero_optimization": {"offload_param": {"devic": "cpu"}}},
        "zero_optimization.offload_param.devic: unknown key; did you mean 'device'?",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "zero_optimization.offload_optimizer.ratio: refused, because optimizer state is offloaded as a whole; use 1.0",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer.device 'cpu': ZeRO stage 0 cannot offload this; use stage 1, 2 or 3",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param.device 'cpu': ZeRO stage 2 cannot offload this; use stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"},
        "gradient_allreduce_op 'sum': not supported at ZeRO stage 3; use 'mean', or a lower stage",
    ),
    ({"gradient_allreduce_op": "max"}, "gradient_allreduce_op 'max': not one of the choices; use 'mean' or 'sum'"),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor 0: out of range"),
    (
        {"data_types": {"param_dtype": "bf16"}},
        "data_types.param_dtype 'bf16': parameters compute in 'fp32'; enable fp16",
    ),
    (
        {"data_types": {"param_dtype": "fp32"}, "bf16": {"enabled": True}},
        "data_types.param_dtype 'fp32': parameters compute in 'bf16'",
    ),
    ({"data_types": {"grad_accum_dtype": "int8"}}, "data_types.grad_accum_dtype 'int8': not one of the choices"),
    ({"torch_autocast": {"dtype": "fp32"}}, "torch_autocast.dtype 'fp32': not one of the choices"),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile: refused, because DeepCompile is not supported; use "),
    ({"log_level": "loud"}, "log_level 'loud': not one of the choices"),
    ({"flops_profiler": {"module_depth": -2}}, "flops_profiler.module_depth -2: out of range"),
    ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: unknown key; did you mean 'enabled'?"),
    (
        {"offload_optimizer": {"device": "cpu"}},
        "offload_optimizer: unknown key; did you mean 'zero_optimization.offload_",
    ),
    ({"stage": 2}, "stage: unknown key; did you mean 'zero_optimization.stage'?"),
    (
        {"optimizer": {"type": "OneBitAdam"}},
        "optimizer.type 'OneBitAdam': refused, because DeepSpeed itself has removed",
    ),
    ({"optimizer": {"type": "MuSGD"}}, "optimizer.type 'MuSGD': refused, because there is no muP optimizer"),
    (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm: refused, because it is no parameter of an optimizer; use gradient_clipping",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_step": 1}}},
        "scheduler.params.warmup_step: unknown to WarmupLR; did you mean 'warmup_type'?",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}},
        "scheduler.params.cycle_max_lr: missing; OneCycle needs it",
    ),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps: missing; WarmupDecayLR needs it"),
    ({"steps_per_print": -1}, "steps_per_print -1: out of range"),
    ({"seed": "1"}, "seed '1': not a whole number"),
]


@pytest.mark.parametrize(("data", "complaint"), BAD, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(data, "ds.json")
    assert str(caught.value).startswith(f"ds.json: {complaint}")


@pytest.mark.parametrize("key", ACCEPTED)
def test_a_key_that_does_nothing_is_accepted_with_one_warning(key: str) -> None:
    config, warnings = load_training(section(key, 1), "ds.json")
    assert config == nothing(key)
    assert warnings == [f"ds.json: {key}: has no effect, because {ACCEPTED[key].reason}"]


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_would_change_results_is_refused_with_the_reason(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(section(key, {"device": "cpu", "enabled": True}), "ds.json")
    assert str(caught.value) == f"ds.json: {key}: refused, because {REFUSED[key].reason}"
    assert (caught.value.key, caught.value.file) == (key, "ds.json")


def test_refused_keys_that_are_switched_on_by_true_are_refused() -> None:
    passed_over = []
    for key in REFUSED.keys() - {"managed_gradient_accumulation"}:
        with contextlib.suppress(ConfigError):
            load_training(section(key, value=True))
            passed_over.append(key)
    assert passed_over == []


@pytest.mark.parametrize(
    "value", [None, False, {}, {"enabled": False}, {"device": "none", "pin_memory": True}], ids=str
)
@pytest.mark.parametrize("key", sorted(REFUSED.keys() - {"managed_gradient_accumulation"}))
def test_a_refused_key_that_is_switched_off_is_nothing(key: str, value: Any) -> None:
    assert load_training(section(key, value)) == (nothing(key), [])


def test_a_key_that_is_on_by_default_is_refused_where_it_is_switched_off() -> None:
    with pytest.raises(ConfigError, match="refused, because the engine counts micro-batches"):
        load_training({"managed_gradient_accumulation": False})


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_with_the_value_that_deepspeed_has_by_default_is_nothing(key: str) -> None:
    assert load_training(section(key, REFUSED[key].default)) == (nothing(key), [])


# A misspelt key -> the key that was meant, whichever list it is on.
MISSPELT = {
    "gradient_cliping": "gradient_clipping",
    "wall_clock_breakdwn": "wall_clock_breakdown",
    "tensorbord": "tensorboard",
    "zero_optimisation": "zero_optimization",
    "zero_optimization.overlap_com": "overlap_comm",
    "zero_optimization.offload_optimiser": "offload_optimizer",
}


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items())
def test_a_misspelt_key_is_refused_with_the_nearest_known_one(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"ds.json: {key}: unknown key; did you mean .*{meant}'"):
        load_training(section(key, 1), "ds.json")


def test_a_key_with_a_line_break_is_refused_on_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_training({"a\n\x1b[31mb": 1})
    assert str(caught.value).isprintable()


# Every key of DeepSpeed 0.19.8, from its source, with the value that it has by default.
DEEPSPEED: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
SUPPORTED = {f"{at}{name}" for at, model in sections() for name in model.model_fields}


@pytest.mark.parametrize("key", DEEPSPEED)
def test_no_key_of_deepspeed_is_unknown_nor_its_default_refused(key: str) -> None:
    load_training(section(key, DEEPSPEED[key]))


# Where ours is not DeepSpeed's default: it has none, or writes the same in another way.
OTHER_DEFAULTS = {
    "optimizer.type", "scheduler.type", "torch_autocast.dtype", "checkpoint.tag_validation", "zero_optimization.leaf_module",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(DEEPSPEED.keys() - OTHER_DEFAULTS))
def test_the_default_of_a_key_is_that_of_deepspeed(key: str) -> None:
    listed = {**ACCEPTED, **REFUSED}
    if key in listed:
        default = listed[key].default
        assert default in (DEEPSPEED[key], {}, {"enabled": False})
    elif key in SUPPORTED:
        expected = {**TrainingConfig().model_dump(), "optimizer": {"params": {}}, "scheduler": {"params": {}}}
        for part in key.split("."):
            expected = expected[part]
        if "offload_" not in key or DEEPSPEED[key] is not None:  # null there is our section of defaults
            assert expected == DEEPSPEED[key]
    else:
        assert key in {*ALIASES, *DEPRECATED} or key.partition(".")[0] in REFUSED


def test_a_key_is_on_one_list_only() -> None:
    lists = [SUPPORTED, set(ACCEPTED), set(REFUSED), set(ALIASES), set(DEPRECATED)]
    for number, some in enumerate(lists):
        for others in lists[number + 1 :]:
            assert not some & others


def test_aliases_lead_to_keys_that_exist() -> None:
    assert set(ALIASES.values()) <= SUPPORTED | set(ACCEPTED)


def test_the_given_data_are_left_as_they_were() -> None:
    data = {"zero_optimization": {"stage": 1, "overlap_comm": True}, "bfloat16": {"enabled": True}, "amp": None}
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    load_training(data)
    assert data == before


def test_defaults_are_those_of_deepspeed() -> None:
    config = load_training({})[0]
    assert config.gradient_clipping == 1.0
    assert (config.fp16.initial_scale_power, config.fp16.loss_scale_window, config.fp16.hysteresis) == (16, 1000, 2)
    assert (config.fp16.loss_scale, config.fp16.min_loss_scale) == (0, 1)
    assert config.bf16.check_grad_overflow
    assert config.steps_per_print is None
    assert config.checkpoint.tag_validation == "Warn"


@pytest.mark.parametrize("name", ["adam", "AdamW", "LAMB", "lion", "Muon", "sgd", "RMSprop", "Adafactor"])
def test_an_optimizer_that_is_known_is_taken_without_a_word(name: str) -> None:
    assert load_training({"optimizer": {"type": name}})[1] == []


def test_a_name_that_only_torch_may_know_is_warned_about() -> None:
    data = {"optimizer": {"type": "AdmaW"}, "scheduler": {"type": "StepLRR"}}
    assert load_training(data, "ds.json")[1] == [
        "ds.json: optimizer.type 'AdmaW': not known here; the engine looks for it in torch.optim: did you mean 'AdamW'?",
        (
            "ds.json: scheduler.type 'StepLRR': not known here; the engine looks for it in torch.optim.lr_scheduler: "
            "did you mean 'StepLR'?"
        ),
    ]


@pytest.mark.parametrize("params", ["auto", {"total_num_steps": "auto"}], ids=str)
def test_what_a_trainer_fills_in_later_is_not_missing(params: Any) -> None:
    assert load_training({"scheduler": {"type": "WarmupDecayLR", "params": params}})[1] == []


def test_a_torch_schedule_takes_any_parameters() -> None:
    assert load_training({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}})[1] == []


def test_offloading_is_taken_where_the_stage_allows_it() -> None:
    for stage in (1, 2, 3):
        load_training({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}})
    both = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}
    zero = load_training({"zero_optimization": {"stage": 3, **both}})[0].zero_optimization
    assert (zero.offload_param.device, zero.offload_optimizer.device) == ("cpu", "none")
    assert zero.offload_param.pin_memory


@pytest.mark.parametrize(
    ("data", "compute"), [({}, "fp32"), ({"bf16": {"enabled": True}}, "bf16"), ({"fp16": {"enabled": True}}, "fp16")]
)
def test_the_compute_type_may_be_said_twice(data: dict[str, Any], compute: str) -> None:
    config = load_training({**data, "data_types": {"param_dtype": compute}})[0]
    assert config.compute == compute


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({}, (False, False)),
        ({"offload_optimizer": {"device": "cpu"}}, (True, True)),
        ({"offload_optimizer": {"device": "cpu", "pin_memory": False}}, (True, False)),
        ({"offload_param": {"device": "cpu", "pin_memory": False}, "stage": 3}, (True, False)),
        ({"offload_param": {"device": "none", "pin_memory": True}}, (False, False)),
    ],
)
def test_only_what_is_offloaded_is_pinned(section: dict[str, Any], wanted: tuple[bool, bool]) -> None:
    zero = load_training({"train_batch_size": 1, "zero_optimization": {"stage": 1, **section}})[0].zero_optimization
    assert (zero.offloads, zero.pins) == wanted
