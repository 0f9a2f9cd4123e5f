"""Who am I: from an environment to a Rank. One table a launcher; nothing is guessed, what is half there is an error.

| launcher                          | rank                 | world size            | local rank                 | first looked at |
|-----------------------------------|----------------------|-----------------------|----------------------------|-----------------|
| torchrun, hpcds, deepspeed        | RANK                 | WORLD_SIZE            | LOCAL_RANK                 | 1               |
| a Slurm step (srun)               | SLURM_PROCID         | SLURM_STEP_NUM_TASKS  | SLURM_LOCALID              | 2               |
| Open MPI                          | OMPI_COMM_WORLD_RANK | OMPI_COMM_WORLD_SIZE  | OMPI_COMM_WORLD_LOCAL_RANK | 3               |
| PMI (MPICH, Intel MPI, Cray)      | PMI_RANK             | PMI_SIZE              | MPI_LOCALRANKID            | 4               |

The batch script of a Slurm job has SLURM_PROCID=0 too, but no SLURM_STEP_ID: it is not a step. Ranks can be
interleaved over nodes (``srun -m cyclic``), so the local rank is read and never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.errors import RankError

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
        source: the launcher that said so: ``env``, ``slurm``, ``openmpi``, ``pmi``, ``mpi4py`` or ``single``.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    source: str


@dataclass(frozen=True, slots=True)
class _Table:
    source: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_ENV = _Table("env", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM = _Table("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
_OPENMPI = _Table(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_PMI = _Table("pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def rank_from_environment(environ: Mapping[str, str]) -> Rank | None:
    """The rank that the launcher's variables describe; None where no launcher left any.

    Raises:
        RankError: variables are missing, malformed, or contradict each other; those seen are listed.
    """
    if any(environ.get(name) for name in (_ENV.rank, _ENV.world_size, _ENV.local_rank)):
        found = _read(_ENV, environ)
        _refuse_contradiction(found, environ)
        return found
    if in_slurm_step(environ):
        return _read(_SLURM, environ)
    for table in (_OPENMPI, _PMI):
        if environ.get(table.rank) or environ.get(table.world_size):
            return _read(table, environ)
    return None


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is a task that srun started."""
    return environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ


def _read(table: _Table, environ: Mapping[str, str]) -> Rank:
    # Only the device choice hangs on PMI's local rank, and plain MPICH does not set it.
    needed = [table.rank, table.world_size] + ([] if table is _PMI else [table.local_rank])
    missing = [name for name in needed if not environ.get(name)]
    seen = _seen(environ)
    if missing:
        raise RankError(
            f"{', '.join(missing)}: not set, while {_listed(seen)}; let one launcher set them all, or unset the rest",
            seen,
        )
    rank, world_size = _number(table.rank, environ), _number(table.world_size, environ)
    local_rank = _number(table.local_rank, environ) if environ.get(table.local_rank) else rank
    local = _number(table.local_world_size, environ) if environ.get(table.local_world_size) else None
    if rank >= world_size or world_size < 1 or local_rank >= (local or world_size):
        raise RankError(f"{table.rank} {rank}: does not fit {_listed(seen)}; check the launcher", seen)
    return Rank(rank, local_rank, world_size, local, table.source)


def _number(name: str, environ: Mapping[str, str]) -> int:
    text = environ[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        seen = _seen(environ)
        raise RankError(f"{name} {text!r}: not a whole number; seen: {_listed(seen)}", seen)
    return int(text)


def _refuse_contradiction(found: Rank, environ: Mapping[str, str]) -> None:
    """RANK exported in the shell before srun makes every task the same rank."""
    if not in_slurm_step(environ) or "TORCHELASTIC_RUN_ID" in environ:
        return
    step = _read(_SLURM, environ)
    if found.world_size == 1 < step.world_size:
        seen = _seen(environ)
        raise RankError(
            f"WORLD_SIZE 1: srun started {step.world_size} tasks, which would each be a world of its own; unset RANK, "
            "WORLD_SIZE and LOCAL_RANK before srun",
            seen,
        )
    if step.world_size == found.world_size > 1 and step.rank != found.rank:
        seen = _seen(environ)
        raise RankError(f"RANK {found.rank}: contradicts SLURM_PROCID {step.rank}; unset RANK before srun", seen)


_LOOKED_AT = (
    *(name for table in (_ENV, _SLURM, _OPENMPI, _PMI) for name in (table.rank, table.world_size, table.local_rank)),
    "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_NTASKS",
)  # fmt: skip


def _seen(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in _LOOKED_AT if name in environ}


def _listed(seen: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in seen.items()) or "nothing"
