"""JSON schemas of what users write, for editors: made from the models and the tables of known keys.

A key that is accepted without effect is in the schema, with the reason; a refused one is not, so an editor flags it.
Every value may be "auto".
"""

from __future__ import annotations

from typing import Any

from hpc_ds.config.job import JobConfig
from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED
from hpc_ds.config.site import SiteConfig
from hpc_ds.config.training import TrainingConfig, sections

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_AUTO = {"const": "auto"}


def job_schema() -> dict[str, Any]:
    """The schema of a job file. Keys that begin with ``//`` are comments."""
    schema = JobConfig.model_json_schema(by_alias=True)
    for section in (schema, *schema["$defs"].values()):
        section["patternProperties"] = {"^//": {}}
    schema["properties"]["$schema"] = {"type": "string"}
    return {"$schema": _DIALECT, **schema}


def site_schema() -> dict[str, Any]:
    """The schema of a site file."""
    return {"$schema": _DIALECT, **SiteConfig.model_json_schema(by_alias=True)}


def training_schema() -> dict[str, Any]:
    """The schema of a training config."""
    schema = TrainingConfig.model_json_schema(by_alias=True)
    homes = {at: _properties(schema, model.__name__) for at, model in sections()}
    for key, (_, reason) in ACCEPTED.items():
        section, name = _split(key)
        homes[section][name] = {"description": f"accepted without effect: {reason}"}
    for key, new in DEPRECATED.items():
        section, name = _split(key)
        homes[section][name] = {"type": ["boolean", "null"], "deprecated": True, "description": f"use {new}"}
    _widen(homes[""], "zero_optimization", {"type": "boolean"})
    _widen(homes["zero_optimization."], "stage", {"enum": ["0", "1", "2", "3"]})
    for section in ("offload_optimizer", "offload_param"):
        _widen(homes["zero_optimization."], section, {"type": "null"})
    for alias, key in ALIASES.items():
        section, name = _split(alias)
        homes[section][name] = dict(homes[section][_split(key)[1]])
    for properties in {id(home): home for home in homes.values()}.values():
        for name in properties:
            _widen(properties, name, _AUTO)
    return {"$schema": _DIALECT, **schema}


def _split(key: str) -> tuple[str, str]:
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}", name


def _properties(schema: dict[str, Any], model: str) -> dict[str, Any]:
    found: dict[str, Any] = (schema if schema["title"] == model else schema["$defs"][model])["properties"]
    return found


def _widen(properties: dict[str, Any], name: str, also: dict[str, Any]) -> None:
    """Let a property be something else as well; one without a type takes anything already."""
    given = dict(properties[name])
    around = {key: given.pop(key) for key in ("title", "description", "default", "deprecated") if key in given}
    if given:
        options = given["anyOf"] if set(given) == {"anyOf"} else [given]
        properties[name] = {**around, "anyOf": [*options, also]}
