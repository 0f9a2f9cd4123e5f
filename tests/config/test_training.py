"""The DeepSpeed JSON: which keys do something, which do nothing, which are refused, and the batch arithmetic."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest

from hpc_ds.config.training import ACCEPTED, REFUSED, TrainingConfig, load_training, resolve_batch_sizes
from hpc_ds.errors import ConfigError


def section(key: str, value: Any) -> dict[str, Any]:
    """``a.b`` and 1 -> ``{"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


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


BAD: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage 4: not one of the choices; use 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage '2': not one of the choices"),
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
    ({"steps_per_print": -1}, "steps_per_print -1: out of range"),
    ({"seed": "1"}, "seed '1': not a whole number"),
]


@pytest.mark.parametrize(("data", "complaint"), BAD, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(data, "ds.json")
    assert str(caught.value).startswith(f"ds.json: {complaint}")


# The values that DeepSpeed has by default.
NEUTRAL = {"gradient_predivide_factor": 1.0, "zero_optimization.zero_hpz_partition_size": 1}


@pytest.mark.parametrize("key", ACCEPTED)
def test_a_key_that_does_nothing_is_accepted_with_one_warning(key: str) -> None:
    config, warnings = load_training(section(key, 1), "ds.json")
    assert config == TrainingConfig()
    assert warnings == [f"ds.json: {key}: has no effect, because {ACCEPTED[key]}"]


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_would_change_results_is_refused_with_the_reason(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(section(key, {"device": "cpu"}), "ds.json")
    assert str(caught.value) == f"ds.json: {key}: refused, because {REFUSED[key]}"
    assert (caught.value.key, caught.value.file) == (key, "ds.json")


def test_refused_keys_that_are_switched_on_by_true_are_refused() -> None:
    passed_over = []
    for key in set(REFUSED) - set(NEUTRAL):
        with contextlib.suppress(ConfigError):
            load_training(section(key, value=True))
            passed_over.append(key)
    assert passed_over == []


@pytest.mark.parametrize(
    "value", [None, False, {}, {"enabled": False}, {"device": "none", "pin_memory": True}], ids=str
)
@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_that_is_switched_off_is_nothing(key: str, value: Any) -> None:
    assert load_training(section(key, value)) == (TrainingConfig(), [])


@pytest.mark.parametrize(("key", "value"), NEUTRAL.items())
def test_a_refused_key_with_its_neutral_value_is_nothing(key: str, value: float) -> None:
    assert load_training(section(key, value)) == (TrainingConfig(), [])


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


# Keys of DeepSpeed 0.19.8 with the value they have by default: none of them is unknown.
DEEPSPEED = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 4),
    "managed_gradient_accumulation": True,
    "gradient_allreduce_op": "mean",
    "seq_parallel_communication_data_type": "fp32",
    "log_level": "info",
    "vocabulary_size": None,
    "timers": {"throughput": {"enabled": True}},
    "optimizer": {"type": "AdamW", "legacy_fusion": False},
    "fp16.auto_cast": False,
    "fp16.fp16_master_weights_and_grads": False,
    "bf16.immediate_grad_update": False,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "checkpoint.load_universal": False,
    "checkpoint.use_node_local_storage": False,
    "checkpoint.parallel_write": {"pipeline_stage": False},
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.pipeline_loading_checkpoint": False,
    "zero_optimization.override_module_apply": True,
    "zero_optimization.log_trace_cache_warnings": False,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": False,
    "zero_optimization.cpu_offload_param": None,
    "zero_optimization.cpu_offload_use_pin_memory": None,
}


def test_no_key_of_deepspeed_is_unknown() -> None:
    unknown = []
    for key, value in DEEPSPEED.items():
        try:
            load_training(section(key, value))
        except ConfigError as error:
            unknown += [key] if "unknown key" in str(error) else []
    assert unknown == []


