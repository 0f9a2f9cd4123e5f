"""``init_distributed``: from whatever started this process to an initialised process group.

Three steps: who am I (``rank.py``), where do we meet (``rendezvous.py``), has everybody come (``meeting.py``). Only then is
the group made, over the store of the meeting; docs/distributed.md has the tables.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined] # torch's stubs leave it out

from hpc_ds.errors import RankError
from hpc_ds.runtime import mpi, preemption
from hpc_ds.runtime import rank as who
from hpc_ds.runtime.by_name import default_timeout
from hpc_ds.runtime.descent import become_the_rank, is_alone_below_a_rank, run_of_this_process
from hpc_ds.runtime.meeting import meet
from hpc_ds.runtime.rank import Rank
from hpc_ds.runtime.rendezvous import Deadline, at_master, find_place
from hpc_ds.runtime.show_log import show_log

log = logging.getLogger("hpc_ds")

_GOODBYE = timedelta(seconds=30)
_IDLE_WITHIN_S = 2.0
_FOUND_BY = {
    "env": "RANK, WORLD_SIZE and LOCAL_RANK",
    "slurm": "the variables of a Slurm step",
    "openmpi": "the variables of Open MPI",
    "pmi": "the variables of PMI",
    "mvapich2": "the variables of MVAPICH2",
    "mpi4py": "MPI itself (mpi4py)",
    "arguments": "the arguments of init_distributed",
    "child": "a rank, which has started this process: one alone",
    "single": "nothing that names others: one process alone",
}

_set_here: dict[str, str] = {}
"""Variables that an earlier call has set: the next one finds its rank where that one did."""


def init_distributed(  # noqa: PLR0913 - DeepSpeed's signature
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: object = None,  # noqa: ARG001 - DeepSpeed's signature
    rank: int = -1,
    world_size: int = -1,
) -> Rank:
    """Join the process group of this run. Collective.

    One already initialised is used as it is. Sets RANK, LOCAL_RANK and WORLD_SIZE for code that reads them, and the
    current CUDA device; of a script that made the process group itself only where it has left that at the first one.
    Sets GLOO_SOCKET_IFNAME where the ranks are on several hosts and it is not set. What a rank has started, and was told nothing
    else since, is a world of its own.

    Args:
        dist_backend: default: nccl where there is CUDA, else gloo. Never mpi.
        auto_mpi_discovery: whether MPI may be asked.
        distributed_port: where rank 0 listens, if MASTER_PORT is not set; default: any free port.
        verbose: whether rank 0 logs one line on how the ranks were found.
        timeout: of collectives, and for the ranks to find each other; default: ``by_name.default_timeout``, 10 minutes.
        init_method: ``tcp://host:port`` in place of MASTER_ADDR and MASTER_PORT; ``file://`` is left to torch.
        dist_init_required: False demands that it is initialised already.
        config: ignored; in DeepSpeed's signature.
        rank: with ``world_size``, instead of the environment.
        world_size: see ``rank``.

    Raises:
        RankError: the environment does not say which rank this is, the ranks did not find each other, or they do not
            fit together.
        ConfigError: DEEPSPEED_TIMEOUT is not a number of minutes.
    """
    preemption.listen()
    if dist.is_initialized():
        return _take_as_it_is()
    if dist_init_required is False:
        raise RankError(
            "init_distributed: dist_init_required is False, but no process group is initialised; call "
            "torch.distributed.init_process_group first, or leave it at None"
        )
    backend = _backend(dist_backend)
    timeout = default_timeout() if timeout is None else timeout
    if not isinstance(timeout, timedelta):
        raise RankError(f"timeout {timeout!r}: not a time; write datetime.timedelta(seconds=...)")
    deadline = Deadline(timeout)
    me = _who_am_i(rank, world_size, auto_mpi_discovery)
    preemption.attend(me.rank, me.world_size)  # a rank that waits for the others gives signs of life too
    me = _join(me, backend, deadline, init_method, distributed_port or 0, auto_mpi_discovery)
    _tell(me)
    _choose_device(me)
    atexit.register(_leave_together)
    if verbose and me.rank == 0:
        show_log(me.rank)
        ranks = f"{me.world_size} rank{'s' if me.world_size > 1 else ''}"
        log.info("process group: %s over %s, found by %s", ranks, backend, _FOUND_BY[me.source])
    return me


def _backend(asked: str | None) -> str:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        return "cpu:gloo,cuda:nccl" if devices else "gloo"
    names = {part.rpartition(":")[2] for part in asked.lower().split(",")}
    if "mpi" in names:
        raise RankError(
            f"dist_backend {asked!r}: torch has it only if it was built against your MPI; leave it out (nccl or gloo carry "
            "the tensors, and MPI introduces the ranks)"
        )
    if unknown := names - {*dist.Backend.backend_list}:
        raise RankError(f"dist_backend {asked!r}: {unknown.pop()!r} is no backend of this torch; use 'nccl' or 'gloo'")
    if "nccl" in names and not devices:
        raise RankError(
            f"dist_backend {asked!r}: this process sees no CUDA device; look at CUDA_VISIBLE_DEVICES and nvidia-smi, or use "
            "'gloo'"
        )
    return asked


def _who_am_i(rank: int, world_size: int, ask_mpi: bool) -> Rank:
    """From the arguments, else the environment, else MPI; collective over MPI's processes if that is asked."""
    environ = {name: value for name, value in os.environ.items() if _set_here.get(name) != value}
    if (rank >= 0) != (world_size > 0):
        raise RankError(
            f"init_distributed: rank {rank}, world_size {world_size}: one without the other; give both or none"
        )
    if rank >= 0:
        if rank >= world_size:
            raise RankError(f"init_distributed: rank {rank} of a world of {world_size}; ranks count from 0")
        local_rank = who.local_rank_from_environment(environ)
        return Rank(rank, local_rank or 0, world_size, None, "arguments", local_rank is not None)
    if is_alone_below_a_rank(environ):
        return Rank(0, who.local_rank_from_environment(environ) or 0, 1, None, "child")
    me = who.rank_from_environment(environ)
    if me is None:
        me = _ask_mpi(who.mpi_sign(environ), ask_mpi)
    elif not me.placed and ask_mpi and torch.cuda.is_available():
        me = mpi.who_am_i(me)
    who.refuse_alone(me, environ)
    return me


