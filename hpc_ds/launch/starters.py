"""The ways to start agents: here, by ssh, by pdsh, and, in modules of their own, by MPI's launchers and srun."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
from typing import TYPE_CHECKING

from hpc_ds.errors import LaunchError
from hpc_ds.launch.channel import NODE
from hpc_ds.launch.memory_file import memory_file
from hpc_ds.launch.program import Program, agent_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.launch.plan import LaunchPlan
    from hpc_ds.launch.reception import Reception, Starter


# Loaded only where they are asked for: a local launch starts in milliseconds.
_ELSEWHERE = {
    "openmpi": ("start_mpi", "OpenMpiStarter"),
    "mpich": ("start_mpi", "MpichStarter"),
    "impi": ("start_mpi", "IntelMpiStarter"),
    "slurm": ("start_slurm", "SlurmStarter"),
}


def starter_for(plan: LaunchPlan) -> Starter:
    """The starter that a plan names.

    Raises:
        LaunchError: there is none of that name.
    """
    if plan.launcher in _ELSEWHERE:
        module, name = _ELSEWHERE[plan.launcher]
        starter: type[Starter] = getattr(importlib.import_module(f"hpc_ds.launch.{module}"), name)
        return starter()
    starters: dict[str, type[Starter]] = {"local": LocalStarter, "ssh": SshStarter, "pdsh": PdshStarter}
    if plan.launcher not in starters:
        raise LaunchError(f"launcher {plan.launcher!r}: not one of {', '.join([*starters, *_ELSEWHERE])}; choose one")
    return starters[plan.launcher]()


class LocalStarter:
    """One agent on this machine."""

    per_rank = False

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        """Start it."""
        node = plan.only_node if plan.only_node is not None else plan.hosts[0].node_rank
        with _attached(reception, node) as theirs:
            yield Program(agent_command(), "agent", [node], channel=theirs.fileno())


class SshStarter:
    """One ssh for every host."""

    per_rank = False

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        """Start one after the other, as many at a time as are asked for."""
        port = [] if plan.ssh_port is None else ["-p", str(plan.ssh_port)]
        # Of an option that is given twice, ssh takes the first: a user's own come first.
        options = [*plan.launcher_args, *port, "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]
        options += ["-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=10", "-T", "-x"]
        for host in plan.hosts:
            _refuse_option(host.name)
            with _attached(reception, host.node_rank) as theirs:
                command = ["ssh", *options, host.name, _remote_command()]
                program = Program(command, f"ssh {host.name}", [host.node_rank], channel=theirs.fileno())
            program.cure = f"see whether ssh {host.name} works here without a question, and finds the same Python there"
            yield program


class PdshStarter:
    """One pdsh for all hosts; agents connect to the launcher."""

    per_rank = False

    def start(self, plan: LaunchPlan, reception: Reception) -> Iterator[Program]:
        """Start it."""
        for host in plan.hosts:
            _refuse_option(host.name)
            if re.search(r"[,\s\[\]^]", host.name):
                raise LaunchError(f"host {host.name!r}: pdsh would take it for something else; use --launcher ssh")
        variables = " ".join(f"{name}={value}" for name, value in reception.variables.items())
        # pdsh puts the place of the host in its list for %n, and one % for two.
        remote = f"exec env {variables} {NODE}=%n {shlex.join(agent_command()).replace('%', '%%')}"
        options = ["-N", "-S", "-f", "1024", "-R", "ssh", *plan.launcher_args]
        port = "" if plan.ssh_port is None else f" -p {plan.ssh_port}"
        own = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        environ = {**os.environ, "PDSH_SSH_ARGS_APPEND": f"{own} -o BatchMode=yes{port}".strip()}
        with memory_file("".join(f"{host.name}\n" for host in plan.hosts)) as hosts:
            command = ["pdsh", *options, "-w", f"^/dev/fd/{hosts}", remote]
            program = Program(command, "pdsh", env=environ, pass_fds=[hosts])
        program.alarm = re.compile(r"^(?:pdsh@|ssh: |env: )|: Permission denied [(]|Host key verification failed")
        program.cure = "see whether pdsh -R ssh works for these hosts without a question"
        yield program


def _attached(reception: Reception, node: int) -> socket.socket:
    """The program's end of a socket whose other end is ours."""
    ours, theirs = socket.socketpair()
    reception.attach(ours, node)
    return theirs


def _remote_command() -> str:
    return f"exec {shlex.join(agent_command())}"


def _refuse_option(name: str) -> None:
    if name.startswith("-"):
        raise LaunchError(f"host {name!r}: begins with a dash, as an option does; name it otherwise")
