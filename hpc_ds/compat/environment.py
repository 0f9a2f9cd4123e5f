"""What a process must have in its environment for ``import deepspeed`` and the command ``deepspeed`` to mean hpc_ds.

| variable                                       | what it says                                                             |
|------------------------------------------------|--------------------------------------------------------------------------|
| PYTHONPATH                                     | the package ``deepspeed`` and our ``sitecustomize`` first                |
| PATH                                           | the command ``deepspeed`` (and ``ds``) first                             |
| HPCDS_PYTHON                                   | the interpreter that this command runs with                              |
| RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE | who a rank is, where its launcher says so only in words of its own:      |
|                                                | accelerate and many scripts read these before ``init_distributed`` could |
|                                                | set them                                                                 |
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.errors import ConfigError, NodeListError, RankError

if TYPE_CHECKING:
    from collections.abc import Mapping

_HERE = Path(__file__).parent
_STARTUP = str(_HERE / "startup")
_FOLDERS = {"PYTHONPATH": (str(_HERE / "path"), _STARTUP), "PATH": (str(_HERE / "bin"),)}

_OF_THE_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def variables_of_the_name(environ: Mapping[str, str]) -> dict[str, str]:
    """What is to be set on top of an environment, for whatever is started in it.

    Raises:
        ConfigError: the folder of hpc_ds has a name that no path can hold.
    """
    before = {"PATH": os.defpath, **environ}
    found = {name: in_front(before.get(name, ""), *folders) for name, folders in _FOLDERS.items()}
    return {**found, "HPCDS_PYTHON": sys.executable}


def variables_of_the_startup(environ: Mapping[str, str]) -> dict[str, str]:
    """What lets our integrations see other libraries, and changes nothing else; nothing where no path can hold it."""
    return {} if os.pathsep in _STARTUP else {"PYTHONPATH": in_front(environ.get("PYTHONPATH", ""), _STARTUP)}


def variables_of_the_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Who this rank is, where it is not said in the words that scripts read; nothing where no launcher says it whole."""
    if all(environ.get(name) for name in _OF_THE_RANK):
        return {}
    from hpc_ds.runtime.descent import is_below_a_rank  # longer than all else here
    from hpc_ds.runtime.rank import rank_from_environment

    if is_below_a_rank(environ):
        return {}

    try:
        me = rank_from_environment(environ)
    except RankError:  # the program says so where it matters to it
        return {}
    if me is None or not me.placed:
        return {}
    said = {"RANK": me.rank, "LOCAL_RANK": me.local_rank, "WORLD_SIZE": me.world_size}
    beside = me.local_world_size or _tasks_of_this_node(environ)
    if beside is not None:
        said["LOCAL_WORLD_SIZE"] = beside
    return {name: str(number) for name, number in said.items() if not environ.get(name)}


def _tasks_of_this_node(environ: Mapping[str, str]) -> int | None:
    """Of a Slurm step; None where it is none, or the components of a heterogeneous job number their nodes anew."""
    from hpc_ds.launch.allocation import components_of, is_task
    from hpc_ds.launch.node_list import expand_counts

    node, counts = environ.get("SLURM_NODEID", ""), environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if components_of(environ) > 1 or not (is_task(environ) and node.isdecimal() and counts):
        return None
    try:
        return expand_counts(counts)[int(node)]
    except (NodeListError, IndexError):
        return None


def in_front(path: str, *folders: str) -> str:
    """A list of folders, such as PATH, with these first; those that are in it already move there.

    Raises:
        ConfigError: a folder cannot be in such a list.
    """
    for folder in folders:
        if os.pathsep in folder:
            raise ConfigError(
                f"folder {folder!r}: has a {os.pathsep!r}, so no path can hold it; install hpc_ds elsewhere"
            )
    others = [folder for folder in path.split(os.pathsep) if folder not in folders] if path else []
    return os.pathsep.join([*folders, *others])