def _ask_mpi(sign: str, allowed: bool) -> Rank:
    if not sign:
        return Rank(0, 0, 1, 1, "single")
    if not allowed:
        raise RankError(
            f"{sign} {os.environ[sign]!r}: this is a process of MPI's, which may not be asked (auto_mpi_discovery=False); "
            "set RANK, WORLD_SIZE and LOCAL_RANK, or allow it"
        )
    return mpi.who_am_i(None)


def _join(me: Rank, backend: str, deadline: Deadline, init_method: str | None, port: int, ask_mpi: bool) -> Rank:
    timeout = timedelta(seconds=deadline.timeout_s)
    method = urlsplit(init_method or "env://")
    if method.scheme not in {"env", "tcp"}:
        dist.init_process_group(
            backend, init_method=init_method, rank=me.rank, world_size=me.world_size, timeout=timeout
        )
        return me
    if me.world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return me
    if method.scheme == "tcp":
        if not (method.hostname and method.netloc.rpartition(":")[2].isdigit()):
            raise RankError(f"init_method {init_method!r}: not an address; write tcp://HOST:PORT")
        place = at_master(me, method.hostname or "", str(method.netloc.rpartition(":")[2]), deadline)
    else:
        place = find_place(me, port, deadline, ask_mpi)
    devices = torch.cuda.device_count() if "nccl" in backend else 0
    me, store, interface = meet(me, place, deadline, devices)
    if interface:
        # gloo takes the host's own name otherwise, which on Debian resolves to 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size, timeout=timeout)
    return me


def _choose_device(me: Rank) -> None:
    """A launcher that gives each rank one device shows it as number 0."""
    if not torch.cuda.is_available():
        return
    devices = torch.cuda.device_count()
    if devices == 1 or me.local_rank < devices:  # else: ranks over gloo, more than devices
        torch.cuda.set_device(me.local_rank if devices > 1 else 0)


def _take_as_it_is() -> Rank:
    me = current_rank()
    preemption.attend(me.rank, me.world_size)
    _take_the_name(me)
    if torch.cuda.is_available() and torch.cuda.current_device() == 0 and me.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(me.local_rank)
    return me


def _tell(me: Rank) -> None:
    """Whoever asks the environment, here and in what this process starts."""
    told = {"RANK": str(me.rank), "LOCAL_RANK": str(me.local_rank), "WORLD_SIZE": str(me.world_size)}
    _set_here.update({name: value for name, value in told.items() if os.environ.get(name) != value})
    os.environ.update(told)
    _take_the_name(me)


def _take_the_name(me: Rank) -> None:
    """One process alone, outside of a run, has nothing that another could take from it."""
    if me.world_size > 1 or run_of_this_process() is not None:
        become_the_rank()


def current_rank() -> Rank:
    """This process in the initialised process group."""
    local_rank = who.local_rank_from_environment(os.environ)
    return Rank(dist.get_rank(), local_rank or 0, dist.get_world_size(), None, "initialised", local_rank is not None)


def _leave_together() -> None:
    """Wait for the others, then end the process group; after an error do neither, so that the error is not held up.

    A gloo thread that lets go of a tensor while the interpreter is being taken down aborts the process ("terminate
    called without an active exception", pytorch #179291 and #190489), and a run that had finished counts as crashed.
    Destroying the group does not end those threads, so they are given the time to become idle first.
    """
    if not dist.is_initialized() or getattr(sys, "last_value", None) is not None:
        return
    if "gloo" in str(dist.get_backend_config()):
        goodbye = torch.zeros(1)
        with contextlib.suppress(RuntimeError):
            work = dist.all_reduce(goodbye, async_op=True)
            work.wait(_GOODBYE)
            _wait_until_idle("pt_gloo_runloop")
    dist.destroy_process_group()


def _wait_until_idle(thread_name: str) -> None:
    """Sleep, which leaves the interpreter to other threads, until those of a name sleep too, twice in a row."""
    looks = 0
    deadline = time.monotonic() + _IDLE_WITHIN_S
    while looks < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        states = [text.rpartition(")")[2].split()[0] for text in _threads() if f"({thread_name}" in text]
        looks = looks + 1 if set(states) <= {"S"} else 0


def _threads() -> list[str]:
    """The stat line of every thread of this process."""
    lines = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines.append(path.read_text(encoding="utf-8", errors="replace"))
    return lines
