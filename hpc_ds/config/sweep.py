"""The points of a sweep: ``key=1,2,3`` (all combinations) or a JSON list, and the job of each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.config.load import build_job, is_file, resolved, wants_text
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.config.job import JobConfig

Point = dict[str, Any]
"""Dotted key of the job -> value. ``args.--lr`` adds ``--lr VALUE`` to the arguments."""

LARGEST = 10_000
"""Runs in one sweep."""

# The tasks of an array share one script and one shape.
_SHARED = (
    "resources",
    "name",
    "site",
    "setup",
    "runtime",
    "workdir",
    "launcher",
    "restart.signal",
    "restart.lead",
    "script",
    "snapshot",
)


def read_points(texts: Sequence[str]) -> list[Point]:
    """The points of a sweep.

    Args:
        texts: each ``key=1,2,3``, ``key=[1, 2, 3]``, or the path of a JSON file: a list of ``{key: value}``.

    Raises:
        ConfigError: one is none of these, or asks for what the tasks of an array cannot have each for itself.
    """
    axes = [_axis(text) for text in texts]
    points: list[Point] = []
    for parts in itertools.product(*axes):
        point: Point = {}
        for part in parts:
            doubled = point.keys() & part.keys()
            if doubled:
                raise ConfigError(f"--sweep {min(doubled)!r}: given twice; keep one")
            point |= part
        points.append(point)
        if len(points) > LARGEST:
            raise ConfigError(f"--sweep: more than {LARGEST} runs; make it smaller")
    for key in {key for point in points for key in point}:
        shared = next((one for one in _SHARED if key == one or key.startswith(f"{one}.")), None)
        if shared is not None:
            raise ConfigError(
                f"--sweep {key!r}: the tasks of an array share their {shared}; submit a run for each", key=key
            )
    return points


def _axis(text: str) -> list[Point]:
    key, equals, words = text.partition("=")
    if not equals or is_file(Path(text)):
        return _from_file(text)
    if not key or not words:
        raise ConfigError(
            f"--sweep {text!r}: not KEY=VALUE,VALUE...; write for example args.--lr=1e-3,3e-3", value=text
        )
    if words.startswith("["):
        try:
            values = json.loads(words)
        except (ValueError, RecursionError):
            raise ConfigError(
                f"--sweep {text!r}: not a JSON list; mend it, or write VALUE,VALUE...", value=text
            ) from None
    else:
        values = [word if wants_text(key) or key.startswith("args.") else _value(word) for word in words.split(",")]
    if not values:
        raise ConfigError(f"--sweep {text!r}: an empty list; give at least one value", value=text)
    return [{key: value} for value in values]


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return word


def _from_file(text: str) -> list[Point]:
    try:
        points = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise ConfigError(
            f"--sweep {text!r}: neither KEY=VALUE,... nor a file with a JSON list: {said}", value=text
        ) from None
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) and point for point in points):
        raise ConfigError(f'sweep file {text!r}: not a list of points; write [{{"key": value}}, ...]', file=text)
    return points


def jobs_of(base: JobConfig, points: Sequence[Point], file: str) -> list[JobConfig]:
    """The job of each point: the base with other values.

    Raises:
        ConfigError: a point makes no job that could run; it is named.
    """
    data = resolved(base)
    jobs = []
    for number, point in enumerate(points, 1):
        args = [word for key, value in point.items() if key.startswith("args.") for word in (key[5:], _word(value))]
        overrides = [f"{key}={_text(key, value)}" for key, value in point.items() if not key.startswith("args.")]
        jobs.append(build_job(data, overrides, args, file=f"{file}, task {number}", base=Path.cwd()))
    return jobs


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _text(key: str, value: object) -> str:
    """A value as ``--set`` takes it."""
    return value if isinstance(value, str) and wants_text(key) else json.dumps(value)
