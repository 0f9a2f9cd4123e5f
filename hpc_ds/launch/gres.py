"""GPUs of a Slurm allocation of which no variable tells: those that ``--gres`` has asked for.

Where nothing is said (Slurm 22.05):

    salloc --gres=gpu:4             its shell, which runs where salloc was called, has no variable of GPUs at all
    a heterogeneous job, --gres     only the first component has SLURM_GPUS_ON_NODE, and only in the batch script

There the scheduler is asked, which takes some 20 ms. Without an answer the environment stays as it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hpc_ds.errors import CommandError
from hpc_ds.launch.allocation import components_of
from hpc_ds.launch.hostfile import GPU_VARIABLES, is_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_ds.cluster.shell import Shell

_PER_NODE = "SLURM_GPUS_PER_NODE"
_FIELD = r"(?:^|\s){}=(\S*)"


def with_gpus(environ: Mapping[str, str], run: Shell | None = None) -> dict[str, str]:
    """The environment, and in it SLURM_GPUS_PER_NODE of each component that would else seem to have no GPUs."""
    told = dict(environ)
    missing = [
        ending for ending in _components(environ) if not any(environ.get(name + ending) for name in GPU_VARIABLES)
    ]
    if "SLURM_JOB_ID" not in environ or is_step(environ) or not missing:
        return told
    if missing == [""] and "SLURM_PROCID" in environ:  # a batch script or an interactive step has SLURM_GPUS_ON_NODE
        return told
    if run is None:
        from hpc_ds.cluster import shell

        run = shell.run
    try:
        answer = run(["scontrol", "show", "job", "-o", environ["SLURM_JOB_ID"]], timeout_s=15).stdout
    except CommandError:
        return told
    for line in answer.splitlines():
        offset = next(iter(_fields("HetJobOffset", line)), "")
        ending = f"_HET_GROUP_{offset}" if offset else ""
        if ending in missing and (gpus := count_gpus("".join(_fields("TresPerNode", line)[-1:]))):
            told[_PER_NODE + ending] = str(gpus)
    return told


def count_gpus(per_node: str) -> int:
    """The number in ``gres:gpu:2``, ``gres/gpu:a100:4,gres/nvme:1``, ``gres/gpu=2`` ..."""
    number = 0
    for part in per_node.replace("=", ":").split(","):
        words = re.sub(r"^gres[:/]", "", part).split(":")
        if words[0] == "gpu":
            number += int(words[-1]) if words[-1].isascii() and words[-1].isdigit() else 1
    return number


def _components(environ: Mapping[str, str]) -> list[str]:
    """What stands behind the names of the variables of each component."""
    number = components_of(environ)
    return [""] if number == 1 else [f"_HET_GROUP_{group}" for group in range(number)]


def _fields(name: str, line: str) -> list[str]:
    """All values of that name: between the first and the last are paths, in which a user may have written anything."""
    return re.findall(_FIELD.format(name), line)
