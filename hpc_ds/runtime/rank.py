"""Who am I: from an environment to a Rank. One table a launcher; nothing is guessed, what is half there is an error.

The first that is there counts:

| launcher                             | rank                 | world size           | local rank                 |
|--------------------------------------|----------------------|----------------------|----------------------------|
| torchrun, hpcds, deepspeed           | RANK                 | WORLD_SIZE           | LOCAL_RANK                 |
| a Slurm step (srun)                  | SLURM_PROCID         | SLURM_STEP_NUM_TASKS | SLURM_LOCALID              |
| Open MPI                             | OMPI_COMM_WORLD_RANK | OMPI_COMM_WORLD_SIZE | OMPI_COMM_WORLD_LOCAL_RANK |
| PMI (MPICH, Intel MPI, Cray, Flux)   | PMI_RANK             | PMI_SIZE             | one of ``_PMI.local_rank`` |
| MVAPICH2                             | MV2_COMM_WORLD_RANK  | MV2_COMM_WORLD_SIZE  | MV2_COMM_WORLD_LOCAL_RANK  |
| another sign of MPI (``mpi_sign``)   | mpi4py is asked      |                      | its shared-memory split    |
| none of these                        | one process alone    |                      |                            |

The batch script of a Slurm job has SLURM_PROCID=0 too, but no SLURM_STEP_ID: it is not a step. Nor is the shell that
``salloc`` opens as a step of its own. Ranks can be interleaved over nodes (``srun -m cyclic``), so the local rank is
read and never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.errors import RankError
from hpc_ds.launch.allocation import is_task

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Rank:
    """One process among all.

    Attributes:
        rank: index among all processes.
        local_rank: index on this node; picks the device.
        world_size: processes in all.
        local_world_size: processes on this node; None where the launcher does not say.
        source: who said so: ``env``, ``slurm``, ``openmpi``, ``pmi``, ``mvapich2``, ``mpi4py``, ``single``,
            ``child``, ``arguments`` or ``initialised``.
        placed: whether the launcher says which of its node's ranks this is; if not, ``local_rank`` is 0 until the ranks
            have met.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    source: str
    placed: bool = True


@dataclass(frozen=True, slots=True)
class _Table:
    """Where a launcher says it; of several names the first that is set."""

    source: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...] = ()


