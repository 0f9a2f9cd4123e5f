"""The request to stop, and what a run hears of this rank. ``hpc_ds.preemption`` is this module.

Nothing is done in a handler. Python runs handlers in the main thread between bytecodes only, a rank may be told a
step earlier than the others, and a save is a collective: so the handler sets a flag, the engine sums the flags of all
ranks in the one collective of its step, and all of them stop at the same boundary. One rank told is enough.

A loop without the engine asks ``requested()`` once a step, saves where it says so, and leaves by ``raise Preempted``.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, SupportsFloat

from hpc_ds.run_dir import RunDir
from hpc_ds.runtime.descent import become_the_rank, run_around, run_of_this_process
from hpc_ds.runtime.failures import tell_of_errors
from hpc_ds.runtime.leaving import leaving
from hpc_ds.runtime.progress import mark, progress
from hpc_ds.runtime.rank import rank_from_environment
from hpc_ds.runtime.request import request as _request
from hpc_ds.runtime.request import signals_of, signals_of_run
from hpc_ds.runtime.run import CurrentRun
from hpc_ds.runtime.watcher import Watcher

if TYPE_CHECKING:
    from types import ModuleType

EXIT_CODE = 75


class Preempted(SystemExit):
    """The run was told to stop and has been saved: it ends with exit code 75, which means start me again."""

    def __init__(self, message: str = "") -> None:
        super().__init__(EXIT_CODE)
        self.message = message
        leaving.hurry()

    def __str__(self) -> str:
        return self.message or "checkpointed on request"


# of loops without the engine


def requested() -> bool:
    """Whether any rank was told to stop. Collective: call it on every rank, once a step; all get the same answer.

    The first call begins to listen to SIGTERM and to the run's warning signal (USR2 outside of a run). Where it says yes, save
    and ``raise hpc_ds.Preempted``.
    """
    _own_loop.begin()
    mark("asking")
    told = _on_any_rank(told_to_stop())
    if told:
        progress.stop()
    else:
        mark("training")
    return told


def step(number: int, loss: SupportsFloat | None = None) -> None:
    """Tell the run of a step: then its status, its crash policy and its watch over hangs know this loop as they know the engine.

    Call it on every rank; rank 0 writes. Outside of a run it does nothing.

    Args:
        number: optimizer steps taken so far, those before a restart included.
        loss: to be shown; a tensor on a device is waited for.
    """
    seconds = _own_loop.seconds_since_last_step()
    progress.step = number
    mark("training")
    value = math.nan if loss is None else float(loss)
    shown = value if math.isfinite(value) else None
    _own_loop.record("step", step=number, loss=shown, lr=None, grad_norm=None, seconds=round(seconds, 6))


def saved(number: int, seconds: float | None = None) -> None:
    """Tell the run that a step is durable: what comes after it is lost where a rank dies.

    Call it on every rank; rank 0 writes. Outside of a run it does nothing.

    Args:
        number: the step.
        seconds: what saving took, where the loop knows.
    """
    mark(progress.phase)
    _own_loop.record("saved", step=number, tag=None, seconds=seconds, stall_s=seconds)


class _OwnLoop:
    """What a loop without the engine has told so far."""

    def __init__(self) -> None:
        self._began = False
        self._run: CurrentRun | None = None
        self._last_step = time.monotonic()

    def begin(self) -> None:
        if self._began:
            return
        self._began = True
        self._run = CurrentRun.from_environment()
        listen(anywhere=True)
        if self._run is not None:
            attend(*_own_rank())

    def seconds_since_last_step(self) -> float:
        now, before = time.monotonic(), self._last_step
        self._last_step = now
        return now - before

    def record(self, event: str, **fields: Any) -> None:
        self.begin()
        if self._run is not None and _own_rank()[0] == 0:
            self._run.record(event, **fields)


_own_loop = _OwnLoop()


def _process_group() -> ModuleType | None:
    """``torch.distributed``, where this process has a group; torch is not loaded to find out."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _own_rank() -> tuple[int, int]:
    """Rank and world size."""
    dist = _process_group()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    found = rank_from_environment(os.environ)
    return (0, 1) if found is None else (found.rank, found.world_size)


def _on_any_rank(told: bool) -> bool:
    """Collective."""
    dist = _process_group()
    if dist is None:
        return told
    import torch

    devices = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    flag = torch.tensor([told], dtype=torch.int32, device="cpu" if "cpu" in devices else devices[0])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


# of the engine and the process group


def listen(*, anywhere: bool = False) -> None:
    """Take SIGTERM and the run's warning signal as a request to stop, from now on. Only in a run of hpcds.

    Outside of one nobody would start the script again, so its signals keep their meaning.

    Args:
        anywhere: outside of a run too, SIGTERM and SIGUSR2: the script has asked for it.
    """
    outside = {signal.SIGTERM, signal.SIGUSR2} if anywhere else set()
    _request.listen(signals_of_run() or outside)


_watcher: Watcher | None = None


def attend(rank: int, world_size: int) -> None:
    """In a run: give signs of life from now on, and tell of an error that ends this rank. Again: the rank is another.

    A process that a rank has started is none, and is left alone.
    """
    global _watcher  # noqa: PLW0603 - one a process
    root = run_of_this_process()
    if root is None:
        return
    become_the_rank()
    files, attempt = RunDir(root), int(os.environ.get("HPCDS_ATTEMPT", "0"))
    tell_of_errors(files.failures(attempt), rank)
    if _watcher is None or _watcher.pid != os.getpid():
        _watcher = Watcher(files, attempt, rank, world_size, _request)
        _watcher.start()
    _watcher.rank = rank


def told_to_stop() -> bool:
    """Whether this rank was told to stop. Others may not have been yet: agree before acting on it."""
    return _request.is_due()


def seconds_left() -> float:
    """Seconds until this rank may be killed, once it was told to stop; infinite where nobody knows."""
    return _request.seconds_left()


def told_by() -> str:
    """What told this rank: a signal's name, "deadline", or "another rank"."""
    return _request.by or "another rank"


def ignore_in_worker(_worker: int) -> None:
    """``worker_init_fn`` of data loaders: Slurm signals them too, and the rank ends them itself."""
    for number in signals_of(run_around()):
        signal.signal(number, signal.SIG_IGN)
