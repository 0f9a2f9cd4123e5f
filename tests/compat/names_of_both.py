"""What a script sees of the names of ``deepspeed``: run by the real package, and by ours under its name, with the same payload."""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any


def answer(payload: dict[str, Any]) -> dict[str, Any]:
    logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
    asked = {
        "values": values,
        "parameters": parameters,
        "hostfiles": hostfiles,
        "filters": filters,
        "configs": configs,
        "tuning": tuning,
        "texts": texts,
    }
    return {name: do(payload[name]) for name, do in asked.items()}


def values(names: list[str]) -> dict[str, Any]:
    """Constants."""
    found = {name: named(name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float | list | dict)}


def parameters(names: list[str]) -> dict[str, list[str] | None]:
    """The names of what functions and classes take, in their order; None for those that take any name."""
    return {name: parameters_of(named(name)) for name in names}


def parameters_of(value: Any) -> list[str] | None:
    try:
        taken = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(one.kind is one.VAR_KEYWORD for one in taken) else [one.name for one in taken]


def named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def outcome(do: Any, *args: Any) -> Any:
    try:
        return do(*args)
    except Exception:  # noqa: BLE001 - whatever the two raise
        return "refused"


def hostfiles(given: dict[str, Any]) -> list[Any]:
    from deepspeed.launcher.runner import fetch_hostfile

    path = Path(given["folder"]) / "hostfile"
    found = []
    for text in given["texts"]:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        pool = outcome(fetch_hostfile, str(path))
        found.append(list(map(list, pool.items())) if isinstance(pool, dict) else pool)
    return found


def filters(cases: list[Any]) -> list[Any]:
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, encode_world_info, parse_inclusion_exclusion

    found = []
    for pool, include, exclude in cases:
        left = outcome(parse_inclusion_exclusion, pool, include, exclude)
        found.append(list(map(list, left.items())) if isinstance(left, dict) else left)
    first = apply_num_nodes_and_gpus({"a": [0, 1], "b": [0, 1], "c": [0]}, 2, 1)
    return [*found, list(map(list, first.items())), encode_world_info({"a": [0, 1]})]


def configs(cases: list[Any]) -> list[Any]:
    import deepspeed

    found: list[Any] = []
    for config, attributes in cases:
        made = outcome(deepspeed.DeepSpeedConfig, config)
        found.append(made if made == "refused" else {name: plain(made, name) for name in attributes})
    return found


def plain(thing: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        thing = getattr(thing, name)
    return thing if isinstance(thing, bool | int | float | str | dict | None) else str(thing)


def tuning(command_lines: list[list[str]]) -> list[Any]:
    from deepspeed.runtime import lr_schedules

    found = []
    for words in command_lines:
        args = lr_schedules.add_tuning_arguments(argparse.ArgumentParser()).parse_args(words)
        config, problem = lr_schedules.get_config_from_args(args)
        rate = None if config is None else lr_schedules.get_lr_from_config(config)
        found.append([vars(args), config, problem, rate])
    return found


def texts(numbers: list[float]) -> list[str]:
    from deepspeed.profiling import flops_profiler
    from deepspeed.utils.timer import trim_mean

    makers = ("number", "flops", "macs", "params", "bytes", "duration")
    made = [getattr(flops_profiler, f"{maker}_to_string")(number) for maker in makers for number in numbers]
    return [*made, f"{trim_mean(numbers, 0.2):.6g}"]
