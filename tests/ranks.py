"""Runs functions on N gloo processes of this machine, many checks in one spawn.

A spawn costs seconds, a check milliseconds: so a file hands all its cases to one ``run_cases``, and each test asks for
the outcome of its own. What takes the seconds is importing torch, N times on few cores: so the processes come from a
server that has imported it once, and has used none of it.

A group is destroyed when all have said goodbye, and only on success: a process that leaves while its peers talk aborts now
and then, and destroying after a failure can wait for peers that are gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What an outer job or launcher says about ranks must not reach ours.
FOREIGN_PREFIXES = ("SLURM_", "SBATCH_", "PMI", "OMPI_", "HPCDS_")
FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FOR_EVERY_RANK = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}

PRELOADED = ["pytest", "hpc_ds.engine.initialize", "torch._dynamo"]

COLLECTIVE_TIMEOUT = timedelta(seconds=90)
GRACE = timedelta(seconds=3)  # for the other ranks, once one has failed

APART = "the ranks are apart"  # a key of the store: some rank failed alone

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 400.0) -> list[Any]:
    """Run ``function(rank, *args)`` on ``world_size`` processes; returns what each of them returned, by rank.

    ``function`` is one of a module, and what it takes and returns can be pickled. A rank that fails fails the caller,
    with its traceback; one that hangs does so too, with the stacks of its threads.
    """
    (values,) = _run_worlds(world_size, [(function, args)], timeout_s)
    return values


def _run_worlds(world_size: int, calls: list[Case], timeout_s: float) -> list[list[Any]]:
    """Run each call on ranks of its own, all at the same time; returns the values of each, by rank."""
    with tempfile.TemporaryDirectory(prefix="hpc_ds-ranks-") as name:
        worlds = [Path(name, str(number)) for number in range(len(calls))]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ranks: dict[Path, Any] = {}  # the folder of each rank's files -> its process
        with _environment_of_ranks():
            for world, (function, args) in zip(worlds, calls, strict=True):
                world.mkdir()
                for rank in range(world_size):
                    told = (rank, world_size, world, timeout_s, function, args)
                    ranks[world / f"rank-{rank}"] = process = context.Process(target=_be_rank, args=told, daemon=True)
                    process.start()
        _wait_for_all(list(ranks.values()), timeout_s + GRACE.total_seconds())
        complaints = [_complaint(files, process) for files, process in ranks.items()]
        assert not any(complaints), "\n\n".join(filter(None, complaints))
        values = [pickle.loads(files.with_suffix(".value").read_bytes()) for files in ranks]  # noqa: S301 - our own
        return [values[first : first + world_size] for first in range(0, len(values), world_size)]


class Outcomes:
    """What came of each case: ``outcomes[name]`` is its values by rank, or an assertion that shows what failed."""

    def __init__(self, by_rank: list[dict[str, tuple[str | None, Any]]]) -> None:
        self._by_rank = by_rank

    def __getitem__(self, name: str) -> list[Any]:
        told = [of_rank.get(name, ("not run: an earlier case left the ranks apart", None)) for of_rank in self._by_rank]
        failures = [f"rank {rank}, case {name!r}:\n{error}" for rank, (error, _) in enumerate(told) if error]
        assert not failures, "\n\n".join(failures)
        return [value for _, value in told]


def run_cases(world_size: int, cases: Mapping[str, Case], timeout_s: float = 400.0, worlds: int = 1) -> Outcomes:
    """Run named cases, each ``(function, args)``, one after another on the same ranks.

    A case that fails on every rank does not keep the later ones from running; one that fails on some does, because the
    ranks no longer agree on what comes next. Ranks that talk wait for each other half of the time: with ``worlds=2`` two
    sets of ranks each take half of the cases, in their order, at the same time.
    """
    shares = [dict(list(cases.items())[number::worlds]) for number in range(min(worlds, len(cases)))]
    by_world = _run_worlds(world_size, [(_each_case, (share,)) for share in shares], timeout_s)
    return Outcomes([dict(ChainMap(*of_rank)) for of_rank in zip(*by_world, strict=True)])


def _each_case(rank: int, cases: dict[str, Case]) -> dict[str, tuple[str | None, Any]]:
    outcomes: dict[str, tuple[str | None, Any]] = {}
    store = dist.distributed_c10d._get_default_store()
    for name, (function, args) in cases.items():
        began = time.monotonic()
        try:
            outcomes[name] = None, function(rank, *args)
        except BaseException:  # noqa: BLE001 - a SystemExit of one case is a failure of that case
            outcomes[name] = traceback.format_exc(), None
        failed = outcomes[name][0] is not None
        if not _all_say(f"{name}: {'failed' if failed else 'passed'}", GRACE if failed else COLLECTIVE_TIMEOUT):
            store.set(APART, "")
        if store.check([APART]):
            break
        if rank == 0:
            print(f"{name}: {time.monotonic() - began:.2f} s", flush=True)
    return outcomes


def _all_say(word: str, timeout: timedelta) -> bool:
    """Whether all ranks say the same, asked through the store: a collective would meet one of a rank that is elsewhere."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{word}/{dist.get_rank()}", "")
    try:
        store.wait([f"{word}/{rank}" for rank in range(dist.get_world_size())], timeout)
    except RuntimeError:
        return False
    return True


def _be_rank(
    rank: int, world_size: int, folder: Path, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with (folder / f"rank-{rank}.stacks").open("w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stacks)
        torch.set_num_threads(1)
        os.environ.update(FOR_EVERY_RANK, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
        try:
            value = function(rank, *args)
            (folder / f"rank-{rank}.value").write_bytes(pickle.dumps(value))
        except BaseException:  # noqa: BLE001 - whatever it is, it is shown by the parent
            (folder / f"rank-{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
        if dist.distributed_c10d._get_default_store().check([APART]) or not _all_say("goodbye", COLLECTIVE_TIMEOUT):
            os._exit(0)  # another rank failed, and says so itself; those that wait for this one notice that it is gone
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()


@contextlib.contextmanager
def _environment_of_ranks() -> Iterator[None]:
    """Set what the server and its children must find before they import torch."""
    before = dict(os.environ)
    for name in before:
        if name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES):
            del os.environ[name]
    os.environ.update(FOR_EVERY_RANK)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait_for_all(processes: list[Any], timeout_s: float) -> None:
    """Wait; once one has failed the others have a grace to fail too, then they are killed."""
    deadline = time.monotonic() + timeout_s
    alive = list(processes)
    while alive and time.monotonic() < deadline:
        wait([process.sentinel for process in alive], max(0.0, deadline - time.monotonic()))
        alive = [process for process in alive if process.is_alive()]
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE.total_seconds())
    for process in alive:
        process.kill()
    for process in processes:
        process.join()


def _complaint(files: Path, process: Any) -> str | None:
    rank, error, stacks = files.name.replace("-", " "), files.with_suffix(".error"), files.with_suffix(".stacks")
    if process.exitcode == 0:
        return None
    if error.exists():
        return f"{rank} failed:\n{error.read_text()}"
    text = stacks.read_text() if stacks.exists() else ""
    return f"{rank} ended with exit code {process.exitcode} and told nothing\n{text}"
