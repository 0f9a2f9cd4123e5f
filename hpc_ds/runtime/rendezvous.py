"""Where the ranks of one start find each other: a store that rank 0 serves, and how the others learn its address.

In this order:

| what is there                     | how                                                                              |
|-----------------------------------|----------------------------------------------------------------------------------|
| MASTER_ADDR and MASTER_PORT       | rank 0 listens there; under torchrun its agent does                              |
| Open MPI, PMI, MVAPICH2, mpi4py   | rank 0 listens on a free port; mpiexec (PMI-1) or MPI tells all                  |
| a Slurm step, or a run folder     | rank 0 listens on a free port; a file that all see tells                         |

A free port bound by rank 0 itself cannot collide with another run, and a restart never meets the old one. What rank 0
publishes ends with a word of its own, by which the others know that they met it and not who listens there now.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from datetime import timedelta
from pathlib import Path
from socket import create_connection, gaierror, gethostname
from typing import TYPE_CHECKING, NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch's stubs leave it out

from hpc_ds.errors import NodeListError, RankError
from hpc_ds.launch.address import named_interfaces, own_address, own_addresses, reachable_addresses
from hpc_ds.launch.node_list import expand
from hpc_ds.run_dir import read_object, write_atomic
from hpc_ds.runtime import mpi, pmi
from hpc_ds.runtime.rank import Rank, by_mpi, in_slurm_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PORTS_TRIED = 50
_DIAL_S = 5.0
_NAMELESS_S = 30.0  # a name may come into being while the others start; a typing error never does
_ANSWER_S = 30.0
_NAMELESS = "the name does not resolve"


class Deadline:
    """The time that all of a start has, from the first moment on."""

    def __init__(self, timeout: timedelta) -> None:
        self.timeout_s = timeout.total_seconds()
        self._began = time.monotonic()

    def spent_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def left_s(self) -> float:
        """Seconds that are left; never less than a little, for functions that take 0 as for ever."""
        return max(0.01, self.timeout_s - self.spent_s())

    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self.spent_s() >= self.timeout_s


class Place(NamedTuple):
    """A store in which the ranks of a start can meet.

    Attributes:
        store: rank 0 serves it.
        address: of the host that serves it, as the others reach it.
        words: what to call it in messages.
        is_older: whether it has served earlier starts: torchrun's, whose agent outlives its ranks.
        close: to be called on rank 0 when all have come.
    """

    store: TCPStore
    address: str
    words: str
    is_older: bool = False
    close: Callable[[], None] = lambda: None


class _Published(NamedTuple):
    port: int
    token: str  # "" where nobody could tell it
    hosts: tuple[str, ...]

    def text(self) -> str:
        return ",".join((str(self.port), self.token, *self.hosts))

    @classmethod
    def read(cls, text: str) -> _Published | None:
        """None where a text is not what rank 0 publishes."""
        port, _, rest = text.strip().partition(",")
        token, _, hosts = rest.partition(",")
        return cls(int(port), token, tuple(hosts.split(","))) if port.isdigit() and hosts else None


def find_place(me: Rank, port: int, deadline: Deadline, ask_mpi: bool) -> Place:
    """The store of this start. Collective.

    Args:
        me: this rank.
        port: where rank 0 listens; 0: at MASTER_PORT, else within the site's range, else anywhere.
        deadline: of the start.
        ask_mpi: whether MPI may be asked.

    Raises:
        RankError: nothing names a place, or rank 0 is not there.
    """
    address, master_port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT") or (str(port) if port else None)
    if address and master_port:
        return at_master(me, address, master_port, deadline)
    if address or os.environ.get("MASTER_PORT"):
        seen = {"MASTER_ADDR": str(address), "MASTER_PORT": str(master_port)}
        raise RankError(
            f"MASTER_ADDR {address!r}, MASTER_PORT {master_port!r}: only one is set; set both or none", seen
        )
    if ask_mpi and by_mpi(me, os.environ):
        return _told_by_mpi(me, port, deadline)
    return _through_file(me, port, deadline)


def at_master(me: Rank, address: str, port: str, deadline: Deadline) -> Place:
    """The store at an address that the launcher gave to all. Collective.

    Raises:
        RankError: the port is none, or taken; or nobody answers there.
    """
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise RankError(f"MASTER_PORT {port!r}: not a port; use a number from 1 to 65535")
    words = f"rank 0 at MASTER_ADDR {address!r}, MASTER_PORT {port}"
    known = _Published(int(port), "", (address,))
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if me.rank == 0 and not is_agents:
        try:
            return Place(_serve(known.port, me.world_size, deadline, "", is_shared=True), address, words)
        except RuntimeError as error:
            # Another process that takes itself for rank 0 may be there: then the others are told so, too.
            store, _ = _dial(known, me.world_size, min(_DIAL_S, deadline.left_s()), must_be_ours=True)
            if store is None:
                raise RankError(
                    f"MASTER_PORT {port}: rank 0 cannot listen there: {_cause(error)}; choose another, or none and leave "
                    "MASTER_ADDR unset too"
                ) from None
            return Place(store, address, words)
    store = _dial_until(lambda: known, me, deadline, words)
    return Place(store, address, words, is_older=is_agents)


def _told_by_mpi(me: Rank, port: int, deadline: Deadline) -> Place:
    """Rank 0 listens, and tells all through their process manager, or through MPI."""
    by_pmi = me.source != "mpi4py" and pmi.is_there(os.environ)
    if not by_pmi:
        mpi.who_am_i(me)
    others = [] if by_pmi else [host for host in mpi.hosts() if host != gethostname()]
    served = _listen(me, port, deadline, others) if me.rank == 0 else None
    text = served[1].text() if served else None
    told = pmi.tell_all(text, os.environ, deadline.left_s()) if by_pmi else mpi.tell_all(text)
    published = _Published.read(told)
    if published is None:
        raise RankError(f"rank 0 told {told!r}: not an address; is the same version of hpc_ds on all hosts?")
    words = f"rank 0 at {_shown(published)}"
    store = served[0] if served else _dial_until(lambda: published, me, deadline, words)
    return Place(store, published.hosts[0], words)


def _through_file(me: Rank, port: int, deadline: Deadline) -> Place:
    """Rank 0 listens, and tells all through a file that they see."""
    path = rendezvous_file(os.environ, me)

    def look() -> _Published | None:
        try:
            return _Published.read(path.read_text(encoding="utf-8"))
        except OSError:
            return None

    if me.rank != 0:
        seen: list[_Published] = []

        def look_again() -> _Published | None:
            found = look()
            seen[:] = [found] if found else seen
            return found

        store = _dial_until(look_again, me, deadline, f"rendezvous file {str(path)!r}")
        return Place(store, seen[0].hosts[0], f"rank 0 at {_shown(seen[0])}")
    earlier = look()
    if earlier is not None:  # of another program that this step started before; or of a second rank 0
        twin, _ = _dial(earlier, me.world_size, min(_DIAL_S, deadline.left_s()), must_be_ours=True)
        if twin is not None:
            return Place(twin, earlier.hosts[0], f"rank 0 at {_shown(earlier)}")
    mine, published = _listen(me, port, deadline, _other_nodes(os.environ))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, published.text())
    except OSError as error:
        raise RankError(
            f"rendezvous file {str(path)!r}: rank 0 cannot write it: {error.strerror}; it is where the ranks learn its address"
        ) from error
    return Place(mine, published.hosts[0], f"rank 0 at {_shown(published)}", close=lambda: _remove(path))


def _remove(path: Path) -> None:
    """A second program of this step must not meet the store of the first."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _shown(published: _Published) -> str:
    return f"{published.hosts[0]}:{published.port}"


