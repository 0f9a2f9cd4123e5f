"""Python functions in jobs, through submitit: the only file that knows it.

submitit pickles a function, runs it on every rank of a job, and pickles what each returned. What it does at signals is
widened here, by what this house knows of Slurm:

| the job hears                             | a function with ``checkpoint()``           | any other              |
|-------------------------------------------|--------------------------------------------|------------------------|
| USR2: the time limit is near, or a warning | checkpoint, queued again (submitit)        | as submitit decides    |
| SIGTERM, and the job runs on: a preemption | the same; submitit alone ignores SIGTERM   | nothing: Slurm decides |
| SIGTERM, and the job is queued again       | checkpoint, without asking for another one | nothing                |
| SIGTERM of a cancel or of the limit        | nothing: it ends                           | nothing: it ends       |

A function that asks ``hpc_ds.preemption.requested()`` and leaves by ``Preempted`` has saved: it is queued again too, and
called with the same arguments.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import cloudpickle
import submitit
from submitit.core.utils import JobPaths, pickle_load

from hpc_ds.cluster.slurm import Slurm
from hpc_ds.errors import FunctionError, NoProgramError, SchedulerError, SubmitError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from hpc_ds.cluster.scheduler import JobState

COMMAND = ("-u", "-m", "submitit.core._submit")
"""What a rank runs, after its Python and before the folder of the job."""

_CHECKPOINTED = 75
_PATIENCE_S = 120.0
_TRIES, _BETWEEN_TRIES_S = 5, 0.5
_NO_LIMIT_MIN, _NO_END = 10**7, 10**6


class Call:
    """A function as it is called in its job."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        if callable(getattr(function, "checkpoint", None)):
            self.checkpoint = self._by_function

    def __reduce__(self) -> tuple[type[Call], tuple[Callable[..., Any]]]:
        return Call, (self.function,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, and stand between the scheduler's signals and submitit."""
        here = _Here()
        here.forget_earlier_result()
        here.listen(self)
        try:
            return self.function(*args, **kwargs)
        except SystemExit as leaving:
            if here.leaves:
                raise
            if leaving.code != _CHECKPOINTED:
                raise FunctionError(f"it left by SystemExit({leaving.code!r}); return instead") from leaving
            if not hasattr(self, "checkpoint"):
                self.checkpoint = self._again
            here.go_on_later()
            raise
        except Exception:
            if hasattr(self, "checkpoint"):
                here.be_silent_when_queued_again()  # of the others, when rank 0 has left
            raise

    def _by_function(self, *args: Any, **kwargs: Any) -> submitit.helpers.DelayedSubmission | None:
        ask = getattr(self.function, "__submitit_checkpoint__", None) or self.function.checkpoint  # type: ignore[attr-defined]
        later = ask(*args, **kwargs)
        if later is not None and not isinstance(later.function, Call):
            later.function = Call(later.function)
        return cast("submitit.helpers.DelayedSubmission | None", later)

    def _again(self, *args: Any, **kwargs: Any) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self, *args, **kwargs)


class _Here:
    """The rank of a job in which a function is called, and the handler that submitit has put there.

    Attributes:
        leaves: submitit has made up its mind about a signal, and ends this process.
    """

    def __init__(self) -> None:
        self._job = submitit.JobEnvironment()
        self._of_slurm = self._job.cluster == "slurm"
        self._warned = signal.getsignal(signal.SIGUSR2)  # submitit's
        self._call: Call | None = None
        self.leaves = False
        self._hears = False

    def forget_earlier_result(self) -> None:
        """Of an earlier start of the job: whoever waits must not take it for this one's."""
        self._job.paths.result_pickle.unlink(missing_ok=True)

    def listen(self, call: Call) -> None:
        """Hear the signals of this rank from now on, on behalf of a call."""
        self._call = call
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGUSR2, lambda _, frame: self._tell_submitit(frame))
        if self._of_slurm:
            signal.signal(signal.SIGTERM, self._hear_the_end)

    def _hear_the_end(self, _number: int, frame: FrameType | None) -> None:
        """SIGTERM comes again while the first is looked at, and when submitit has had the job queued again."""
        if self._job.global_rank == 0 and hasattr(self._call, "checkpoint") and not (self.leaves or self._hears):
            self._hears = True
            self._save_and_leave(frame)
            self._hears = False

    def go_on_later(self) -> None:
        """The function has saved: queue its job again, unless that is done or was cancelled."""
        if not self._of_slurm:
            self._tell_submitit(None)  # leaves, in rank 0
            return
        if self._job.global_rank == 0:
            self._save_and_leave(None)
            return
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:  # the start ends with rank 0, and all of it with the start
            time.sleep(0.2)
        raise FunctionError(
            f"rank {self._job.global_rank} was told to stop, and rank 0 was not; ask requested() on every rank, in a process group"
        )

    def be_silent_when_queued_again(self) -> None:
        """Wait for the end of a start that is over: an error in it says that others have left, and is no result."""
        end = time.monotonic() + _PATIENCE_S
        while self._of_slurm and self._fate() == "again" and time.monotonic() < end:
            time.sleep(5.0)

    def _save_and_leave(self, frame: FrameType | None) -> None:
        fate = self._fate()
        if fate == "runs":
            self._tell_submitit(frame)
        elif fate == "again" and callable(self._warned):
            self.leaves = True
            handler: submitit.core.job_environment.SignalHandler = getattr(self._warned, "__self__")  # noqa: B009 - a method
            handler.checkpoint_and_exit(signal.SIGTERM, frame)

    def _tell_submitit(self, frame: FrameType | None) -> None:
        if callable(self._warned):
            self.leaves = True
            self._warned(signal.SIGUSR2, frame)
            self.leaves = False  # it was not rank 0

    def _fate(self) -> str:
        """What becomes of this start: it ``runs`` on, the job is queued ``again``, or it ``ends``."""
        job = self._as_slurm_sees_it()
        if job is None:
            return "ends"
        if job.state == "RUNNING":
            return "runs"
        return "again" if job.restarts > int(os.environ.get("SLURM_RESTART_COUNT", "0")) else "ends"

    def _as_slurm_sees_it(self) -> JobState | None:
        for _ in range(_TRIES):
            try:
                return Slurm().show(self._job.job_id)
            except NoProgramError:
                return None
            except SchedulerError:  # a signal to all processes of a step reaches this scontrol too
                time.sleep(_BETWEEN_TRIES_S)
        return None