_ENV = _Table("env", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_SLURM = _Table("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",))
_OPENMPI = _Table(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_PMI = _Table(
    "pmi",
    "PMI_RANK",
    "PMI_SIZE",
    ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK", "FLUX_TASK_LOCAL_ID"),
    ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
)
_MVAPICH2 = _Table(
    "mvapich2",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    ("MV2_COMM_WORLD_LOCAL_RANK",),
    ("MV2_COMM_WORLD_LOCAL_SIZE",),
)
_MPI_TABLES = (_OPENMPI, _PMI, _MVAPICH2)
MPI_SOURCES = frozenset({*(table.source for table in _MPI_TABLES), "mpi4py"})
"""Of ``Rank.source``: MPI's starter, or MPI, has said it."""
_STARTERS = {"slurm": "srun", "openmpi": "mpirun", "pmi": "mpiexec", "mvapich2": "mpirun_rsh"}
# PMIx (prterun), Cray PALS, IBM's jsrun, Flux, ALPS (aprun): variables that say too little, but only MPI's starters set.
_MPI_SIGNS = ("PMIX_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK", "FLUX_TASK_RANK", "ALPS_APP_PE")
MPI_VARIABLES = (*(table.rank for table in _MPI_TABLES), *_MPI_SIGNS, "PMI_FD", "MPI_LOCALRANKID")
"""Any of them is a sign that MPI has started this process, or could serve it."""


def rank_from_environment(environ: Mapping[str, str]) -> Rank | None:
    """The rank that the launcher's variables describe; None where no launcher left any that say enough.

    Raises:
        RankError: variables are missing, malformed, or contradict each other; those seen are listed.
    """
    if any(environ.get(name) for name in (_ENV.rank, _ENV.world_size, "LOCAL_RANK")):
        found = _read(_ENV, environ)
        if not environ.get("TORCHELASTIC_RUN_ID"):  # its agents number the ranks anew
            _refuse_contradiction(found, environ)
        return found
    if in_slurm_step(environ):
        return _read(_SLURM, environ)
    for table in _MPI_TABLES:
        if environ.get(table.rank) or environ.get(table.world_size):
            return _read(table, environ)
    return None


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is a task that srun started."""
    return is_task(environ) and "SLURM_PROCID" in environ


def mpi_sign(environ: Mapping[str, str]) -> str:
    """The variable by which this is one process of MPI's, where no table fits; "" where there is none."""
    return next((name for name in _MPI_SIGNS if environ.get(name)), "")


def by_mpi(me: Rank, environ: Mapping[str, str]) -> bool:
    """Whether MPI can introduce the ranks to each other: it, or its starter, says who this one is.

    RANK and its like may have been set besides, for code that reads them before ``init_distributed``.
    """
    if me.source in MPI_SOURCES:
        return True
    starter = _of_mpi(environ) if me.source == "env" and not in_slurm_step(environ) else None
    return starter is not None and (starter.rank, starter.world_size) == (me.rank, me.world_size)


def local_rank_from_environment(environ: Mapping[str, str]) -> int | None:
    """The index on this node, whatever launcher says it; None where none does.

    Raises:
        RankError: it is not a number.
    """
    step = (_SLURM,) if in_slurm_step(environ) else ()
    for table in (_ENV, *step, *_MPI_TABLES):
        local = _first(table.local_rank, environ)
        if local is not None:
            return local
    return None


def refuse_alone(me: Rank, environ: Mapping[str, str]) -> None:
    """Refuse a world of one that nobody asked for: each of several processes would train by itself.

    Raises:
        RankError: the job has room for more, or MPI's starter says that there are more.
    """
    if me.world_size != 1 or me.source not in {"single", "mpi4py"}:
        return
    seen = _seen(environ)
    sign = mpi_sign(environ)
    if environ.get(sign, "0").strip() not in {"", "0"}:
        raise RankError(
            f"{sign} {environ[sign]}: MPI says that this process is the only one; mpi4py is of another MPI than the one "
            "that started it, or srun needs another --mpi (see srun --mpi=list)",
            seen,
        )
    name = next((name for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_JOB_NUM_NODES") if environ.get(name)), "")
    asked = environ.get(name, "").strip()
    if environ.get("SLURM_JOB_ID") and asked.isdigit() and int(asked) > 1:
        if me.source == "mpi4py":
            cause = (
                "MPI says that this process is the only one; srun needs another --mpi (see srun --mpi=list), or mpi4py is of "
                "another MPI"
            )
        else:
            cause = (
                "this process was not started by srun, so the world is 1; start it with srun or hpcds run (one process "
                "alone: srun --ntasks=1)"
            )
        raise RankError(f"{name} {asked}: {cause}", seen)


def _read(table: _Table, environ: Mapping[str, str]) -> Rank:
    local_rank = _first(table.local_rank, environ)
    # Only the device choice hangs on PMI's local rank, and some of its starters do not set it.
    asked = table.local_rank if local_rank is None and table is not _PMI else ()
    missing = [name for name in (table.rank, table.world_size, *asked) if not environ.get(name)]
    seen = _seen(environ)
    if missing:
        raise RankError(
            f"{', '.join(missing)}: not set, while {_listed(seen)}; let one launcher set them all, or unset the rest",
            seen,
        )
    rank, world_size = _number(table.rank, environ), _number(table.world_size, environ)
    local = _first(table.local_world_size, environ)
    if rank >= world_size or world_size < 1 or (local_rank or 0) >= (local or world_size):
        raise RankError(f"{table.rank} {rank}: does not fit {_listed(seen)}; check the launcher", seen)
    return Rank(rank, local_rank or 0, world_size, local, table.source, local_rank is not None)


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    return next((_number(name, environ) for name in names if environ.get(name)), None)


def _number(name: str, environ: Mapping[str, str]) -> int:
    text = environ[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        seen = _seen(environ)
        raise RankError(f"{name} {text!r}: not a whole number; seen: {_listed(seen)}", seen)
    return int(text)


def _refuse_contradiction(found: Rank, environ: Mapping[str, str]) -> None:
    """RANK exported in the shell before srun or mpirun makes every process the same rank."""
    below = _read(_SLURM, environ) if in_slurm_step(environ) else _of_mpi(environ)
    if below is None:
        return
    seen, starter = _seen(environ), _STARTERS[below.source]
    if found.world_size == 1 < below.world_size:
        raise RankError(
            f"WORLD_SIZE 1: {starter} started {below.world_size} tasks, which would each be a world of its own; unset RANK, "
            f"WORLD_SIZE and LOCAL_RANK before {starter}",
            seen,
        )
    if below.world_size == found.world_size > 1 and below.rank != found.rank:
        name = next(table.rank for table in (_SLURM, *_MPI_TABLES) if table.source == below.source)
        raise RankError(f"RANK {found.rank}: contradicts {name} {below.rank}; unset RANK before {starter}", seen)


def _of_mpi(environ: Mapping[str, str]) -> Rank | None:
    """What MPI's starter says, whatever others say."""
    return rank_from_environment(
        {name: environ[name] for table in _MPI_TABLES for name in _names(table) if name in environ}
    )


def _names(table: _Table) -> tuple[str, ...]:
    return (table.rank, table.world_size, *table.local_rank, *table.local_world_size)


LOOKED_AT = dict.fromkeys((
    *(name for table in (_ENV, _SLURM, *_MPI_TABLES) for name in (table.rank, table.world_size, *table.local_rank)),
    "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", *_MPI_SIGNS,
))  # fmt: skip
"""Variables by which a process can tell which rank it is, and where the ranks meet."""


def _seen(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in LOOKED_AT if name in environ}


def _listed(seen: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in seen.items()) or "nothing"
