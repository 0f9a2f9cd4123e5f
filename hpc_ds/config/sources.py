"""Where each value of a job comes from: the file, an option, or a default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_ds.config.load import resolved

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hpc_ds.config.job import JobConfig


def sources_of(
    job: JobConfig, data: Mapping[str, Any], file: str, options: Sequence[str], overrides: Sequence[str]
) -> dict[str, str]:
    """Dotted key -> ``default``, the file, ``option`` (of the command line), or ``--set``; values are not in it.

    Args:
        job: the checked job.
        data: what stood in its file.
        file: what to call that.
        options: of the command line, as ``key=value``.
        overrides: of ``--set``, which come last.
    """
    given = {text.partition("=")[0]: "option" for text in options}
    given |= {text.partition("=")[0]: "--set" for text in overrides}
    return {key: _source(key, given, data, file) for key in _keys(resolved(job))}


def _source(key: str, given: Mapping[str, str], data: Mapping[str, Any], file: str) -> str:
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        above = ".".join(parts[:end])
        if above in given:
            return given[above]
    below = next((source for one, source in given.items() if one.startswith(f"{key}.")), None)
    if below is not None:
        return below
    holder: Any = data
    for part in parts:
        if not isinstance(holder, dict) or part not in holder:
            return "default"
        holder = holder[part]
    return file


def _keys(data: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """The keys of a job: what is inside of a training config, of ``env`` or of ``sbatch`` is one value."""
    for key, value in data.items():
        if isinstance(value, dict) and value and f"{at}{key}" not in {"training", "env", "resources.sbatch"}:
            yield from _keys(value, f"{at}{key}.")
        else:
            yield f"{at}{key}"
