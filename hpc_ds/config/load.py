"""From what a user wrote (file, site, overrides) to one frozen config, or an error that names file, key and value.

Relative paths in a job file are relative to that file; in overrides and options, to the current folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.config.job import JobConfig, Resources
from hpc_ds.config.model import check, nearest
from hpc_ds.config.site import Detect, SiteConfig
from hpc_ds.errors import ConfigError, SiteError
from hpc_ds.shipped import shipped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: no such file, not JSON (with line and column), not an object, or a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {str(path)!r}: no such file; check the path", file=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        raise ConfigError(f"{what} {str(path)!r}: cannot be read: {error}; check it", file=str(path)) from None
    return _parse(text, f"{what} {str(path)!r}", str(path))


def read_training_config(source: dict[str, Any] | str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """A training config in any of DeepSpeed's forms: a dict, a file, or URL-safe base64 of JSON.

    Returns:
        The data, and what to call them in messages.

    Raises:
        ConfigError: there is no such file and the text is no base64 of JSON, or the JSON is not usable.
    """
    if isinstance(source, dict):
        return source, "training config"
    path = Path(os.fspath(source))
    text = None if not isinstance(source, str) or is_file(path) else _from_base64(source)
    if text is None:
        return read_json(path, "training config"), str(source)
    return _parse(text, "training config in base64", "training config"), "training config in base64"


def _from_base64(text: str) -> str | None:
    """The text of a JSON object that base64 stands for, or None."""
    bare = text.strip().rstrip("=")
    try:
        decoded = base64.b64decode(bare + "=" * (-len(bare) % 4), altchars=b"-_", validate=True).decode()
    except ValueError:  # not base64, or not UTF-8
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse(text: str, name: str, file: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        wrong, cure = f"not JSON: {error.msg.lower()}", "mend it there"
        if text[error.pos :].startswith(("//", "/*", "#")):
            wrong, cure = "a comment, which JSON does not have", "take it out, hjson is not read"
        raise ConfigError(f"{name}, line {error.lineno}, column {error.colno}: {wrong}; {cure}", file=file) from None
    except KeyError as error:
        raise ConfigError(f"{name}: key {error.args[0]!r} is given twice; keep one", file=file) from None
    except (RecursionError, ValueError):  # a number of thousands of digits
        raise ConfigError(f"{name}: nested too deeply, or with an endless number; mend it", file=file) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: not a JSON object; write {{ ... }}", file=file)
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise KeyError(key)
        data[key] = value
    return data


def load_job_file(path: Path, overrides: Sequence[str] = (), args: Sequence[str] = ()) -> JobConfig:
    """The job in ``path``, with ``key=value`` overrides and further script arguments, every path made absolute.

    Raises:
        ConfigError: see ``build_job``.
    """
    return build_job(read_json(path, "job file"), overrides, args, file=str(path), base=path.resolve().parent)


def build_job(
    data: dict[str, Any], overrides: Sequence[str] = (), args: Sequence[str] = (), *, file: str, base: Path
) -> JobConfig:
    """A job from plain data; relative paths in ``data`` are relative to ``base``.

    Raises:
        ConfigError: something in it is not usable; file, key, value and what is allowed are named.
    """
    data = _absolute_paths(without_comments(data), base)
    for override in overrides:
        _apply(data, override)
    data = _absolute_paths({"workdir": str(base), **data}, Path.cwd())
    given = data.get("args") or []
    if args and isinstance(given, list):
        data["args"] = [*given, *args]
    job: JobConfig = check(JobConfig, data, file)
    if job.script is not None and not is_file(Path(job.script)):
        raise ConfigError(f"{file}: script {job.script!r}: no such file; check the path", file=file, key="script")
    if isinstance(job.training, str):
        job = job.model_copy(update={"training": read_json(Path(job.training), "training config")})
    if job.training is not None:
        check_training(job.training, job.resources, file)  # type: ignore[arg-type] # a path was read above
    return job


_FREE = {"env", "training"}  # their keys are not ours


def without_comments(data: Mapping[str, Any]) -> dict[str, Any]:
    """A job without its comments: keys that begin with ``//``, in it and in its sections, and ``$schema``."""
    return {
        key: without_comments(value) if isinstance(value, dict) and key not in _FREE else value
        for key, value in data.items()
        if not key.startswith("//") and key != "$schema"
    }


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name too long to exist is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_training(data: dict[str, Any], resources: Resources, file: str) -> list[str]:
    """Check a training config against the world it will run in; returns its warnings.

    Raises:
        ConfigError: an unknown key, a value out of range, or batch sizes that contradict each other.
    """
    from hpc_ds.config.training import load_training, resolve_batch_sizes  # the supervisor does without

    config, warnings = load_training(data, f"{file}: training")
    if config.train_batch_size is not None or config.train_micro_batch_size_per_gpu is not None:
        resolve_batch_sizes(config, resources.world_size, in_words(resources))
    return warnings


def in_words(resources: Resources) -> str:
    """Why a job has as many ranks as it has."""
    return f"resources: nodes {resources.nodes} x ranks on each {resources.ranks_per_node}"


