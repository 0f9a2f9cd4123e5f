"""The JSON schemas: an editor knows every key that is taken, flags those that are not, and takes "auto"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED, REFUSED
from hpc_ds.config.schema import job_schema, training_schema
from hpc_ds.config.training import sections

SCHEMA = training_schema()
DEEPSPEED = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
TAKEN = sorted(
    {*ACCEPTED, *ALIASES, *DEPRECATED, *(f"{at}{name}" for at, model in sections() for name in model.model_fields)}
)


def options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives that a schema allows, references followed."""
    found = []
    for option in schema.get("anyOf", [schema]):
        target = SCHEMA["$defs"][option["$ref"].rsplit("/", 1)[1]] if "$ref" in option else option
        found += options(target) if "anyOf" in target else [target]
    return found


def property_at(key: str) -> dict[str, Any] | None:
    holder, found = SCHEMA, None
    for part in key.split("."):
        if not holder or part not in holder.get("properties", {}):
            return None
        found = holder["properties"][part]
        holder = next((option for option in options(found) if "properties" in option), {})
    return found


@pytest.mark.parametrize("key", TAKEN)
def test_a_key_that_is_taken_is_known_and_may_be_auto(key: str) -> None:
    found = property_at(key)
    assert found is not None
    anything = not set(found) & {"anyOf", "type", "$ref", "enum", "const"}
    assert anything or {"const": "auto"} in options(found)


@pytest.mark.parametrize("key", sorted(REFUSED.keys() - {"optimizer.params.max_grad_norm"}))
def test_a_refused_key_is_flagged(key: str) -> None:
    assert property_at(key) is None
    assert SCHEMA["additionalProperties"] is False


def test_every_section_is_closed() -> None:
    sections_of_ours = [name for name, found in SCHEMA["$defs"].items() if "properties" in found]
    assert len(sections_of_ours) > 10
    assert [name for name in sections_of_ours if SCHEMA["$defs"][name].get("additionalProperties") is not False] == []


# Key -> a schema that its value may have, beside that of the model.
ALSO: dict[str, dict[str, Any]] = {
    "zero_optimization": {"type": "boolean"},
    "zero_optimization.stage": {"enum": ["0", "1", "2", "3"]},
    "zero_optimization.offload_optimizer": {"type": "null"},
    "zero_optimization.offload_param": {"type": "null"},
    "zero_optimization.cpu_offload": {"const": "auto"},
}


@pytest.mark.parametrize(("key", "schema"), ALSO.items())
def test_what_is_read_in_another_spelling_is_not_flagged(key: str, schema: dict[str, Any]) -> None:
    found = property_at(key)
    assert found is not None
    assert schema in options(found)


def test_why_a_key_does_nothing_and_that_it_is_old_is_said() -> None:
    bucket = property_at("zero_optimization.allgather_bucket_size")
    assert bucket == {"description": "accepted without effect: the engine gathers one bucket a block"}
    assert (property_at("zero_optimization.cpu_offload") or {})["deprecated"] is True


def test_a_job_file_has_a_schema_too() -> None:
    schema = job_schema()
    assert {"script", "resources", "training"} <= set(schema["properties"])
    assert "async" in schema["$defs"]["Checkpoint"]["properties"]
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
