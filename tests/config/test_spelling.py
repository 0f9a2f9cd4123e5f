"""Every way in which DeepSpeed lets a key be written: "auto", aliases, true, deprecated keys."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpc_ds.config.known_keys import ALIASES, DEPRECATED
from hpc_ds.config.sections import OffloadOptimizerConfig
from hpc_ds.config.training import load_training, read_training
from hpc_ds.errors import ConfigError


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


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_an_alias_is_its_key_and_both_are_an_error(alias: str, key: str) -> None:
    value: Any = {"enabled": False} if key == "bf16" else 1
    section, _, name = alias.rpartition(".")
    new = key.rpartition(".")[2]

    def data(*names: str) -> dict[str, Any]:
        inner = dict.fromkeys(names, value)
        return {section: inner} if section else inner

    assert load_training(data(name)) == load_training(data(new))
    with pytest.raises(ConfigError) as caught:
        load_training(data(name, new), "ds.json")
    assert str(caught.value) == f"ds.json: {key}, {alias}: two names of one key; keep {key}"


# Old keys under zero_optimization -> the same in new ones.
OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
    ({"cpu_offload": False}, {}),
    ({"cpu_offload": None}, {}),
    ({"cpu_offload_param": True}, {"offload_param": {"device": "cpu"}}),
    ({"cpu_offload_use_pin_memory": False}, {}),
    (
        {"cpu_offload": True, "cpu_offload_use_pin_memory": False},
        {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    ),
    (
        {"offload_param": {"device": "cpu"}, "cpu_offload_use_pin_memory": False},
        {"offload_param": {"device": "cpu", "pin_memory": False}},
    ),
    ({"stage3_gather_fp16_weights_on_model_save": True}, {"stage3_gather_16bit_weights_on_model_save": True}),
]


@pytest.mark.parametrize(("old", "new"), OLD, ids=str)
def test_deprecated_keys_mean_what_they_meant_and_are_warned_about(old: dict[str, Any], new: dict[str, Any]) -> None:
    config, warnings = load_training({"zero_optimization": {"stage": 3, **old}}, "ds.json")
    expected, expected_warnings = load_training({"zero_optimization": {"stage": 3, **new}}, "ds.json")
    assert config == expected
    deprecated = {f"zero_optimization.{key}" for key, value in old.items() if key in OLD_KEYS and value is not None}
    said = set(warnings) - set(expected_warnings)
    assert {line.split(": ")[1] for line in said} == deprecated
    assert all(": deprecated; use " in line for line in said)


OLD_KEYS = {key.rpartition(".")[2] for key in DEPRECATED}

BOTH = [
    ({"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}, "cpu_offload", "offload_optimizer"),
    ({"cpu_offload": False, "offload_optimizer": {}}, "cpu_offload", "offload_optimizer"),
    ({"cpu_offload_param": True, "offload_param": {"device": "none"}}, "cpu_offload_param", "offload_param"),
    (
        {"offload_param": {"pin_memory": True}, "cpu_offload_use_pin_memory": True},
        "cpu_offload_use_pin_memory",
        "offload_param.pin_memory",
    ),
    (
        {"stage3_gather_fp16_weights_on_model_save": True, "gather_16bit_weights_on_model_save": True},
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_gather_16bit_weights_on_model_save",
    ),
]


@pytest.mark.parametrize(("zero", "old", "new"), BOTH, ids=lambda value: str(value)[:40])
def test_old_and_new_at_once_are_an_error(zero: dict[str, Any], old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training({"zero_optimization": {"stage": 3, **zero}}, "ds.json")
    assert str(caught.value) == (
        f"ds.json: zero_optimization.{old}, zero_optimization.{new}: an old and a new name of one key; "
        f"keep zero_optimization.{new}"
    )


def test_a_deprecated_key_takes_true_and_false_only() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.cpu_offload 'yes': neither true nor false"):
        load_training({"zero_optimization": {"cpu_offload": "yes"}})


# Key, and a value that stands for another -> that other.
SAME: list[tuple[str, Any, Any]] = [
    ("zero_optimization.reduce_bucket_size", 5e8, 500_000_000),
    ("zero_optimization.offload_optimizer", None, OffloadOptimizerConfig()),
    ("gradient_accumulation_steps", 2.0, 2),
    ("fp16.initial_scale_power", 12.0, 12),
    ("data_types.grad_accum_dtype", "torch.bfloat16", "bf16"),
    ("data_types.buffer_dtype", "half", "fp16"),
    ("data_types.grad_accum_dtype", "Float32", "fp32"),
    ("communication_data_type", "FP16", "fp16"),
    ("torch_autocast.dtype", "bf16", "bfloat16"),
    ("torch_autocast.dtype", "torch.float16", "float16"),
    ("torch_autocast.dtype", None, "bfloat16"),
    ("gradient_allreduce_op", "SUM", "sum"),
    ("log_level", "INFO", "info"),
]


@pytest.mark.parametrize(("key", "value", "meant"), SAME, ids=str)
def test_a_value_may_be_written_in_several_ways(key: str, value: Any, meant: Any) -> None:
    data: Any = value
    for part in reversed(key.split(".")):
        data = {part: data}
    found: Any = load_training(data)[0]
    for part in key.split("."):
        found = getattr(found, part)
    assert found == meant
    assert type(found) is type(meant)


def test_it_is_known_where_a_value_comes_from() -> None:
    reading = read_training(
        {
            "train_batch_size": "auto",
            "bfloat16": {"enabled": True},
            "scheduler": "auto",
            "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
            "zero_optimization": {"stage": 1, "cpu_offload": True},
        }
    )
    sources = {
        "train_batch_size": "auto",
        "bf16.enabled": "file",
        "bf16.check_grad_overflow": "default",
        "scheduler": "auto",
        "scheduler.params": "auto",
        "optimizer.params.lr": "auto",
        "optimizer.params.momentum": "file",
        "zero_optimization.stage": "file",
        "zero_optimization.offload_optimizer.device": "deprecated spelling zero_optimization.cpu_offload",
        "zero_optimization.offload_optimizer.pin_memory": "default",
        "seed": "default",
    }
    assert {key: reading.source(key) for key in sources} == sources
    bare = read_training({"zero_optimization": True})
    assert bare.source("zero_optimization.stage") == "deprecated spelling zero_optimization"
