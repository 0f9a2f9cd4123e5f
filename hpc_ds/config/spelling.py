"""From the spellings that DeepSpeed takes to the one that our models know: aliases, "auto", ``true``, deprecated keys.

The data are never changed; what comes out remembers which keys were "auto" and which were written in an old way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.config.known_keys import ALIASES, DEPRECATED
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEEPEST = 20
_ZERO = "zero_optimization"
_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_PIN = "cpu_offload_use_pin_memory"
_OLD_GATHER, _GATHER = (
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_gather_16bit_weights_on_model_save",
)

# What trl writes with a dot at the top for a model that it only evaluates. DeepSpeed passes over it; it changes no result.
_DOTTED = ("reduce_bucket_size", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")


@dataclass(slots=True)
class Spelled:
    """A config in today's spelling.

    Attributes:
        data: what was given, without what was "auto".
        autos: dotted keys that were "auto".
        old: dotted key -> the old spelling that it was given in.
        warnings: one for each old spelling.
    """

    data: dict[str, Any]
    file: str
    autos: set[str] = field(default_factory=set)
    old: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def spelled(given: Mapping[str, Any], file: str) -> Spelled:
    """The config in the spelling of our models.

    Raises:
        ConfigError: one thing is said in two spellings, or the data are nested without end.
    """
    found = Spelled(_without_aliases(given, file), file)
    found.data = _without_auto(found, found.data)
    for key in (f"{_ZERO}.{name}" for name in _DOTTED):
        if found.data.pop(key, None) is not None:
            found.warnings.append(f"{file}: {key!r} at the top: has no effect; write it into the section {_ZERO}")
    # accelerate passes infinity for "never".
    if found.data.get("steps_per_print") in (math.inf, 0):
        found.data["steps_per_print"] = None
    zero = found.data.get(_ZERO)
    if isinstance(zero, bool):
        stage = int(zero)
        found.data[_ZERO] = {"stage": stage}
        found.old[f"{_ZERO}.stage"] = _ZERO
        found.warnings.append(f'{_ZERO} {str(zero).lower()}: read as stage {stage}; write {{"stage": {stage}}}')
    elif isinstance(zero, dict):
        _modernise(found, zero)
    return found


def look_up(data: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Whether there is such a dotted key, and its value."""
    holder: Any = data
    for part in key.split("."):
        if not isinstance(holder, dict) or part not in holder:
            return False, None
        holder = holder[part]
    return True, holder


def _without_aliases(given: Mapping[str, Any], file: str) -> dict[str, Any]:
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    for alias, key in ALIASES.items():
        section, _, name = alias.rpartition(".")
        holder, new = data.get(section) if section else data, key.rpartition(".")[2]
        if not isinstance(holder, dict) or name not in holder:
            continue
        if new in holder:
            raise ConfigError(f"{file}: {key}, {alias}: two names of one key; keep {key}", file=file, key=alias)
        holder[new] = holder.pop(name)
    return data


def _without_auto(found: Spelled, data: dict[str, Any], at: str = "", depth: int = 0) -> dict[str, Any]:
    """Without what is "auto": the default is meant (a Trainer that fills it in has done so by now)."""
    if depth > _DEEPEST:
        raise ConfigError(
            f"{found.file}: nested more than {_DEEPEST} sections deep; no key stands there", file=found.file
        )
    kept = {}
    for key, value in data.items():
        if value == "auto":
            found.autos.add(f"{at}{key}")
        else:
            kept[key] = _without_auto(found, value, f"{at}{key}.", depth + 1) if isinstance(value, dict) else value
    return kept


def _modernise(found: Spelled, zero: dict[str, Any]) -> None:
    """Replace the deprecated keys of ``zero``, a copy."""
    for old, new in _OFFLOADS.items():
        value = _take(found, zero, old)
        if value is not None:
            _replace(found, zero, old, new, {"device": "cpu" if value else "none"})
            found.old[f"{_ZERO}.{new}.device"] = f"{_ZERO}.{old}"
    pin = _take(found, zero, _PIN)
    if pin is not None:
        _pin_all(found, zero, pin)
    gather = _take(found, zero, _OLD_GATHER)
    if gather is not None:
        _replace(found, zero, _OLD_GATHER, _GATHER, gather)


def _pin_all(found: Spelled, zero: dict[str, Any], pin: bool) -> None:
    for new in _OFFLOADS.values():
        section = zero.get(new)
        if isinstance(section, dict):
            if "pin_memory" in section:
                raise _both(found.file, _PIN, f"{_ZERO}.{new}.pin_memory")
            section["pin_memory"] = pin
            found.old[f"{_ZERO}.{new}.pin_memory"] = f"{_ZERO}.{_PIN}"


def _replace(found: Spelled, zero: dict[str, Any], old: str, new: str, value: Any) -> None:
    if zero.get(new) is not None:
        raise _both(found.file, old, f"{_ZERO}.{new}")
    zero[new] = value


def _take(found: Spelled, zero: dict[str, Any], old: str) -> bool | None:
    """The value of a deprecated key, which is taken out and warned about."""
    value, key = zero.pop(old, None), f"{_ZERO}.{old}"
    if value is None or isinstance(value, bool):
        if value is not None:
            found.warnings.append(f"{found.file}: {key}: deprecated; use {DEPRECATED[key]}")
        return value
    raise ConfigError(
        f"{found.file}: {key} {value!r}: neither true nor false; give true or false without quotes",
        file=found.file,
        key=key,
        value=value,
    )


def _both(file: str, old: str, new: str) -> ConfigError:
    key = f"{_ZERO}.{old}"
    return ConfigError(f"{file}: {key}, {new}: an old and a new name of one key; keep {new}", file=file, key=key)
