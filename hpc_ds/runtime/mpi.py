"""The one door to mpi4py: MPI only introduces the ranks to each other; it carries no tensor.

The wheel of mpi4py has a module for each family of MPI and takes the one whose library the loader finds first. With two
installed that can be another than the one that started us, and then every process is alone: so it is told which.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

from hpc_ds.errors import RankError
from hpc_ds.runtime.rank import Rank

# What only the starters of a family set.
_FAMILIES = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK"),
    "mpich": ("PMI_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID"),
}


def who_am_i(expected: Rank | None) -> Rank:
    """Ask MPI who this process is. Collective over all MPI processes.

    Args:
        expected: what the launcher's variables say, with which MPI must agree; None where they say nothing.

    Raises:
        RankError: mpi4py is missing or finds no MPI, or MPI and the launcher do not know each other.
    """
    world = _world()
    if expected is not None and (world.size, world.rank) != (expected.world_size, expected.rank):
        raise RankError(
            f"MPI world size {world.size}: the launcher says {expected.world_size}; mpi4py is of another MPI than the one "
            "that started this, or srun needs another --mpi"
            if world.size != expected.world_size
            else f"MPI rank {world.rank}: the launcher says {expected.rank}; let one launcher start all processes"
        )
    local_rank, local_world_size = _on_this_node()
    source = "mpi4py" if expected is None else expected.source
    return Rank(world.rank, local_rank, world.size, local_world_size, source)


@cache
def _on_this_node() -> tuple[int, int]:
    """Index and number of the processes that share memory. Collective the first time."""
    node = _world().Split_type(_module().COMM_TYPE_SHARED)
    return node.rank, node.size


def tell_all(text: str | None) -> str:
    """What rank 0 says, on every rank. Collective over all MPI processes."""
    return str(_world().bcast(text, root=0))


def hosts() -> list[str]:
    """The host of every rank, as MPI calls it. Collective over all MPI processes."""
    return [str(name) for name in _world().allgather(_module().Get_processor_name())]


def is_loaded() -> bool:
    """Whether this process has MPI already, as a script that uses it itself does."""
    return "mpi4py.MPI" in sys.modules


def _world() -> Any:
    return _module().COMM_WORLD


def _module() -> Any:
    if not is_loaded() and not {"MPI4PY_MPIABI", "MPI4PY_LIBMPI"} & set(os.environ):
        for family, names in _FAMILIES.items():
            if any(name in os.environ for name in names):
                os.environ["MPI4PY_MPIABI"] = family
                break
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(
            f"mpi4py: cannot be used, while this is a process of MPI's: {_one_line(error)}; install it for the MPI that "
            "started this (pip install --no-binary mpi4py mpi4py), or start with hpcds run"
        ) from error
    return MPI


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def world() -> dict[str, object]:
    """What MPI says to a script that imports it: library, rank, world size. May end the process, if it does not fit srun.

    Raises:
        RankError: mpi4py finds no MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(f"mpi4py: cannot be used: {error}; install it and the MPI that this is launched by") from error
    library = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0 ")
    return {"library": library, "rank": MPI.COMM_WORLD.rank, "world_size": MPI.COMM_WORLD.size}