def read_training_of_job(data: dict[str, Any], file: str) -> tuple[dict[str, Any], str, Resources]:
    """The training config of a job, what to call it, and what the job asks of the cluster.

    Raises:
        ConfigError: the data are no job, it has no training config, or that cannot be read.
    """
    job: JobConfig = check(JobConfig, _absolute_paths(without_comments(data), Path(file).resolve().parent), file)
    if job.training is None:
        raise ConfigError(f"{file}: training: missing; this job has no training config", file=file, key="training")
    if isinstance(job.training, dict):
        return job.training, f"{file}: training", job.resources
    return read_json(Path(job.training), "training config"), job.training, job.resources


def load_resolved(path: Path) -> JobConfig:
    """The job as ``hpcds submit`` wrote it into a run folder.

    Raises:
        ConfigError: the file is missing or was changed into something else.
    """
    job: JobConfig = check(JobConfig, read_json(path, "run config"), str(path))
    return job


def resolved(job: JobConfig) -> dict[str, Any]:
    """The job as plain data; ``load_resolved`` reads it back."""
    return job.model_dump(mode="json", by_alias=True)


def load_site(name: str) -> SiteConfig:
    """A site by its name, or by the path of its file.

    Raises:
        SiteError: no such site (the known ones are named), or its file is not usable.
    """
    files = site_files()
    looks_like_path = os.sep in name or name.endswith(".json")
    if name not in files and not looks_like_path:
        raise SiteError(f"site {name!r}: unknown; {nearest(name, sorted(files))}", key="site", value=name)
    path = Path(name) if looks_like_path else files[name]
    try:
        site: SiteConfig = check(SiteConfig, read_json(path, "site file"), str(path))
    except ConfigError as error:
        raise SiteError(str(error), file=error.file, key=error.key, value=error.value) from None
    return site


def site_files() -> dict[str, Path]:
    """Every known site and its file: those shipped, and those in ``~/.config/hpcds/sites``, which come first."""
    folders = [shipped("site_configs"), own_folder("sites")]
    return {path.stem: path for folder in folders if folder is not None for path in sorted(folder.glob("*.json"))}


def own_folder(name: str) -> Path | None:
    """The user's own ``sites`` or ``templates``, whether it is there or not; None for a user without a home."""
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".config" / "hpcds" / name
    return None


def clusters() -> dict[str, Detect]:
    """Site -> by what its cluster is known; the user's own first. A file that is not usable knows none."""
    found: dict[str, Detect] = {}
    of_us = shipped("site_configs")
    for name, path in sorted(site_files().items(), key=lambda item: (item[1].parent == of_us, item[0])):
        with contextlib.suppress(ConfigError):
            by = read_json(path, "site file").get("detect")
            if by is not None:
                found[name] = check(Detect, by, str(path)) if isinstance(by, dict) else Detect()
    return found


def _absolute_paths(data: Mapping[str, Any], base: Path) -> dict[str, Any]:
    data = dict(data)
    for key in ("script", "training", "workdir", "templates"):
        if isinstance(data.get(key), str):
            data[key] = _absolute(base, data[key], key)
    if isinstance(data.get("inputs"), list):
        paths = data["inputs"]
        data["inputs"] = [_absolute(base, path, "inputs") if isinstance(path, str) else path for path in paths]
    for section, key in (("checkpoint", "dir"), ("runtime", "path")):
        if isinstance(data.get(section), dict) and isinstance(data[section].get(key), str):
            data[section] = {**data[section], key: _absolute(base, data[section][key], f"{section}.{key}")}
    runtime = data.get("runtime")
    if isinstance(runtime, dict) and isinstance(runtime.get("image"), str) and _is_path(runtime["image"]):
        data["runtime"] = {**runtime, "image": _absolute(base, runtime["image"], "runtime.image")}
    return data


def _is_path(image: str) -> bool:
    """Whether an image is a file, and not a name that a registry or search path knows."""
    return image.startswith(("/", "./", "../", "~")) or image.endswith((".sif", ".sqsh", ".img", ".toml"))


def _absolute(base: Path, text: str, key: str) -> str:
    try:
        return str(base / Path(text).expanduser())
    except RuntimeError:
        raise ConfigError(f"{key} {text!r}: there is no such user's home; give the path", key=key, value=text) from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value``: JSON where the value is JSON and the key does not want text, else text."""
    key, equals, text = override.partition("=")
    if not equals or not key or "" in key.split("."):
        raise ConfigError(f"--set {override!r}: not KEY=VALUE; write for example resources.nodes=4", value=override)
    *sections, last = key.split(".")
    holder = data
    for section in sections:
        inner = holder.get(section)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section; check the key", key=key, value=text)
        holder[section] = holder = dict(inner)
    try:
        holder[last] = text if wants_text(key) else json.loads(text)
    except RecursionError:
        raise ConfigError(f"--set {key}: nested too deeply; give a value", key=key) from None
    except ValueError:  # not JSON: text
        holder[last] = text


_TEXT_KEYS = {
    "name", "script", "site", "launcher", "templates", "restart.signal", "checkpoint.dir", "runtime.kind", "runtime.path",
    "runtime.image", "runtime.python",
    *(f"resources.{key}" for key in ("mem", "time", "partition", "account", "qos", "constraint")),
}  # fmt: skip


def wants_text(key: str) -> bool:
    """Whether ``--set KEY=123`` means the text "123"."""
    return key in _TEXT_KEYS or key.startswith("env.")
