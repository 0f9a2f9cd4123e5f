"""The variables that a launcher hands to ranks on every host.

Of the same name the later one counts:

    what the launcher's own environment has by the names and prefixes below
    ``~/.deepspeed_env``, then ``./.deepspeed_env``; DS_ENV_FILE gives that file another name, or its path
    ``--env-file FILE``, in their order
    ``--env NAME=VALUE``, in their order

A line of a file is ``NAME=VALUE``: the value is all that follows, to the end of the line, with its quotes and blanks.
Blank lines and lines that begin with ``#`` are skipped; anything else is an error.

Ranks on this machine have the launcher's whole environment besides. What says who a rank is comes from the plan alone,
and which devices it sees is never taken from the launcher's machine to another.
"""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PREFIXES = (
    "NCCL", "RCCL", "UCX", "MV2", "MLFLOW", "PYTHON",
    "CUDA_", "FI_", "GLOO_", "HF_", "HSA_", "I_MPI_", "KMP_", "MIOPEN_", "MKL_", "OMPI_MCA_", "OMP_", "TORCH",
    "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
"""Variables that begin so go to every host."""

NAMES = (
    "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
    "HPCDS_RUN_DIR", "HPCDS_ATTEMPT", "HPCDS_DEADLINE",
)  # fmt: skip
"""Variables that go to every host by their whole name."""

_STAY = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID")  # of this machine, and of an enclosing torchrun
# What tells a rank who it is, in one launcher's words or another's.
_OF_THE_RANK = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "CROSS_RANK", "CROSS_SIZE",
)  # fmt: skip
_ELSEWHERE = {"MASTER_ADDR": "--master_addr", "MASTER_PORT": "--master_port"}

FILE_NAME = ".deepspeed_env"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def exported(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the launcher's environment goes to ranks on every host."""
    return {
        name: value
        for name, value in environ.items()
        if (name.startswith(PREFIXES) or name in NAMES) and name not in _STAY
    }


def with_folder(python_path: str | None, folder: str) -> str:
    """A PYTHONPATH with a folder in front."""
    return f"{folder}{os.pathsep}{python_path}" if python_path else folder


def with_the_name(python: str) -> list[str]:
    """The words in front of a program that is to find hpc_ds under the name ``deepspeed``."""
    return [python, "-m", "hpc_ds.compat"]


def chosen(
    environ: Mapping[str, str],
    files: Sequence[str] = (),
    pairs: Iterable[str] = (),
    passed_over: list[str] | None = None,
) -> dict[str, str]:
    """What a user has chosen for the ranks: the ``.deepspeed_env`` files, ``--env-file`` and ``--env``.

    Args:
        environ: of this process.
        files: of ``--env-file``.
        pairs: of ``--env``.
        passed_over: gets what a ``.deepspeed_env`` has of the launcher's own variables; None: that is refused. accelerate
            writes its whole environment there.

    Raises:
        ConfigError: a file that was named is missing or cannot be read, or something in it is not NAME=VALUE.
    """
    found: dict[str, str] = {}
    for path in _standing_files(environ):
        found |= parse(_read(path), path, passed_over)
    for path in files:
        found |= parse(_read(path), path)
    for pair in pairs:
        name, value = _pair(f"--env {pair!r}", pair)
        found[name] = value
    return found


def parse(text: str, source: str, passed_over: list[str] | None = None) -> dict[str, str]:
    """The variables of the text of a file; see ``chosen`` for what is passed over.

    Raises:
        ConfigError: a line is not one; it names file and line.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        own = line.partition("=")[0]
        if passed_over is not None and (own in _OF_THE_RANK or own in _ELSEWHERE):
            passed_over.append(f"{source}, line {number}: {own}")
        else:
            name, value = _pair(f"{source}, line {number}", line.removesuffix("\r"), source)
            found[name] = value
    return found


def masked(environ: Mapping[str, str]) -> dict[str, str]:
    """The same variables, without the values of those that look like secrets by their names."""
    return {name: "***" if _SECRET.search(name) else value for name, value in environ.items()}


def _standing_files(environ: Mapping[str, str]) -> list[str]:
    """The files that are read without being named, or by DS_ENV_FILE."""
    named = environ.get("DS_ENV_FILE")
    folders = [Path(environ["HOME"])] if environ.get("HOME") else []
    paths = dict.fromkeys(folder / (named or FILE_NAME) for folder in [*folders, Path.cwd()])
    there = [str(path) for path in paths if is_file(path)]
    if named and not there:
        where = "neither in the home folder nor in this one" if len(paths) > 1 else "no such file"
        raise ConfigError(f"DS_ENV_FILE {named!r}: {where}; correct it or unset it", key="DS_ENV_FILE", value=named)
    return there


def is_file(path: str | Path) -> bool:
    """Whether a file is there, as far as this process may see; a name that no file can have is none."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where it may not look


def _read(path: str) -> str:
    try:
        return os.fsdecode(Path(path).read_bytes().removeprefix(BOM_UTF8))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"environment file {path!r}: {problem}; name one that can be read", file=path) from None


def _pair(where: str, text: str, source: str | None = None) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        said = "" if source is None else f" {text.strip()!r}"
        raise ConfigError(f"{where}:{said} is not a variable; write NAME=VALUE", file=source, value=text)
    if "\0" in value:
        raise ConfigError(f"{where}: {name} holds a zero byte; no variable can", file=source, key=name)
    if name in _OF_THE_RANK:
        raise ConfigError(f"{where}: {name} is what the launcher tells each rank; remove it", file=source, key=name)
    if name in _ELSEWHERE:
        raise ConfigError(f"{where}: {name} is set by the launcher; use {_ELSEWHERE[name]}", file=source, key=name)
    return name, value
