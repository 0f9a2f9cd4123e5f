"""All ranks of a start meet before they make a process group: who does not come, or should not have, is named.

Every rank writes into the store who and where it is. One that sees a contradiction says so, else rank 0 looks at all of
them when they have come; what is said first holds for all, so that every rank ends with the same sentence.

| refused                                           | because otherwise                                                |
|---------------------------------------------------|------------------------------------------------------------------|
| ranks that do not come in time                    | the others would hang, or torch says "timed out" of nobody       |
| a rank that came twice                            | the two train as one, and another rank is missing                |
| different world sizes                             | each waits for others than there are                             |
| one LOCAL_RANK, and the same devices, twice       | two ranks share a GPU, at half the speed or out of memory        |
| a LOCAL_RANK beyond the visible devices           | some ranks fail and the others wait for them                     |
| no local rank, several devices and ranks          | the device would be a guess                                      |

torchrun's store outlives a start: rank 0 opens a meeting with a new number, and the others go to the newest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.distributed import PrefixStore  # type: ignore[attr-defined] # torch's stubs leave it out

from hpc_ds.errors import RankError
from hpc_ds.launch.address import interface_towards, is_own, network, route_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import Store  # type: ignore[attr-defined]

    from hpc_ds.runtime.rank import Rank
    from hpc_ds.runtime.rendezvous import Deadline, Place

_starts = itertools.count()
_MOST_NAMED = 20
_FIRST_PAUSE_S = 0.01
_PAUSE_S = 0.1
_HEAR_S = 10.0
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


class Met(NamedTuple):
    """What the meeting came to.

    Attributes:
        me: this rank, placed on its node.
        store: for the process group; no other start has written there.
        interface: by which this rank reaches the others; "" where all are on one host, or nobody knows.
    """

    me: Rank
    store: Store
    interface: str


def meet(me: Rank, place: Place, deadline: Deadline, devices: int) -> Met:
    """Collective. Wait for all ranks of this start.

    Args:
        me: this rank.
        place: where they meet.
        deadline: of the start.
        devices: accelerators that this process sees and will use; 0 for a backend without.

    Raises:
        RankError: they did not all come, or do not fit together; the same words on every rank.
    """
    base = f"hpc_ds/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_starts)}"
    try:
        said, store = _hear(me, place, deadline, devices, PrefixStore(base, place.store))
    except RuntimeError as error:  # DistNetworkError: the connection is gone
        raise RankError(
            f"{place.words}: it went away before all ranks had come; look at what rank 0 said last"
        ) from error
    if me.rank == 0:
        place.close()
    if "refused" in said:
        raise RankError(said["refused"])
    here = said["placed"].get(str(me.rank))
    if here is not None:
        me = replace(me, local_rank=here[0], local_world_size=here[1], placed=True)
    return Met(me, PrefixStore(f"world/{said['word']}", store), _interface(said, place))


def _hear(me: Rank, place: Place, deadline: Deadline, devices: int, base: Store) -> tuple[dict[str, Any], Store]:
    """What is said at the meeting that this rank belongs to, and the store of that meeting."""
    number = 0
    if place.is_older and me.rank == 0:
        base.add("opened", 1)
    while True:
        newest = base.add("opened", 0) if place.is_older else 1
        if newest > number:
            number = newest
            store = PrefixStore(f"meeting/{number}", base)
            # One whose end was said is of a start before: this rank belongs to the next.
            if not (place.is_older and me.rank != 0 and store.check(["said"])):
                _come(me, place, devices, store)
                if _wait(me, place, deadline, base, number):
                    return _listen_to(me, place, store), store
        elif deadline.is_over():
            raise RankError(f"{place.words}: rank 0 did not come within {deadline.timeout_s:g} s; did it start?")
        time.sleep(_PAUSE_S)


def _come(me: Rank, place: Place, devices: int, store: Store) -> None:
    """Write down who this is, and say so if another was there who cannot be."""
    entry = _entry(me, place, devices)
    size = store.compare_set("world_size", "", str(me.world_size)).decode()
    times = store.add(f"times/{me.rank}", 1)
    store.set(f"came/{me.rank}" if times == 1 else f"again/{me.rank}", json.dumps(entry))
    if size != str(me.world_size):
        others = [rank for rank in range(int(size)) if store.check([f"came/{rank}"]) and rank != me.rank]
        _say(store, {"refused": (
            f"WORLD_SIZE {me.world_size} on rank {me.rank} ({entry['host']}): {_names(others)} "
            f"{'say' if len(others) > 1 else 'says'} {size}; start all ranks with one launcher, or give all the same"
        )})  # fmt: skip
    elif times > 1 and not place.is_older:  # torchrun numbers the ranks: what is there is of a start that was cut short
        first = json.loads(store.get(f"came/{me.rank}"))
        _say(store, {"refused": (
            f"rank {me.rank}: came twice, as process {first['pid']} on {first['host']} and as process {entry['pid']} on "
            f"{entry['host']}; is RANK or another variable of the launcher set by hand, in the shell or the job script?"
        )})  # fmt: skip
    elif times == 1:
        store.add("came", 1)


def _entry(me: Rank, place: Place, devices: int) -> dict[str, Any]:
    environ = os.environ
    names = ("SLURMD_NODENAME", "SLURM_NODEID", "SLURM_JOB_ID")
    node = [environ.get(name, "") for name in names] if me.source == "slurm" else [environ.get("SLURMD_NODENAME", "")]
    group = environ.get("GROUP_RANK", environ.get("CROSS_RANK", "")) if me.source == "env" else ""
    return {
        "rank": me.rank,
        "local_rank": me.local_rank if me.placed else None,
        "source": me.source,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "network": network(),
        "node": [os.uname().nodename, network(), *node, group],
        "devices": devices,
        "visible": [environ.get(name, "") for name in _VISIBLE],
        "address": route_source([place.address]),
    }


def judge(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said to all: why they are refused, or where those are that no launcher has placed.

    Args:
        entries: one a rank, by rank.
    """
    nodes: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        nodes[tuple(entry["node"])].append(entry)
    placed: dict[int, tuple[int, int]] = {}
    for here in nodes.values():
        refused = _refuse_shared(here) or _refuse_beyond(here) or _refuse_unplaced(here)
        if refused:
            return {"refused": refused}
        if any(entry["local_rank"] is None for entry in here):
            placed |= {entry["rank"]: (index, len(here)) for index, entry in enumerate(here)}
    elsewhere = [entry["address"] for entry in entries if entry["network"] != entries[0]["network"]]
    return {"word": secrets.token_hex(8), "placed": placed, "several": bool(elsewhere), "elsewhere": elsewhere[:1],
            "network": entries[0]["network"]}  # fmt: skip