def _listen(me: Rank, port: int, deadline: Deadline, others: list[str]) -> tuple[TCPStore, _Published]:
    hosts = tuple(_own_hosts(me, os.environ, others))
    token = secrets.token_hex(8)
    *ports, last = [port] if port else allowed_ports(os.environ)
    for candidate in ports:
        with contextlib.suppress(RuntimeError):  # somebody else listens there
            store = _serve(candidate, me.world_size, deadline, token)
            return store, _Published(store.port, token, hosts)
    try:
        store = _serve(last, me.world_size, deadline, token)
    except RuntimeError as error:
        raise RankError(f"port {last}: rank 0 cannot listen there: {_cause(error)}; choose another") from error
    return store, _Published(store.port, token, hosts)


def _serve(port: int, world_size: int, deadline: Deadline, token: str, *, is_shared: bool = False) -> TCPStore:
    """Raises RuntimeError where the port is taken."""
    store = TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=deadline.left_s()),
        wait_for_workers=False,
        multi_tenant=is_shared,  # the same process may have begun before, on the same MASTER_PORT
    )
    store.set(_mark(token), "")
    return store


def _mark(token: str) -> str:
    return f"hpc_ds/served/{token}"


def allowed_ports(environ: Mapping[str, str]) -> list[int]:
    """Where rank 0 may listen, in the order to try: in the site's ``port_range``, else 0, which is any free port.

    Attempts begin at different places in a range: a port of the last one may still be held by the system.
    """
    given = _site(environ).get("port_range")
    if not (isinstance(given, list) and len(given) == 2):
        return [0]
    first, count = given[0], given[1] - given[0] + 1
    attempt = environ.get("HPCDS_ATTEMPT", "")
    begin = (int(attempt) if attempt.isdigit() else 0) * _PORTS_TRIED
    return [first + (begin + index) % count for index in range(min(count, _PORTS_TRIED))]


