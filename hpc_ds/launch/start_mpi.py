"""Agents started by an MPI's launcher, one a rank.

The agent is the MPI process; its rank is a child that inherits MPI's variables and descriptors, and so may join MPI's
world. MPI's launcher carries where agents find us and the secret for it, nothing else, and keeps the order of the
ranks. It is not to bind them to cores, to count slots, or to know the working folder.

|                  | Open MPI                           | MPICH (hydra)           | Intel MPI (hydra)                           |
|------------------|------------------------------------|-------------------------|---------------------------------------------|
| hosts            | one line a rank, ``--map-by seq``: | ``host:ranks``          | as MPICH, its scheduler's word not counting |
|                  | else mpirun's own host comes first |                         |                                             |
| variables        | ``-x NAME``                        | ``-genvlist NAME,NAME`` | as MPICH                                    |
| cores            | ``--bind-to none``                 | none by itself          | ``I_MPI_PIN=0``                             |
| ``--ssh_port``   | ``plm_rsh_args``                   | HYDRA_LAUNCHER_...      | I_MPI_HYDRA_BOOTSTRAP_...                   |
| refused by a host| ends with an error                 | waits for ever          | as MPICH                                    |

Source: https://www-lb.open-mpi.org/doc/v4.1/man1/mpirun.1.php, https://github.com/pmodels/mpich/blob/main/doc/wiki/how_to/
Using_the_Hydra_Process_Manager.md, https://www.intel.com/content/www/us/en/docs/mpi-library/developer-reference-linux/
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.cluster import shell
from hpc_ds.errors import CommandError, LaunchError
from hpc_ds.launch.channel import LAUNCHER, TOKEN
from hpc_ds.launch.memory_file import memory_file
from hpc_ds.launch.program import Program, agent_command
from hpc_ds.launch.resources import is_this_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.launch.plan import LaunchPlan
    from hpc_ds.launch.reception import Reception

# Which devices this machine shows is no other host's business.
_OF_THIS_HOST = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_SYSTEM_FOLDERS = {Path("/usr/bin"), Path("/bin")}
# What ssh says below mpirun; hydra then waits for ever. Not Open MPI's "setpgid ... errno=Permission denied(13)", which is
# only a warning.
_REFUSED = re.compile(r"^ssh: |: Permission denied [(]|Host key verification failed|Too many authentication")


class Family(NamedTuple):
    """An MPI, and how its launcher is known.

    Attributes:
        name: as people call it.
        programs: names of its launcher, the first that is there and is its own is taken.
        signs: what its ``--version`` says, one of them.
    """

    name: str
    programs: tuple[str, ...]
    signs: tuple[str, ...]


# Intel's before MPICH's: it is one of MPICH's descendants.
FAMILIES = {
    "openmpi": Family(
        "Open MPI", ("mpirun", "mpiexec", "orterun", "mpirun.openmpi"), ("(Open MPI)", "(OpenRTE)", "PRRTE")
    ),
    "impi": Family("Intel MPI", ("mpiexec.hydra", "mpirun", "mpiexec"), ("Intel(R) MPI",)),
    "mpich": Family("MPICH", ("mpiexec", "mpirun", "mpiexec.hydra", "mpiexec.mpich"), ("HYDRA", "mpich")),
}


class OpenMpiStarter:
    """One mpirun of Open MPI."""

    per_rank = True

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        """Start it."""
        found = find_launcher("openmpi")
        # By its whole path, mpirun looks for itself in that folder on other hosts too.
        name = found.name if found.parent in _SYSTEM_FOLDERS else str(found)
        lines = "".join(f"{_known(_plain(host.name))}\n" * host.ranks for host in plan.hosts)
        with memory_file(lines) as hosts:
            command = open_mpi_command(plan, name, f"/dev/fd/{hosts}")
            program = Program(command, name, env=_environment(plan, reception), pass_fds=[hosts])
        program.alarm = _REFUSED
        program.cure = "see whether mpirun --map-by seq works for these hosts, one line a rank, without a question"
        yield program


def _known(name: str) -> str:
    """A host as Open MPI calls it: it knows the machine that it runs on only by its own name."""
    return os.uname().nodename if is_this_machine(name) else name


def open_mpi_command(plan: LaunchPlan, program: str, hostfile: str) -> list[str]:
    """The command line of Open MPI's mpirun."""
    command = [program, "-np", str(plan.world_size), "--hostfile", hostfile, "--map-by", "seq", "--oversubscribe"]
    if not {"--bind-to", "-bind-to"} & set(plan.launcher_args):
        command += ["--bind-to", "none"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    if plan.ssh_port is not None:
        command += ["--mca", "plm_rsh_args", f"-p {plan.ssh_port}"]
    for variable in _carried(plan):
        command += ["-x", variable]
    return [*command, "-wdir", "/", *plan.launcher_args, *agent_command()]


class MpichStarter:
    """One mpiexec of MPICH, or of another MPI that has hydra."""

    per_rank = True
    family = "mpich"

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        """Start it."""
        name = str(find_launcher(self.family))
        lines = "".join(f"{_plain(host.name, ':')}:{host.ranks}\n" for host in plan.hosts)
        with memory_file(lines) as hosts:
            command = hydra_command(plan, name, f"/dev/fd/{hosts}", self.options(plan))
            environ = {**_environment(plan, reception), **self.variables(plan)}
            program = Program(command, Path(name).name, env=environ, pass_fds=[hosts])
        program.alarm = _REFUSED
        program.cure = "see whether ssh works from here to these hosts without a question"
        yield program

    def options(self, plan: LaunchPlan) -> list[str]:  # noqa: ARG002 - Intel's look at it
        """What this hydra takes besides."""
        return []

    def variables(self, plan: LaunchPlan) -> dict[str, str]:
        """What this hydra reads from its environment."""
        return {} if plan.ssh_port is None else {"HYDRA_LAUNCHER_EXTRA_ARGS": f"-p {plan.ssh_port}"}


class IntelMpiStarter(MpichStarter):
    """One mpiexec.hydra of Intel MPI."""

    family = "impi"

    def options(self, plan: LaunchPlan) -> list[str]:
        """Ranks on any core, unless the user says otherwise."""
        return ["-genv", "I_MPI_PIN", plan.env.get("I_MPI_PIN", "0")]

    def variables(self, plan: LaunchPlan) -> dict[str, str]:
        """The plan says which rank is where, also inside a scheduler's job."""
        variables = {"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0"}
        if plan.ssh_port is not None:
            variables["I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS"] = f"-p {plan.ssh_port}"
        return variables


def hydra_command(plan: LaunchPlan, program: str, hostfile: str, options: list[str]) -> list[str]:
    """The command line of a hydra."""
    command = [program, "-f", hostfile, "-n", str(plan.world_size), "-wdir", "/"]
    return [*command, "-genvlist", ",".join(_carried(plan)), *options, *plan.launcher_args, *agent_command()]


def find_launcher(launcher: str) -> Path:
    """The program of an MPI's launcher: several MPIs may share the name ``mpirun``.

    Raises:
        LaunchError: there is none, or only another MPI's.
    """
    family = FAMILIES[launcher]
    others = []
    for name in family.programs:
        path = shutil.which(name)
        if path is None:
            continue
        owner = _owner(path)
        if owner == launcher:
            return Path(path)
        others.append(f"{name} is {FAMILIES[owner].name}'s" if owner else f"{name} does not say whose it is")
    if others:
        raise LaunchError(
            f"launcher {launcher!r}: {', '.join(others)}, and there is no {family.name} on PATH; put it there (module "
            "load), or choose another launcher"
        )
    raise LaunchError(
        f"launcher {launcher!r}: no {' or '.join(family.programs)} on PATH; install {family.name}, or choose another "
        "launcher"
    )


def _owner(path: str) -> str | None:
    """Which MPI a program belongs to."""
    try:
        done = shell.run([path, "--version"], timeout_s=15, check=False)
    except CommandError:
        return None
    said = done.stdout + done.stderr
    return next((owner for owner, family in FAMILIES.items() if any(sign in said for sign in family.signs)), None)


def _carried(plan: LaunchPlan) -> list[str]:
    """The variables that MPI's launcher takes to the agents; Python itself may need its libraries."""
    return [LAUNCHER, TOKEN, *(["LD_LIBRARY_PATH"] if "LD_LIBRARY_PATH" in plan.env else [])]


def _environment(plan: LaunchPlan, reception: Reception) -> dict[str, str]:
    """The environment of MPI's launcher itself, which ranks on this host inherit."""
    carried = dict(reception.variables)
    if "LD_LIBRARY_PATH" in plan.env:
        carried["LD_LIBRARY_PATH"] = plan.env["LD_LIBRARY_PATH"]
    others = {name: value for name, value in os.environ.items() if name not in {*_OF_THIS_HOST, *carried}}
    # In this order: with -genvlist, hydra (4.0) loses what comes last of its whole environment.
    return {**carried, **others}


def _plain(name: str, *also: str) -> str:
    """A host's name, if it means nothing else in a hostfile."""
    for wrong in ("#", *also):
        if wrong in name or name.startswith("-"):
            raise LaunchError(f"host {name!r}: means something else in this MPI's hostfile; use --launcher ssh")
    return name
