"""Which process is the rank, and which ones it has only started.

What a rank starts (``subprocess.run([python, "eval.py"])``, loaders' workers, a launcher) inherits every variable that says who
the rank is. It must neither meet the other ranks in its place nor write its beats. So the process that becomes the rank says
so in the environment, HPCDS_RANK_PROCESS, with what it was told; for a process below it:

| what the process was told since                             | it is                                                     |
|-------------------------------------------------------------|-----------------------------------------------------------|
| nothing                                                     | alone: a world of one                                     |
| another RANK, port ...: by torchrun, mpirun, a script       | a rank of that world, and no part of the run              |
| by ``hpcds run``, which takes the run out of its ranks' environment | the same, on every host                           |

Who wrote it counts only as an ancestor that lives: srun starts the ranks of a new step with the same variables, from elsewhere.
Whatever runs as the same process after ``exec`` is the rank still. Loads no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.process import ancestors, start_time
from hpc_ds.runtime.rank import LOOKED_AT

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

RANK_PROCESS = "HPCDS_RANK_PROCESS"

_TELL = (*LOOKED_AT, "TORCHELASTIC_RUN_ID")
_TELL_NOBODY_APART = {"LOCAL_WORLD_SIZE"}  # accelerate sets it in a rank that has met the others
_OF_THE_RUN = ("HPCDS_RUN_DIR", "HPCDS_ATTEMPT", "HPCDS_DEADLINE", RANK_PROCESS)


def become_the_rank() -> None:
    """Say that this process is the rank, unless it is below one. Again: it was told more since."""
    if not is_below_a_rank(os.environ):
        told = {name: os.environ[name] for name in _TELL if name in os.environ}
        value = {"pid": os.getpid(), "started": start_time(os.getpid()), "told": told}
        os.environ[RANK_PROCESS] = json.dumps(value)


def is_below_a_rank(environ: Mapping[str, str]) -> bool:
    """Whether a rank has started this process, or one that did: then it is none of the run's."""
    return bool(_rank_above(environ))


def is_alone_below_a_rank(environ: Mapping[str, str]) -> bool:
    """Whether besides nobody has told it since that it is a rank of another world."""
    above = _rank_above(environ)
    names = set(_TELL) - _TELL_NOBODY_APART
    return bool(above) and all(environ.get(name) in {None, above["told"].get(name)} for name in names)


def told_to_the_rank(environ: Mapping[str, str]) -> list[str]:
    """The names of the variables here that say who a rank is."""
    return [name for name in _TELL if name in environ]


def run_of_this_process() -> Path | None:
    """The folder of the run that this process is a rank of; None outside of one, and below a rank."""
    return None if is_below_a_rank(os.environ) else run_around()


def run_around() -> Path | None:
    """The folder of the run in which this process is, as a rank of it or below one."""
    root = os.environ.get("HPCDS_RUN_DIR")
    return None if root is None else Path(root)


def leave_the_run(environ: MutableMapping[str, str]) -> None:
    """Take out of an environment that there is a run, and a rank above."""
    for name in _OF_THE_RUN:
        environ.pop(name, None)


def _rank_above(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the rank above this process has said of itself; nothing where there is none."""
    try:
        said = json.loads(environ.get(RANK_PROCESS, "{}"))
        pid, started, _ = said["pid"], said["started"], said["told"].items()
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
    return said if pid in ancestors() and start_time(pid) == started else {}