def test_a_key_is_on_one_list_only() -> None:
    known = set(TrainingConfig.model_fields) - {"zero_optimization", "checkpoint"}
    assert not set(ACCEPTED) & set(REFUSED)
    assert not known & {*ACCEPTED, *REFUSED}


def test_auto_means_the_default_wherever_it_stands() -> None:
    data = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-8}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "scheduler": "auto",
    }
    config, warnings = load_training(data)
    assert config.train_batch_size is None
    assert config.gradient_clipping == 1.0
    assert not config.bf16.enabled
    assert config.optimizer is not None
    assert config.optimizer.params == {"eps": 1e-8}
    assert config.scheduler is None
    assert warnings == []


@pytest.mark.parametrize("never", [math.inf, 0, None])
def test_printing_never_is_said_in_several_ways(never: float | None) -> None:
    assert load_training({"steps_per_print": never})[0].steps_per_print is None


def test_the_other_spelling_of_bf16_is_known() -> None:
    assert load_training({"bfloat16": {"enabled": True}})[0].bf16.enabled


def test_both_spellings_of_bf16_at_once_are_not_passed_over() -> None:
    with pytest.raises(ConfigError):
        load_training({"bf16": {"enabled": False}, "bfloat16": {"enabled": True}})


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


# (train, micro, accumulation), world size -> (train, micro, accumulation) as DeepSpeed infers them.
BATCHES: list[tuple[tuple[int | None, int | None, int | None], int, tuple[int, int, int]]] = [
    ((12, 2, 3), 2, (12, 2, 3)),
    ((12, 2, None), 2, (12, 2, 3)),
    ((12, None, 3), 2, (12, 2, 3)),
    ((None, 2, 3), 2, (12, 2, 3)),
    ((12, None, None), 2, (12, 6, 1)),
    ((None, 2, None), 2, (4, 2, 1)),
    ((1, None, None), 1, (1, 1, 1)),
]

CONTRADICTIONS: list[tuple[tuple[int | None, int | None, int | None], int, tuple[int, int, int, int]]] = [
    ((8, 3, 2), 1, (8, 3, 2, 6)),
    ((8, 3, 2), 4, (8, 3, 2, 24)),
    ((7, None, None), 2, (7, 3, 1, 6)),
    ((7, 2, None), 1, (7, 2, 3, 6)),
    ((2, 4, None), 1, (2, 4, 1, 4)),
    ((1, None, None), 4, (1, 1, 1, 4)),
    ((12, None, 5), 2, (12, 1, 5, 10)),
]


def batch_config(sizes: tuple[int | None, int | None, int | None]) -> TrainingConfig:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return load_training({key: size for key, size in zip(keys, sizes, strict=True) if size is not None})[0]


@pytest.mark.parametrize(("given", "world", "expected"), BATCHES, ids=str)
def test_the_third_batch_size_follows_from_two(
    given: tuple[int | None, int | None, int | None], world: int, expected: tuple[int, int, int]
) -> None:
    found = resolve_batch_sizes(batch_config(given), world)
    assert (found.train, found.micro, found.accumulation, found.world_size) == (*expected, world)


@pytest.mark.parametrize(("given", "world", "named"), CONTRADICTIONS, ids=str)
def test_contradicting_batch_sizes_are_named_all_four(
    given: tuple[int | None, int | None, int | None], world: int, named: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch_sizes(batch_config(given), world)
    train, micro, accumulation, product = named
    assert str(caught.value).startswith(
        f"train_batch_size {train}: not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
        f"{accumulation} x world size {world} = {product}; "
    )


@pytest.mark.parametrize("given", [(None, None, None), (None, None, 4)], ids=str)
def test_one_batch_size_at_least_is_needed(given: tuple[int | None, int | None, int | None]) -> None:
    with pytest.raises(ConfigError, match="train_batch_size, train_micro_batch_size_per_gpu: neither is given"):
        resolve_batch_sizes(batch_config(given), 2)