class _ToSlurm(submitit.SlurmExecutor):
    """submitit's executor, with a job script of ours: submitit's own cannot leave options out."""

    script: Path

    def _submit_command(self, command: str) -> submitit.SlurmJob[Any]:  # noqa: ARG002 - the script has it
        return self.job_class(folder=self.folder, job_id=Slurm().submit_script(self.script, []))


def why_it_cannot_travel(function: Callable[..., Any], args: Any, kwargs: Any) -> str | None:
    """Why a call cannot be pickled; None where it can."""
    try:
        cloudpickle.dump((function, args, kwargs), _Nowhere())
    except Exception as error:  # noqa: BLE001 - a user's class may raise anything
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


@dataclass(frozen=True, slots=True)
class Errand:
    """A call that is to be a job.

    Attributes:
        function: what to call.
        args: its arguments.
        kwargs: its keyword arguments.
        script: what sbatch gets, or every process of this machine is started by; its folder becomes the job's.
        ranks: how many processes call it.
        minutes: the time limit; None where there is none.
        lead_s: seconds before it at which they hear USR2.
        restarts: how often it goes on after a time limit; None: as often as it takes.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    script: Path
    ranks: int
    minutes: float | None
    lead_s: int
    restarts: int | None

    def send_to_slurm(self) -> str:
        """Queue it; returns its job id.

        Raises:
            SubmitError: sbatch refused it, or there is none.
        """
        try:
            executor = _ToSlurm(self.script.parent, max_num_timeout=self._time_limits)
        except RuntimeError as error:
            raise SubmitError(f"submitit: {error}; is this a machine of the cluster?") from error
        executor.script = self.script
        executor.update_parameters(time=self.minutes or _NO_LIMIT_MIN)
        return executor.submit(Call(self.function), *self.args, **self.kwargs).job_id

    def send_to_this_machine(self) -> submitit.LocalJob[Any]:
        """Start it; submitit watches over its processes."""
        executor = submitit.LocalExecutor(
            self.script.parent,
            max_num_timeout=self._time_limits,
            python=f"/bin/bash {shlex.quote(str(self.script))}",
        )
        executor.update_parameters(
            timeout_min=self.minutes or _NO_LIMIT_MIN, tasks_per_node=self.ranks, signal_delay_s=self.lead_s
        )
        return cast("submitit.LocalJob[Any]", executor.submit(Call(self.function), *self.args, **self.kwargs))

    @property
    def _time_limits(self) -> int:
        return _NO_END if self.restarts is None else self.restarts


def paths_of(folder: Path, job_id: str, rank: int) -> JobPaths:
    """The files of a rank, as submitit names them: ``result_pickle``, ``stdout``, ``stderr``."""
    return JobPaths(folder, job_id, rank)


def read_result(path: Path) -> tuple[str, Any]:
    """``("success", result)`` or ``("error", traceback)``.

    Raises:
        FunctionError: it cannot be read here.
    """
    try:
        outcome, value = pickle_load(path)
    except Exception as error:  # noqa: BLE001 - a user's class may raise anything
        raise FunctionError(
            f"result {str(path)!r}: cannot be read: {type(error).__name__}: {error}; mend its class"
        ) from None
    return outcome, value
