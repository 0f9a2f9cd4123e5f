"""Which hosts and slots a launch takes, and what starts its ranks there.

| where hosts come from                                              | unless told otherwise, started by    |
|--------------------------------------------------------------------|--------------------------------------|
| ``--hostfile FILE``                                                | slurm if all are in this allocation, |
|                                                                    | else ssh                             |
| Slurm: in a batch script, or under salloc                          | slurm                                |
| a task of a Slurm step that is the only one of it: this machine    | local                                |
| ``/job/hostfile``, where there is one                              | ssh                                  |
| this machine and its devices                                       | local                                |

One host that is this machine is started locally, whatever it is called, unless ``--force_multi`` says otherwise.

Filters count slots: on this machine these are places in the set of visible devices, which is rewritten only where less
than all of it was asked for. In a Slurm step, and in the step that launcher slurm starts, nothing is rewritten at all,
since Slurm binds devices; there only the first slots can be taken.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.errors import ConfigError, HostfileError
from hpc_ds.launch.devices import other_variables, visible_devices
from hpc_ds.launch.environment import is_file
from hpc_ds.launch.filters import Taken, take_first, take_included, take_not_excluded
from hpc_ds.launch.hostfile import GPU_VARIABLES, Host, hosts_from_slurm, is_step, parse
from hpc_ds.launch.plan import MAX_WORLD_SIZE, HostPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAUNCHERS = ("local", "ssh", "pdsh", "openmpi", "mpich", "impi", "slurm")
STANDING_HOSTFILE = "/job/hostfile"
THIS_MACHINE = "localhost"
MAX_RANKS_HERE = 65_536


class Wish(NamedTuple):
    """What the command line says of resources; None or empty is nothing said.

    Attributes:
        only_node: the node that is started here, with ``--no_ssh``.
    """

    hostfile: str | None = None
    include: str = ""
    exclude: str = ""
    num_nodes: int | None = None
    num_gpus: int | None = None
    launcher: str | None = None
    force_multi: bool = False
    only_node: int | None = None


class Resources(NamedTuple):
    """What a launch takes.

    Attributes:
        env: variables that picking devices needs besides CUDA_VISIBLE_DEVICES.
        notes: what a person should know.
    """

    hosts: tuple[HostPlan, ...]
    launcher: str
    env: dict[str, str]
    notes: tuple[str, ...]


class _Pool(NamedTuple):
    """Hosts before filters; ``bound`` says that Slurm has bound devices to ranks."""

    hosts: list[Host]
    launcher: str
    bound: bool
    notes: tuple[str, ...] = ()


def choose(wish: Wish, environ: Mapping[str, str], standing_hostfile: str = STANDING_HOSTFILE) -> Resources:
    """The hosts of a launch, in the order of their ranks.

    Raises:
        ConfigError: there is not what was asked for, or it contradicts itself.
    """
    _refuse_contradictions(wish)
    _refuse_many_tasks(wish, environ)
    pool = _pool(wish, environ, standing_hostfile)
    taken = _filtered(wish, pool.hosts)
    launcher, notes = _launcher(wish, pool, taken, environ)
    bound = pool.bound or launcher == "slurm" or (launcher == "local" and is_step(environ))
    if bound:
        _refuse_gaps(taken)
    hosts = _plans(taken, bound=bound)
    here = _place_here(wish, taken, launcher)
    env: dict[str, str] = {}
    if here is not None and not bound:
        devices, env = _devices_here(taken[here], environ, inherited=launcher == "local")
        hosts[here] = hosts[here]._replace(devices=devices)
    return Resources(tuple(hosts), launcher, env, (*pool.notes, *notes))


def is_this_machine(name: str) -> bool:
    """Whether a host is the machine this runs on: by its names, or because an address of it is one of ours."""
    node = os.uname().nodename
    if name in {THIS_MACHINE, "127.0.0.1", "::1", node, node.partition(".")[0]}:
        return True
    if "@" in name:  # somebody else, if only by name
        return False
    from hpc_ds.launch.address import is_own

    return is_own(name)


def _refuse_contradictions(wish: Wish) -> None:
    if wish.include and wish.exclude:
        raise ConfigError("--include and --exclude: both are given; use one of them", key="include")
    if (wish.include or wish.exclude) and (wish.num_nodes is not None or wish.num_gpus is not None):
        option = "num_nodes" if wish.num_nodes is not None else "num_gpus"
        raise ConfigError(
            f"--{option}: does not go with --include or --exclude; use one or the other", key=option, value=wish
        )
    if wish.launcher is not None and wish.launcher not in LAUNCHERS:
        cure = "use mpich or slurm" if wish.launcher == "mvapich" else f"use {', '.join(LAUNCHERS)}"
        raise ConfigError(f"--launcher {wish.launcher!r}: not one that is known; {cure}", key="launcher")


def _refuse_many_tasks(wish: Wish, environ: Mapping[str, str]) -> None:
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if is_step(environ) and tasks != "1" and wish.only_node is None:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS {tasks!r}: srun has started {tasks} tasks, and each would start all ranks again; "
            "call hpcds run without srun, start the script itself with srun, or give --no_ssh and --node_rank",
            key="SLURM_STEP_NUM_TASKS",
            value=tasks,
        )


def _filtered(wish: Wish, hosts: list[Host]) -> list[Taken]:
    if wish.include:
        return take_included(hosts, wish.include)
    if wish.exclude:
        return take_not_excluded(hosts, wish.exclude)
    return take_first(hosts, wish.num_nodes, wish.num_gpus)


def _pool(wish: Wish, environ: Mapping[str, str], standing_hostfile: str) -> _Pool:
    if wish.hostfile is not None:
        hosts = _read(wish.hostfile)
        inside = "SLURM_JOB_ID" in environ and not is_step(environ) and _in_allocation(hosts, environ)
        return _Pool(hosts, "slurm" if inside else "ssh", bound=False)
    if "SLURM_JOB_ID" in environ and wish.launcher != "local":
        return _of_step(wish, environ) if is_step(environ) else _of_job(wish, environ)
    if is_step(environ):
        return _of_step(wish, environ)
    if is_file(standing_hostfile) and wish.launcher != "local":
        return _Pool(_read(standing_hostfile), "ssh", bound=False)
    if wish.launcher == "slurm":
        raise ConfigError(
            "--launcher 'slurm': there is no Slurm allocation here; use it under salloc or sbatch, or submit the job "
            "with hpcds submit",
            key="launcher",
        )
    return _of_this_machine(wish, environ, bound=False)


def _of_job(wish: Wish, environ: Mapping[str, str]) -> _Pool:
    """The allocation: a rank for each GPU of it, else for each task, or as many as are asked for."""
    hosts = hosts_from_slurm(environ)
    gpus = any(name.startswith(GPU_VARIABLES) and value not in {"", "0"} for name, value in environ.items())
    if wish.num_gpus is not None and wish.num_gpus > 0 and not gpus:
        hosts = hosts_from_slurm(environ, wish.num_gpus)
    return _Pool(hosts, "slurm", bound=False)


def _of_step(wish: Wish, environ: Mapping[str, str]) -> _Pool:
    """In a task of a step: this node, unless another launcher or several nodes are asked for on purpose."""
    if wish.only_node is not None:
        slots = None if visible_devices(environ).ids else wish.num_gpus
        return _Pool(hosts_from_slurm(environ, slots), "local", bound=True)
    if wish.launcher == "slurm":
        return _Pool(hosts_from_slurm(environ), "slurm", bound=True)
    return _of_this_machine(wish, environ, bound=True)


def _of_this_machine(wish: Wish, environ: Mapping[str, str], *, bound: bool) -> _Pool:
    number = len(visible_devices(environ).ids)
    if number:
        return _Pool([Host(THIS_MACHINE, number)], "local", bound)
    if wish.num_gpus is not None:
        ranks = min(max(wish.num_gpus, 1), MAX_RANKS_HERE)
        return _Pool([Host(THIS_MACHINE, ranks)], "local", bound)
    note = "no GPU is visible here: one rank is started; --num_gpus N starts N ranks without GPUs"
    return _Pool([Host(THIS_MACHINE, 1)], "local", bound, (note,))


def _read(path: str) -> list[Host]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no text, or a zero byte in the name
        problem = getattr(error, "strerror", None) or "not text"
        raise HostfileError(f"hostfile {path!r}: {problem}; name one that can be read", file=path) from None
    return parse(text, source=f"hostfile {path!r}")


def _in_allocation(hosts: list[Host], environ: Mapping[str, str]) -> bool:
    try:
        allocated = {host.name for host in hosts_from_slurm(environ, slots=1)}
    except ConfigError:  # who names a hostfile needs no word of Slurm's
        return False
    return all(host.name in allocated for host in hosts)


def _launcher(
    wish: Wish, pool: _Pool, taken: Sequence[Taken], environ: Mapping[str, str]
) -> tuple[str, tuple[str, ...]]:
    """What starts the ranks, and what should be said of it."""
    if wish.only_node is not None:
        return "local", ()
    launcher = wish.launcher or pool.launcher
    if wish.force_multi:
        return ("ssh" if launcher == "local" and wish.launcher is None else launcher), ()
    # In an allocation a step is what gives ranks their share of the node.
    if launcher == "slurm" and "SLURM_JOB_ID" in environ:
        return launcher, ()
    if len(taken) == 1 and is_this_machine(taken[0].name):
        if wish.launcher in {None, "local"}:
            return "local", ()
        note = f"one host, which is this machine: its ranks are started locally; --force_multi uses {launcher}"
        return "local", (note,)
    if launcher == "local":
        which = f"{taken[0].name!r} is another machine" if len(taken) == 1 else f"there are {len(taken)} hosts"
        raise ConfigError(
            f"--launcher 'local': {which}; use ssh, or --no_ssh with --node_rank on each",
            key="launcher",
        )
    return launcher, ()


def _place_here(wish: Wish, taken: Sequence[Taken], launcher: str) -> int | None:
    """Which of the hosts is this machine for sure, so that its devices can be looked at."""
    here = wish.only_node
    if here is None:
        return 0 if launcher == "local" or (len(taken) == 1 and taken[0].name == THIS_MACHINE) else None
    if not 0 <= here < len(taken):
        there = f"there are {len(taken)} nodes" if len(taken) > 1 else "there is one node"
        raise ConfigError(f"--node_rank {here}: {there}; count from 0", key="node_rank", value=here)
    return here


def _refuse_gaps(taken: Sequence[Taken]) -> None:
    """What Slurm has bound is used from its start."""
    for name, slots, whole in taken:
        if not whole and list(slots) != list(range(len(slots))):
            chosen = ",".join(map(str, slots))
            raise HostfileError(
                f"slots {chosen} of host {name!r}: Slurm binds devices, and only the first of them can be taken; "
                "name slots from 0 on, or ask Slurm for fewer",
                value=chosen,
            )


def _plans(taken: Sequence[Taken], *, bound: bool) -> list[HostPlan]:
    plans = []
    first = 0
    for node_rank, (name, slots, whole) in enumerate(taken):
        devices = None if whole or bound else tuple(map(str, slots))
        plans.append(HostPlan(name, first, devices, len(slots), node_rank))
        first += len(slots)
    if first > MAX_WORLD_SIZE:
        raise ConfigError(f"ranks {first}: more than {MAX_WORLD_SIZE} in one launch; take fewer hosts or slots")
    return plans


def _devices_here(
    taken: Taken, environ: Mapping[str, str], *, inherited: bool
) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """The ids of the devices taken on this machine; None leaves the variable as it is.

    Args:
        taken: of this machine.
        environ: of the launcher.
        inherited: whether ranks have the launcher's variables anyhow.
    """
    visible = visible_devices(environ)
    leave = inherited or visible.source in {"NVML", "KFD", ""}
    if not visible.ids:
        return (None if leave else ()), {}
    last = max(taken.slots)
    if last >= len(visible.ids):
        number = f"{len(visible.ids)} visible devices" if len(visible.ids) > 1 else "one visible device"
        raise ConfigError(
            f"slot {last} of host {taken.name!r}: this machine has {number} ({visible.source}); use fewer slots, or "
            "set CUDA_VISIBLE_DEVICES= for ranks without GPUs",
            key=visible.source,
        )
    if leave and len(taken.slots) == len(visible.ids):
        return None, {}
    return visible.pick(taken.slots), other_variables(environ, taken.slots)