def _refuse_shared(here: list[dict[str, Any]]) -> str:
    having: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for entry in here:
        if entry["local_rank"] is not None:
            key = (entry["local_rank"], *entry["visible"])
            having[key].append(entry["rank"])
    for (local_rank, *_), ranks in having.items():
        if len(ranks) > 1:
            return (
                f"LOCAL_RANK {local_rank}: {_names(ranks)} on {here[0]['host']} all have it, and would use the same device; let "
                "the launcher set it, or count the ranks of each node from 0"
            )
    return ""


def _refuse_beyond(here: list[dict[str, Any]]) -> str:
    for entry in here:
        if 1 < entry["devices"] <= (entry["local_rank"] or 0):
            return (
                f"LOCAL_RANK {entry['local_rank']} of rank {entry['rank']} on {entry['host']}: it sees {entry['devices']} "
                "devices; start no more ranks on a node than it has devices, or use dist_backend='gloo'"
            )
    return ""


def _refuse_unplaced(here: list[dict[str, Any]]) -> str:
    lost = [entry["rank"] for entry in here if entry["local_rank"] is None and entry["devices"] > 1]
    if lost and len(here) > 1:
        return (
            f"{_names(lost)} on {here[0]['host']}: nothing says which of its {here[0]['devices']} devices each of "
            f"{len(here)} ranks uses; set LOCAL_RANK, or let MPI be asked (auto_mpi_discovery=True, and mpi4py)"
        )
    return ""


def _wait(me: Rank, place: Place, deadline: Deadline, base: Store, number: int) -> bool:
    """Until something is said in a meeting; False once a newer one is open."""
    store = PrefixStore(f"meeting/{number}", base)
    pause, most = _FIRST_PAUSE_S, _PAUSE_S * (1 + me.world_size / 1000)  # rank 0 answers them all
    while not store.check(["said"]):
        if place.is_older and base.add("opened", 0) > number:
            return False
        if me.rank == 0 and store.add("came", 0) == me.world_size:
            came = store.multi_get([f"came/{rank}" for rank in range(me.world_size)])
            _say(store, judge([json.loads(text) for text in came]))
        elif deadline.is_over():
            absent = [rank for rank in range(me.world_size) if not store.check([f"came/{rank}"])]
            _say(store, {"refused": (  # where all have come, it is rank 0 that has ended since
                f"{_names(absent or [0])} of {me.world_size}: did not come within {deadline.timeout_s:g} s; {place.words}; look "
                f"at their logs and whether they started{_hint(place)}"
            )})  # fmt: skip
        else:
            time.sleep(pause)
            pause = min(pause * 1.5, most)
    return True


def _hint(place: Place) -> str:
    """What else may have kept the others away."""
    if not place.address or is_own(place.address):
        return ""
    return f", and whether {place.address!r} is rank 0's host: it is not {os.uname().nodename}"


def _say(store: Store, words: Mapping[str, Any]) -> None:
    store.compare_set("said", "", json.dumps(words))


def _listen_to(me: Rank, place: Place, store: Store) -> dict[str, Any]:
    """What was said first. Rank 0, which serves the store, stays until those that came have heard why they are refused."""
    said: dict[str, Any] = json.loads(store.get("said"))
    store.add("heard", 1)
    if "refused" in said and me.rank == 0 and not place.is_older:
        due = time.monotonic() + _HEAR_S
        with contextlib.suppress(RuntimeError):  # of two that are rank 0 one serves, and may have gone
            came = sum(store.add(f"times/{rank}", 0) for rank in range(me.world_size))
            while store.add("heard", 0) < came and time.monotonic() < due:
                time.sleep(_FIRST_PAUSE_S)
    return said


def _interface(said: Mapping[str, Any], place: Place) -> str:
    if not said["several"]:
        return ""
    is_with_rank_0 = said["network"] == network()
    other = said["elsewhere"][0] if is_with_rank_0 else place.address
    return (interface_towards(other) or "") if other else ""


def _names(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
