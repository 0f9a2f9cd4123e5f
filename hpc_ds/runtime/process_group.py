"""``init_distributed``: from whatever started this process to an initialised process group.

How the ranks find rank 0, in this order:

| what is there                  | how                                                                             |
|--------------------------------|---------------------------------------------------------------------------------|
| MASTER_ADDR and MASTER_PORT    | torch's own ``env://``                                                          |
| one process                    | no address is needed                                                            |
| Open MPI, or PMI without Slurm | rank 0 listens on a free port and MPI broadcasts its address                    |
| a Slurm step, or a run folder  | rank 0 listens on a free port and publishes its address in a file they all see  |

A free port bound by rank 0 itself cannot collide with another run, and a restart never meets the old one.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined] # torch's stubs leave them out

from hpc_ds.errors import RankError
from hpc_ds.launch.node_list import expand
from hpc_ds.run_dir import read_object, write_atomic
from hpc_ds.runtime import mpi, preemption
from hpc_ds.runtime.rank import Rank, in_slurm_step, rank_from_environment
from hpc_ds.runtime.show_log import show_log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger("hpc_ds")

_DEFAULT_TIMEOUT = timedelta(minutes=10)
_GOODBYE = timedelta(seconds=30)
_IDLE_WITHIN_S = 2.0
_PORTS_TRIED = 50


def init_distributed(  # noqa: PLR0913 - DeepSpeed's signature
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: timedelta = _DEFAULT_TIMEOUT,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: object = None,  # noqa: ARG001 - DeepSpeed's signature
    rank: int = -1,
    world_size: int = -1,
) -> Rank:
    """Join the process group of this run. Collective.

    One already initialised is used as it is. Sets RANK, LOCAL_RANK and WORLD_SIZE for code that reads them, and the
    current CUDA device; of a script that made the process group itself only where it has left that at the first one.

    Args:
        dist_backend: default: nccl where there is CUDA, else gloo.
        auto_mpi_discovery: whether MPI may be asked.
        distributed_port: where rank 0 listens; default: any free port.
        verbose: whether rank 0 logs one line on how the ranks were found.
        timeout: of collectives, and for the ranks to find each other.
        init_method: given to torch as it is, with ``rank`` and ``world_size``.
        dist_init_required: False demands that it is initialised already.
        config: ignored; in DeepSpeed's signature.
        rank: with ``world_size`` and ``init_method``, instead of the environment.
        world_size: see ``rank``.

    Raises:
        RankError: the environment does not say which rank this is, or the ranks did not find each other.
    """
    preemption.listen()
    if dist.is_initialized():
        return _take_as_it_is()
    if dist_init_required is False:
        raise RankError("init_distributed: dist_init_required is False, but no process group is initialised")
    backend = dist_backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if init_method is not None and rank >= 0 and world_size > 0:
        me = Rank(rank, int(os.environ.get("LOCAL_RANK", rank)), world_size, None, "arguments")
        preemption.attend(rank, world_size)
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    else:
        found = rank_from_environment(os.environ) or Rank(0, 0, 1, 1, "single")
        preemption.attend(found.rank, found.world_size)  # a rank that waits for the others gives signs of life too
        me = _join(found, backend, timeout, distributed_port or 0, auto_mpi_discovery)
    os.environ.update(RANK=str(me.rank), LOCAL_RANK=str(me.local_rank), WORLD_SIZE=str(me.world_size))
    if torch.cuda.is_available():
        # A launcher that gives each rank one device shows it as number 0.
        torch.cuda.set_device(me.local_rank if torch.cuda.device_count() > 1 else 0)
    atexit.register(_leave_together)
    if verbose and me.rank == 0:
        show_log(me.rank)
        log.info("process group: %d ranks over %s, found by %s", me.world_size, backend, me.source)
    return me


def _take_as_it_is() -> Rank:
    me = current_rank()
    preemption.attend(me.rank, me.world_size)
    if torch.cuda.is_available() and torch.cuda.current_device() == 0 and me.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(me.local_rank)
    return me


def current_rank() -> Rank:
    """This process in the initialised process group."""
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return Rank(dist.get_rank(), local_rank, dist.get_world_size(), None, "initialised")


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


def _join(me: Rank, backend: str, timeout: timedelta, port: int, ask_mpi: bool) -> Rank:
    address, master_port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if bool(address) != bool(master_port):
        seen = {"MASTER_ADDR": str(address), "MASTER_PORT": str(master_port)}
        raise RankError(
            f"MASTER_ADDR {address!r}, MASTER_PORT {master_port!r}: only one is set; set both or none", seen
        )
    if address and master_port:
        dist.init_process_group(backend, init_method="env://", rank=me.rank, world_size=me.world_size, timeout=timeout)
        return me
    if me.world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return me
    listening: list[TCPStore] = []

    def publish() -> str:
        listening.append(_listen(me.world_size, timeout, port))
        return f"{_own_address(os.environ)}:{listening[0].port}"

    if me.source in {"openmpi", "pmi"} and ask_mpi:
        me, published = mpi.introduce(me, publish)
    else:
        published = _through_file(me, publish, timeout)
    if listening:
        store = listening[0]
    else:
        host, _, port_text = published.rpartition(":")
        store = _connect(host, int(port_text), me.world_size, timeout)
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size, timeout=timeout)
    return me


def _listen(world_size: int, timeout: timedelta, port: int) -> TCPStore:
    *ports, last = [port] if port else allowed_ports(os.environ)
    for candidate in ports:
        with contextlib.suppress(RuntimeError):  # somebody else listens there
            return _store(candidate, world_size, timeout)
    try:
        return _store(last, world_size, timeout)
    except RuntimeError as error:
        raise RankError(f"port {last}: rank 0 cannot listen there: {_first_line(error)}; choose another") from error


def _store(port: int, world_size: int, timeout: timedelta) -> TCPStore:
    return TCPStore("localhost", port, world_size, is_master=True, timeout=timeout, wait_for_workers=False)


def allowed_ports(environ: Mapping[str, str]) -> list[int]:
    """Where rank 0 may listen, in the order to try: in the site's ``port_range``, else 0, which is any free port.

    Attempts begin at different places in a range: a port of the last one may still be held by the system.
    """
    site = read_object(Path(environ["HPCDS_RUN_DIR"]) / "site.json") if "HPCDS_RUN_DIR" in environ else {}
    given = site.get("port_range")
    if not (isinstance(given, list) and len(given) == 2):
        return [0]
    first, count = given[0], given[1] - given[0] + 1
    attempt = environ.get("HPCDS_ATTEMPT", "")
    begin = (int(attempt) if attempt.isdigit() else 0) * _PORTS_TRIED
    return [first + (begin + index) % count for index in range(min(count, _PORTS_TRIED))]


def _connect(host: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    try:
        return TCPStore(host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise RankError(
            f"rank 0 at {host}:{port}: cannot be reached: {_first_line(error)}; is that address on the ranks' network?"
        ) from error


def _through_file(me: Rank, publish: Callable[[], str], timeout: timedelta) -> str:
    """What rank 0 published, through a file that all ranks see."""
    path = rendezvous_file(os.environ, me)
    if me.rank == 0:
        published = publish()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, published)
        return published
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            return path.read_text(encoding="utf-8")
        except OSError:
            if time.monotonic() > deadline:
                raise RankError(
                    f"rendezvous file {str(path)!r}: rank 0 did not write it in {timeout.total_seconds():g} s; is that "
                    "folder shared between the nodes, and did rank 0 start?"
                ) from None
            time.sleep(0.02)


def rendezvous_file(environ: Mapping[str, str], me: Rank) -> Path:
    """Where rank 0 of this very start publishes its address.

    In the run folder, else in the user's home, which clusters share between nodes; named so that no other run, step
    or restart has the same.

    Raises:
        RankError: nothing names this start apart from others.
    """
    step = ".".join(environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    if "HPCDS_RUN_DIR" in environ:
        name = f"attempt-{environ.get('HPCDS_ATTEMPT', '0')}-{step}"
        return Path(environ["HPCDS_RUN_DIR"]) / "rendezvous" / name
    if in_slurm_step(environ):
        cluster = environ.get("SLURM_CLUSTER_NAME", "cluster")
        return Path.home() / ".cache" / "hpcds" / "rendezvous" / f"{cluster}-{step}"
    raise RankError(
        f"rank {me.rank} of {me.world_size}: MASTER_ADDR and MASTER_PORT are not set, and there is neither a run folder nor "
        "a Slurm step to meet in; set them, or start with hpcds, srun, torchrun or mpirun"
    )


def _own_address(environ: Mapping[str, str]) -> str:
    """An address of this host that the other nodes reach: the source address of the route to one of them.

    The host's own name is no help by itself: on Debian it resolves to 127.0.1.1.
    """
    for node in _other_nodes(environ):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((node, 9))  # sends nothing: it asks for the route only
            except OSError:
                continue
            return str(probe.getsockname()[0])
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1" and "OMPI_COMM_WORLD_SIZE" not in environ:
        return "127.0.0.1"
    return _resolvable(socket.gethostname())


def _other_nodes(environ: Mapping[str, str]) -> list[str]:
    if int(environ.get("SLURM_STEP_NUM_NODES", "1") or 1) < 2:
        return []
    return expand(environ.get("SLURM_STEP_NODELIST", ""))[-1:]


def _resolvable(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError:
        return name


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
