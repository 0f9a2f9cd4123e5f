"""What ``hpcds run`` starts: which ranks on which host, with which devices, environment and command.

A plan is made once, by the launcher (``resources.py`` and ``cli/run.py``), printed by ``--dry-run``, and carried out by
``conduct.py``. It says nothing of how agents get to their hosts; MASTER_ADDR and MASTER_PORT are known only when rank
0's host has a port.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

MAX_WORLD_SIZE = 2**20
"""Ranks of one plan; more is a typing error."""

# The script must neither see the command as its own arguments (conda's activate reads them) nor change it.
_SOURCING = 'hpcds_command=("$@"); set --; . "$0" && exec "${hpcds_command[@]}"'


class HostPlan(NamedTuple):
    """The ranks of one host: ``first_rank`` to ``first_rank + ranks - 1``.

    Attributes:
        name: as the launcher reaches it; ``localhost`` is this machine.
        devices: ids for CUDA_VISIBLE_DEVICES, one a rank or more; None: the variable is left as it is.
        ranks: LOCAL_WORLD_SIZE.
        node_rank: place among the hosts.
    """

    name: str
    first_rank: int
    devices: tuple[str, ...] | None
    ranks: int
    node_rank: int


@dataclass(frozen=True)
class LaunchPlan:
    """All that a launch needs to know.

    Attributes:
        hosts: in the order of their ranks.
        command: what every rank runs; ``--local_rank=N`` is put in at ``local_rank_at``.
        local_rank_at: where in ``command`` the local rank goes (right after the script); None: nowhere.
        env: what every rank gets on top of what its host gives it.
        cwd: the working folder of every rank.
        launcher: local, ssh, pdsh, openmpi, mpich, impi or slurm.
        launcher_args: options for the launcher's program.
        master_addr: where the ranks meet; None: found by the launcher.
        master_port: 0: a free one of rank 0's host.
        ssh_port: None: ssh's own.
        grace_s: seconds from SIGTERM to SIGKILL.
        prefix: whether lines of output begin with their rank.
        log_dir: folder of one log a rank, on the rank's host; None: the console.
        bind_cores: whether ranks are bound to cores of their own.
        core_list: the cores to part among the ranks of a host, as ``0-3,8-11``; None: all that there are.
        venv_script: sourced, on its host, by the shell that then becomes the rank; None: nothing.
        only_node: start only the ranks of this node, here; None: all of them.
    """

    hosts: tuple[HostPlan, ...]
    command: tuple[str, ...]
    cwd: str
    launcher: str = "local"
    local_rank_at: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    launcher_args: tuple[str, ...] = ()
    master_addr: str | None = None
    master_port: int = 0
    ssh_port: int | None = None
    grace_s: float = 30.0
    prefix: bool = False
    log_dir: str | None = None
    bind_cores: bool = False
    core_list: str | None = None
    venv_script: str | None = None
    only_node: int | None = None

    @cached_property
    def world_size(self) -> int:
        """Ranks of all hosts."""
        return sum(host.ranks for host in self.hosts)

    def rank_environment(self, host: HostPlan, local_rank: int) -> dict[str, str]:
        """What one rank is told of itself; MASTER_ADDR and MASTER_PORT come on top."""
        told = {
            "RANK": str(host.first_rank + local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(host.ranks),
            "LOCAL_SIZE": str(host.ranks),  # DeepSpeed's names, as CROSS_RANK and CROSS_SIZE
            "GROUP_RANK": str(host.node_rank),
            "CROSS_RANK": str(host.node_rank),
            "CROSS_SIZE": str(len(self.hosts)),
        }
        if host.devices is not None:
            told["CUDA_VISIBLE_DEVICES"] = ",".join(host.devices)
        return told

    def rank_command(self, local_rank: int) -> tuple[str, ...]:
        """The exact argument list of one rank."""
        command = self.command
        if self.local_rank_at is not None:
            command = (*command[: self.local_rank_at], f"--local_rank={local_rank}", *command[self.local_rank_at :])
        if self.venv_script is None:
            return command
        # A name without a slash would be looked for on PATH.
        script = self.venv_script if "/" in self.venv_script else f"./{self.venv_script}"
        return ("bash", "-c", _SOURCING, script, *command)
