"""``python -m hpc_ds.runtime.doctor``: one rank of the doctor. It looks, meets the others, measures, and judges nothing.

What it finds is its *record*, told again at the begin of each phase, so that of a rank that hangs or dies it is known
where: as ``FOLDER/rank-R.json``, or without a folder as a line on stdout that begins with ``MARK``. Whoever started the
ranks has the records of all of them and judges (``runtime/verdict.py``).

| phase     | what                                                                                       |
|-----------|--------------------------------------------------------------------------------------------|
| looking   | versions, memory, folders, cores, limits, GPUs: alone, each with a time limit              |
| meeting   | ``init_distributed``, as a training does it                                                |
| measuring | clocks, speed, links, all-reduce; again while a node seems slow, at most three times       |
| mpi       | under signs of MPI: whether mpi4py knows the same world; last, because MPI may end a rank   |
| done      |                                                                                            |

It exits with 0 when it came to its end, whatever it found; with 1 when it could not join the others, so that they are
ended and do not wait for it; with 75 when it was asked to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.process import node_name
from hpc_ds.errors import HpcdsError, RankError
from hpc_ds.run_dir import write_json
from hpc_ds.runtime import node_facts
from hpc_ds.runtime.compare import rates, slower
from hpc_ds.runtime.rank import Rank, rank_from_environment
from hpc_ds.runtime.verdict import MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ROUNDS = 3
_MEETING_SHARE = 0.5  # of the time limit
_SHM = "/dev/shm"  # noqa: S108 - what data loaders hand tensors over in
_SCRATCH = ("TMPDIR", "SLURM_TMPDIR", "LOCAL_SCRATCH")  # what clusters call the disk of a node
_TOLD_TO_STOP = 75
_ALONE = {"torch", "meeting", "measuring"}  # what went wrong, where a rank is no longer with the others


class Record:
    """What this rank has found so far, told at each phase."""

    def __init__(self, me: Rank, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"rank-{me.rank}.json"
        self._lock = threading.Lock()
        self.data: dict[str, Any] = {
            "rank": me.rank,
            "local_rank": me.local_rank,
            "world_size": me.world_size,
            "source": me.source,
            "node": node_name(),
            "pid": os.getpid(),
            "phase": "looking",
            "doing": "",
            "seconds": {},
            "errors": {},
        }
        self._begin = time.monotonic()

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        now = time.monotonic()
        if self.data["doing"]:
            self.data["seconds"][self.data["phase"]] = round(now - self._begin, 3)
        self._begin = now
        self.data |= {"phase": phase, "doing": phase}
        self.tell()

    def tell(self) -> None:
        """Write down what is known, or print it."""
        with self._lock, contextlib.suppress(OSError):  # a folder that cannot be written: the log says so
            if self._path is not None:
                write_json(self._path, self.data, durable=False)
            else:
                os.write(1, f"{MARK}{json.dumps(self.data)}\n".encode())

    def note(self, what: str, look: Callable[[], Any]) -> None:
        """Look at something; what it raises is a finding too."""
        self.data["doing"] = what
        try:
            self.data[what] = look()
        except (HpcdsError, RuntimeError, OSError, ValueError, ImportError) as error:
            self.fail(what, error)

    def fail(self, what: str, error: BaseException) -> None:
        """Note an error in the place of what was looked for."""
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        self.data["errors"][what] = first if isinstance(error, HpcdsError) else f"{type(error).__name__}: {first}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one rank; returns its exit code.

    Raises:
        RankError: the environment does not say which rank this is.
    """
    options = _options(arguments)
    me = rank_from_environment(os.environ) or Rank(0, 0, 1, 1, "single")
    record = Record(me, options.folder)
    record.enter("looking")
    clock = threading.Timer(options.limit, _give_up, (record,))
    clock.daemon = True
    clock.start()
    _look(record, me, options.look_at)
    met = _meet(record, options.limit * _MEETING_SHARE)
    if met is not None:
        _measure(record)
    _ask_mpi(record)
    record.enter("done")
    clock.cancel()
    if _ALONE & set(record.data["errors"]):
        sys.stderr.flush()
        os._exit(1)  # the others are elsewhere: no goodbye would come to an end
    return _TOLD_TO_STOP if _told_to_stop() else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hpc_ds.runtime.doctor", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="where records are written; default: lines on stdout")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="for all of it")
    parser.add_argument(
        "--look-at", action="append", default=[], metavar="FOLDER", help="must have room, and be writable"
    )
    return parser.parse_args(arguments)


