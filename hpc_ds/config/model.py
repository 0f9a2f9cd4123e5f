"""The base of every model of this room, and how pydantic's complaints become one sentence of ours."""

from __future__ import annotations

import difflib
import json
import types
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails


class Model(BaseModel):
    """Strict, frozen, and closed: an unknown key, or text where a number belongs, is an error."""

    # defer_build: a start builds the validators that it uses, and no section's twice.
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, protected_namespaces=(), defer_build=True
    )


_WRONG_TYPE = {
    "int_type": ("not a whole number", "give a number without quotes or fraction"),
    "int_from_float": ("not a whole number", "give a number without fraction"),
    "float_type": ("not a number", "give a number without quotes"),
    "finite_number": ("not a finite number", "give an ordinary number"),
    "string_type": ("not text", "put it in quotes"),
    "bool_type": ("neither true nor false", "give true or false without quotes"),
    "list_type": ("not a list", "give a list in [ ]"),
    "dict_type": ("not a section", "give a section in { }"),
    "string_too_short": ("empty", "write a word"),
    "too_short": ("empty", "give at least one word"),
    "float_parsing": ("not a number", "give a number"),
    "model_type": ("not a section", "give a section in { }"),
    "model_attributes_type": ("not a section", "give a section in { }"),
}


def check(model: type[Model], data: Mapping[str, Any], file: str) -> Any:
    """Validate ``data`` as ``model``.

    Raises:
        ConfigError: naming file, key, value and what is allowed, for all that is wrong, in one sentence.
    """
    for key, value in data.items():
        _refuse_what_cannot_be_written(key, value, file)
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise _as_config_error(error, model, file) from None


def _refuse_what_cannot_be_written(key: str, value: object, file: str) -> None:
    """Half characters (lone surrogates) and endless nesting pass as values, and break the file they are written to."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(
            f"{file}: {key_in_words(key)}: {half!r} is half a character; write UTF-8 text", file=file
        ) from None
    except (RecursionError, ValueError):
        raise ConfigError(
            f"{file}: {key_in_words(key)}: nested too deeply, or an endless number; mend it", file=file
        ) from None


def nearest(word: str, known: Sequence[str]) -> str:
    """The cure for an unknown word: the known one that it resembles, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def _as_config_error(error: ValidationError, model: type[Model], file: str) -> ConfigError:
    details = error.errors(include_url=False)
    # A union reports one complaint for each of its members: the first at a place says enough.
    first_at: dict[str, ErrorDetails] = {}
    for detail in details:
        first_at.setdefault(_key_of(detail, model), detail)
    # Nor is a list taken for what else may stand there, where something in it is wrong.
    first_at = {key: detail for key, detail in first_at.items() if not any(at.startswith(f"{key}[") for at in first_at)}
    sentences = [_sentence(key, detail, model) for key, detail in first_at.items()]
    key, detail = next(iter(first_at.items()))
    return ConfigError(f"{file}: " + ", and ".join(sentences), file=file, key=key, value=detail.get("input"))


def _key_of(detail: ErrorDetails, model: type[Model]) -> str:
    """The dotted key of a complaint, without the tags pydantic adds for the members of a union."""
    parts: list[str] = []
    annotation: object = model
    for part in detail["loc"]:
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [f"[{part}]"]
            annotation = _inner(annotation, list)
        elif (fields := _fields(annotation)) is not None:
            if part in fields or detail["type"] in {"extra_forbidden", "missing"}:
                annotation = fields.get(part)
                parts.append(part)
        elif _is_mapping(annotation) and "[" not in part:
            annotation = _inner(annotation, dict)  # below a key of the user's own there are tags, or a model
            parts.append(part)
    return key_in_words(".".join(parts))


def key_in_words(key: str) -> str:
    """A key as it can stand in one line of a message."""
    return key if key.isprintable() else repr(key)


def _sentence(key: str, detail: ErrorDetails, model: type[Model]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        known = list(_fields_at(model, key.split(".")[:-1]) or ())
        return f"{key}: unknown key; {nearest(key.rsplit('.', 1)[-1], known)}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    if not key:
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    if kind in _WRONG_TYPE:
        wrong, cure = _WRONG_TYPE[kind]
        return f"{key} {value!r}: {wrong}; {cure}"
    if kind in {"literal_error", "enum"}:
        return f"{key} {value!r}: not one of the choices; use {detail['ctx']['expected']}"
    if kind == "value_error" and isinstance(value, dict):
        return f"{key}: {detail['ctx']['error']}"
    if kind == "value_error":
        return f"{key} {value!r}: {detail['ctx']['error']}"
    message = detail["msg"].removeprefix("Input should be ")
    return f"{key} {value!r}: out of range; it must be {message}"


def _fields(annotation: object) -> dict[str, object] | None:
    """JSON key -> annotation of the model in ``annotation`` (possibly one member of a union), or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
    if get_origin(annotation) in {Union, types.UnionType}:
        for member in get_args(annotation):
            found = _fields(member)
            if found is not None:
                return found
    return None


def section_of(annotation: object) -> type[Model] | None:
    """The model in an annotation: itself, or the one member of a union that is one."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    if get_origin(annotation) in {Union, types.UnionType}:
        for member in get_args(annotation):
            found = section_of(member)
            if found is not None:
                return found
    return None


def _members(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, types.UnionType} else (annotation,)


def _is_mapping(annotation: object) -> bool:
    return any(get_origin(member) is dict or member is dict for member in _members(annotation))


def _inner(annotation: object, kind: type) -> object:
    """What the values of the mapping, or list, in an annotation are; None where it does not say."""
    for member in _members(annotation):
        if get_origin(member) is kind:
            return get_args(member)[-1]
    return None


def _fields_at(model: type[Model], path: list[str]) -> dict[str, object] | None:
    annotation: object = model
    for part in path:
        name, bracket, _ = part.partition("[")
        fields = _fields(annotation)
        annotation = _inner(annotation, dict) if fields is None else fields.get(name)
        annotation = _inner(annotation, list) if bracket else annotation
    return _fields(annotation)
