"""The one door to other programs: run one, wait, and get its words back."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hpc_ds.errors import CommandError, NoAnswerError, NoProgramError

if TYPE_CHECKING:
    from collections.abc import Mapping

# What an enclosing job, step or MPI launch left behind would steer the new one: an inherited SLURM_CPU_BIND pins
# its ranks, an inherited SLURM_NTASKS changes its size. SLURM_CONF says which cluster is meant and must stay.
_INHERITED = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "PMI_", "PMIX_", "OMPI_", "PALS_", "HPCDS_")
_KEPT = {"SLURM_CONF"}


@dataclass(frozen=True, slots=True)
class Completed:
    """What a program left: its exit status and its words."""

    returncode: int
    stdout: str
    stderr: str


class Shell(Protocol):
    """How the schedulers run programs; tests hand in another."""

    def __call__(self, command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
        """Run a program to its end; see ``run``."""


def run(command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
    """Run a program to its end, without a shell, input or inherited job variables.

    Raises:
        CommandError: it does not exist, did not end in ``timeout_s`` seconds, or (with ``check``) failed.
    """
    try:
        done = subprocess.run(  # noqa: PLW1510 - the exit status is looked at below
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            env=outside_jobs(os.environ),
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        message = f"{command[0]}: no such program on PATH; is this a machine of the cluster?"
        raise NoProgramError(command, None, "", message) from None
    except subprocess.TimeoutExpired:
        message = f"{command[0]}: no answer in {timeout_s:g} s; is the scheduler up?"
        raise NoAnswerError(command, None, "", message) from None
    except OSError as error:
        raise CommandError(command, None, str(error), f"{command[0]}: cannot be run: {error}; check it") from None
    if check and done.returncode != 0:
        raise CommandError(command, done.returncode, done.stderr or done.stdout)
    return Completed(done.returncode, done.stdout, done.stderr)


def outside_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of an enclosing job, step or MPI launch."""
    return {name: value for name, value in environ.items() if name in _KEPT or not name.startswith(_INHERITED)}