def _give_up(record: Record) -> None:
    try:
        record.data["stuck"] = True
        record.tell()
    finally:  # whatever the main thread does with the record meanwhile
        os._exit(1)


def _told_to_stop() -> bool:
    loaded = sys.modules.get("hpc_ds.runtime.preemption")
    return loaded is not None and bool(loaded.told_to_stop())


def _look(record: Record, me: Rank, folders: Sequence[str]) -> None:
    """Alone."""
    record.note("versions", node_facts.versions)
    record.note("memory", node_facts.memory)
    record.note("cores", node_facts.cores)
    record.note("limits", node_facts.limits)
    record.note("infiniband", node_facts.infiniband)
    if me.local_rank == 0 or me.source == "pmi":  # which may not say who is the first of a node
        scratch = [os.environ[name] for name in _SCRATCH if os.environ.get(name)] or [tempfile.gettempdir()]
        places = dict.fromkeys([*folders, *scratch, *([_SHM] if Path(_SHM).exists() else [])])
        record.data["folders"] = []
        for place in places:
            record.data["doing"] = f"writing to {place}"
            record.data["folders"].append(node_facts.folder(place))
    record.data["doing"] = "loading torch"
    record.tell()
    try:
        from hpc_ds.runtime import gpu_facts
    except (ImportError, OSError) as error:
        record.fail("torch", error)
        return
    record.data["versions"] |= gpu_facts.versions()
    record.note("gpus", gpu_facts.gpus)
    if record.data.get("gpus"):
        record.note("own_gpu", lambda: gpu_facts.own_gpu(me.local_rank))


def _meet(record: Record, timeout_s: float) -> Rank | None:
    """Collective. The process group, as a training makes it; None where it could not be made."""
    if "torch" in record.data["errors"]:
        return None
    from hpc_ds.runtime.process_group import init_distributed

    record.enter("meeting")
    try:
        me = init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    except (HpcdsError, RuntimeError, OSError, ValueError) as error:
        record.fail("meeting", error)
        return None
    record.data |= {"rank": me.rank, "local_rank": me.local_rank, "world_size": me.world_size, "source": me.source}
    return me


def _measure(record: Record) -> None:
    """Collective."""
    import torch

    from hpc_ds.runtime import measure

    record.enter("measuring")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    record.data["device"] = device.type
    try:
        nodes = measure.ranks_by_node(measure.meet(record.data["node"]))
        record.data["clock"] = measure.clock(nodes)
        for _ in range(_ROUNDS):
            _keep_the_best(record.data, measure.speed(device), measure.links(nodes, device))
            told = [one for one in measure.meet(_part(record.data)) if one is not None]
            if not any(map(slower, rates(told).values())):  # all ranks see the same, so all go on or none
                break
        if len(nodes) > 1 or record.data["world_size"] > 1:
            record.data["all_reduce"] = measure.all_reduce(device)
        measure.meet(None)
    except (RuntimeError, ValueError) as error:
        record.fail("measuring", error)


def _part(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("rank", "node", "speed", "links")}


def _keep_the_best(data: dict[str, Any], speed: dict[str, float], links: list[dict[str, float]]) -> None:
    """Of several rounds: other work on a node can only make it look slower than it is."""
    before = data.get("speed", speed)
    data["speed"] = {
        "matmul_s": min(before["matmul_s"], speed["matmul_s"]),
        "memory_gb_s": max(before["memory_gb_s"], speed["memory_gb_s"]),
    }
    rate = {link["from"]: link["gb_s"] for link in data.get("links", ())}
    data["links"] = [{**link, "gb_s": max(link["gb_s"], rate.get(link["from"], 0.0))} for link in links]


def _ask_mpi(record: Record) -> None:
    """Whether MPI, where there are signs of one, knows this rank."""
    signs = node_facts.mpi_signs()
    if not signs or "mpi4py" not in record.data.get("versions", {}):
        return
    record.data["mpi_signs"] = signs
    record.enter("mpi")
    from hpc_ds.runtime import mpi

    try:
        record.data["mpi"] = mpi.world()
    except RankError as error:
        record.data["mpi"] = {"error": str(error)}


if __name__ == "__main__":
    sys.exit(main())
