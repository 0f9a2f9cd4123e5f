"""The one door to mpi4py: MPI only introduces the ranks to each other; it carries no tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.errors import RankError
from hpc_ds.runtime.rank import Rank

if TYPE_CHECKING:
    from collections.abc import Callable


def introduce(expected: Rank, publish: Callable[[], str]) -> tuple[Rank, str]:
    """Ask MPI who is who, and let rank 0 tell the others where it listens. Collective over all MPI processes.

    Args:
        expected: what the launcher's variables say; MPI must agree.
        publish: called on rank 0 only; returns ``host:port``.

    Returns:
        This process's rank, and what rank 0 published.

    Raises:
        RankError: mpi4py is missing or finds no MPI, or MPI and the launcher do not know each other.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(
            f"mpi4py: cannot be used under mpirun: {error}; install it and the MPI that mpirun is of"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != expected.world_size:
        raise RankError(
            f"MPI world size {world.size}: the launcher says {expected.world_size}; mpi4py was built for another MPI than "
            "the one that started this, or srun needs another --mpi"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    found = Rank(world.rank, node.rank, world.size, node.size, "mpi4py")
    address = world.bcast(publish() if world.rank == 0 else None, root=0)
    return found, str(address)


def world() -> dict[str, object]:
    """What MPI says of this process: library, rank and world size. May end the process where MPI and launcher do not fit.

    Raises:
        RankError: mpi4py finds no MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(f"mpi4py: cannot be used: {error}; install it and the MPI that this is launched by") from error
    library = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0 ")
    return {"library": library, "rank": MPI.COMM_WORLD.rank, "world_size": MPI.COMM_WORLD.size}
