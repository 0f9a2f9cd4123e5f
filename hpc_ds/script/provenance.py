"""Where a run comes from: who, where, with which code, versions and values. Names of variables, never their values.

The code is the commit, the changes since (``code.diff``), and the names of files that git does not know; or, with
``snapshot``, a copy of all files that git tracks, as they are now, from which the run then runs.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.shell import run as run_program
from hpc_ds.errors import CommandError, ConfigError
from hpc_ds.run_dir import read_object, write_atomic, write_json
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_ds.config.job import JobConfig

LONGEST_DIFF = 1_000_000
MOST_UNTRACKED = 1_000
LARGEST_SNAPSHOT = 2 * 1024**3
_GIT_TIMEOUT_S = 20.0
_LIBRARIES = ("torch", "numpy", "pydantic", "jinja2", "safetensors", "transformers", "deepspeed")


@dataclass(frozen=True, slots=True)
class Code:
    """The code of a job.

    Attributes:
        root: the top of its git checkout; None where it is in none.
        commit: None where there is none.
        diff: what tracked files have changed since, at most LONGEST_DIFF characters.
        cut: the diff was longer.
        untracked: files that git neither tracks nor ignores, at most MOST_UNTRACKED.
    """

    root: str | None = None
    commit: str | None = None
    diff: str = ""
    cut: bool = False
    untracked: list[str] = field(default_factory=list)


def code_in(folder: str) -> Code:
    """The code in a folder, as git knows it."""
    root = _git(folder, "rev-parse", "--show-toplevel")
    if not root:
        return Code()
    root = root.removesuffix("\n")
    said = (_git(root, "rev-parse", "--verify", "--quiet", "HEAD") or "").strip()
    commit = said if re.fullmatch(r"[0-9a-f]{40,64}", said) else None
    diff = (_git(root, "diff", "HEAD") if commit else "") or ""
    untracked = (_git(root, "ls-files", "-z", "--others", "--exclude-standard") or "").split("\0")[:-1]
    return Code(root, commit, diff[:LONGEST_DIFF], len(diff) > LONGEST_DIFF, untracked[:MOST_UNTRACKED])


def write_provenance(
    folder: Path, job: JobConfig, sources: Mapping[str, str], snapshot: Mapping[str, Any] | None
) -> None:
    """Write ``provenance.json``, and ``code.diff`` where the code has changed since its commit."""
    earlier = (snapshot or {}).get("again")
    code = _code_of_run(Path(earlier)) if earlier else code_in((snapshot or {}).get("of") or job.workdir or ".")
    data = {
        "user": _user(),
        "host": platform.node(),
        "submitted": time.time(),
        "workdir": job.workdir,
        "git_root": code.root,
        "git_commit": code.commit,
        "git_changed": bool(code.diff),
        "git_diff_cut": code.cut,
        "git_untracked": code.untracked,
        "snapshot": snapshot,
        "versions": {"hpc_ds": __version__, "python": platform.python_version(), **_versions()},
        "python": sys.executable,
        "environment": sorted({*job.env, *job.env_from}),
        "sources": dict(sources),
    }
    write_json(folder / "provenance.json", data)
    if code.diff:
        write_atomic(folder / "code.diff", code.diff, mode=0o600)


def _code_of_run(folder: Path) -> Code:
    """What a run, or a sweep, wrote of its code."""
    then, diff = read_object(folder / "provenance.json"), folder / "code.diff"
    text = diff.read_text(encoding="utf-8") if diff.is_file() else ""
    names = list(then.get("git_untracked", []))
    return Code(then.get("git_root"), then.get("git_commit"), text, bool(then.get("git_diff_cut")), names)


def earlier_snapshot(workdir: Path) -> Path | None:
    """The snapshot of a run that a folder is in."""
    for folder in (workdir, *workdir.parents):
        if folder.name == "code":
            kept = read_object(folder.parent / "provenance.json").get("snapshot") or {}
            if kept.get("folder") == str(folder):
                return folder
    return None


def take_snapshot(job: JobConfig, folder: Path) -> tuple[JobConfig, dict[str, Any]]:
    """Copy the files that git tracks, as they are now, and let the job run from the copy.

    Returns:
        The job with script and working folder in the copy, and what was copied.

    Raises:
        ConfigError: there is no git checkout, too much in it, or the script is not among the files.
    """
    workdir = job.workdir or str(Path.cwd())
    earlier = earlier_snapshot(Path(workdir))
    if earlier is not None:
        return _copy_snapshot(job, earlier, folder)
    root = (_git(workdir, "rev-parse", "--show-toplevel") or "").removesuffix("\n")
    names = (_git(root, "ls-files", "-z", "--recurse-submodules") or "").split("\0")[:-1] if root else []
    if not names:
        raise ConfigError(
            f"snapshot: {workdir!r} is in no git checkout with tracked files; make one, or leave snapshot out",
            key="snapshot",
        )
    top = Path(root)
    if any("\ufffd" in name for name in names):
        raise ConfigError("snapshot: a tracked file has a name that is no UTF-8 text; rename it", key="snapshot")
    kept = [name for name in names if os.path.lexists(top / name)]
    size = sum((top / name).lstat().st_size for name in kept)
    if size > LARGEST_SNAPSHOT:
        raise ConfigError(
            f"snapshot: the tracked files of {root!r} have {size / 1024**3:.1f} GiB, and at most "
            f"{LARGEST_SNAPSHOT / 1024**3:g} are copied; track less, or leave snapshot out",
            key="snapshot",
        )
    changes: dict[str, Any] = {"workdir": str(folder / Path(workdir).resolve().relative_to(top.resolve()))}
    if job.script is not None:
        script = _inside(job.script, top)
        if script not in kept:
            raise ConfigError(f"snapshot: script {job.script!r} is not tracked by git; `git add` it", key="snapshot")
        changes["script"] = str(folder / script)
    _copy(top, kept, folder)
    Path(changes["workdir"]).mkdir(parents=True, exist_ok=True)
    return job.model_copy(update=changes), {"of": root, "folder": str(folder), "files": len(kept), "bytes": size}


def _copy_snapshot(job: JobConfig, earlier: Path, folder: Path) -> tuple[JobConfig, dict[str, Any]]:
    """The snapshot of a run that is run again."""
    shutil.copytree(earlier, folder, symlinks=True)
    moved = {
        key: str(folder / inside)
        for key in ("workdir", "script")
        if getattr(job, key) is not None and (inside := _inside(getattr(job, key), earlier)) is not None
    }
    then = read_object(earlier.parent / "provenance.json")["snapshot"]
    return job.model_copy(update=moved), {**then, "folder": str(folder), "again": str(earlier.parent)}


def _inside(path: str, top: Path) -> str | None:
    try:
        return str(Path(path).resolve().relative_to(top.resolve()))
    except ValueError:
        return None


def _copy(top: Path, names: list[str], folder: Path) -> None:
    for name in names:
        source, target = top / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():  # a submodule that is not checked out
            target.mkdir(exist_ok=True)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _versions() -> dict[str, str]:
    """Of the libraries beside this program, which are the job's too unless it has a Python of its own."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that knows only numbers
        return str(os.getuid())


def _git(folder: str, *words: str) -> str | None:
    try:
        answer = run_program(["git", "-C", folder, *words], timeout_s=_GIT_TIMEOUT_S, check=False)
    except CommandError:
        return None
    return answer.stdout if answer.returncode == 0 else None