def _site(environ: Mapping[str, str]) -> dict[str, object]:
    return read_object(Path(environ["HPCDS_RUN_DIR"]) / "site.json") if "HPCDS_RUN_DIR" in environ else {}


def _own_hosts(me: Rank, environ: Mapping[str, str], others: list[str]) -> list[str]:
    """Addresses of this host for the others to try, best first."""
    if _is_one_host(me, environ):
        return ["127.0.0.1"]
    interfaces = _site(environ).get("interfaces")
    names = [str(name) for name in interfaces] if isinstance(interfaces, list) else []
    best = own_address(others, environ, names)
    named = named_interfaces(environ)
    if best is None and named:
        there = ", ".join(sorted({entry.interface for entry in own_addresses()})) or "none"
        raise RankError(
            f"interfaces {named!r}: none of them has an address on {gethostname()}, where rank 0 is; there are {there}: mend "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        )
    if best is not None and (named or names):
        return [best]
    # A site's interfaces may be those of another partition: then the route decides.
    best = best or own_address(others, environ)
    return list(dict.fromkeys([*([best] if best else []), *reachable_addresses()]))


def _is_one_host(me: Rank, environ: Mapping[str, str]) -> bool:
    if in_slurm_step(environ):
        return environ.get("SLURM_STEP_NUM_NODES", "") == "1" and "," not in environ.get("SLURM_STEP_NODELIST", "")
    return me.local_world_size == me.world_size


def _other_nodes(environ: Mapping[str, str]) -> list[str]:
    own = {environ.get("SLURMD_NODENAME", ""), gethostname()}
    with contextlib.suppress(NodeListError):
        return [node for node in expand(environ.get("SLURM_STEP_NODELIST", "")) if node not in own]
    return []


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


def _dial_until(look: Callable[[], _Published | None], me: Rank, deadline: Deadline, words: str) -> TCPStore:
    """The store that rank 0 serves; it may begin to after we have begun to look.

    Raises:
        RankError: it did not within the time that the start has.
    """
    pause = 0.02
    problem = "rank 0 has not published its address; is that folder shared between the nodes, and did rank 0 start?"
    while True:
        published = look()
        if published is not None:
            store, problem = _dial(published, me.world_size, deadline.left_s())
            if store is not None:
                return store
        if deadline.is_over() or (problem.startswith(_NAMELESS) and deadline.spent_s() > _NAMELESS_S):
            spent_s = min(deadline.spent_s(), deadline.timeout_s)
            raise RankError(f"{words}: rank {me.rank} has not met it in {spent_s:.0f} s: {problem}")
        time.sleep(min(pause, deadline.left_s()))
        pause = min(pause * 1.5, 1.0)


def _dial(
    published: _Published, world_size: int, within_s: float, *, must_be_ours: bool = False
) -> tuple[TCPStore | None, str]:
    """The store at the first address that answers as it should; else what was wrong at the last."""
    problem = ""
    for host in published.hosts:
        problem = _refusal(host, published.port, min(_DIAL_S, within_s))
        if problem:
            continue
        store = _client(host, published.port, world_size, within_s)
        if store is None:
            problem = "something else than a store listens there; choose another port"
        elif (published.token or must_be_ours) and not store.check([_mark(published.token)]):
            problem = "the store of another run answers there; did rank 0 end?"
        else:
            return store, ""
    return None, problem


def _refusal(host: str, port: int, within_s: float) -> str:
    """Why no connection comes about, and what to do; "" if one does. torch would only say that it has timed out."""
    try:
        create_connection((host, port), within_s).close()
    except gaierror as error:
        return f"{_NAMELESS}: {error.strerror}; use one that every node knows, or an address"
    except TimeoutError:
        return "no answer; is that address on a network that all nodes share, and does a firewall let the port through?"
    except ConnectionRefusedError:
        return "nobody listens there; did rank 0 start, and is that its host?"
    except OSError as error:
        return f"{error.strerror or error}; is that address on a network that all nodes share?"
    return ""


def _client(host: str, port: int, world_size: int, within_s: float) -> TCPStore | None:
    """In a thread: torch waits for ever for the first word of a server that is not a store (measured with 2.13)."""
    made: list[TCPStore] = []

    def make() -> None:
        with contextlib.suppress(RuntimeError):
            timeout = timedelta(seconds=within_s)
            made.append(TCPStore(host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False))

    thread = threading.Thread(target=make, name="hpc_ds-dial", daemon=True)
    thread.start()
    thread.join(min(within_s, _ANSWER_S))
    return made[0] if made else None


def _cause(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text.rpartition("message: ")[2] or text
