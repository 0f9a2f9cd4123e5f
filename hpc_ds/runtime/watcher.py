"""The watcher: a thread that speaks for a rank whose main thread may be blocked in a collective or a long kernel.

It gives signs of life (beats), hears signals, looks at the supervisor's deadline, and writes the stacks of all threads when
it is asked to, or when the end is near and the rank has not come to a boundary: then they are the reason why nothing
was saved.

Python runs signal handlers in the main thread only, between two bytecodes. But the interpreter's own handler, in C, also writes
the signal's number to a pipe (``signal.set_wakeup_fd``), and the watcher sleeps at its other end. Where a script, or asyncio
in it, has taken that place, signals are heard by the handler alone.

The thread takes no lock, so a fork cannot find one taken, and does nothing with torch. What it writes is small, and a
folder that cannot be written costs a beat and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from hpc_ds.cluster.process import node_name
from hpc_ds.runtime.main_thread import MainThread
from hpc_ds.runtime.progress import mark, progress

if TYPE_CHECKING:
    from hpc_ds.run_dir import RunDir

BEAT_BYTES = 512
BEAT_EVERY_S = 2.0
_RANKS_A_SECOND = 50
_LONGEST_BEAT_S = 30.0
_LONGEST_QUESTION_S = 4.0  # between two looks for a request of stacks: the supervisor waits for them only so long
_LOOK_EVERY_S = 1.0  # once this rank was told to stop
_NEAR_S = 5.0
_GOODBYE_S = 5.0


class Told(Protocol):
    """The part of a request to stop that the watcher sees."""

    by: str | None
    watched: bool

    @property
    def signals(self) -> set[signal.Signals]:
        """Those that are listened to."""

    def hear(self, number: int) -> None:
        """Take note of a signal."""

    def look_at_the_clock(self) -> None:
        """Read the supervisor's deadline now and then."""

    def seconds_left(self) -> float:
        """Seconds until this rank may be killed."""


class Watcher:
    """The watcher of this process.

    Attributes:
        pid: the process it was started in; a forked child has none.
        rank: whose beats these are.
    """

    def __init__(self, files: RunDir, attempt: int, rank: int, world_size: int, told: Told) -> None:
        self.pid = os.getpid()
        self.rank = rank
        self._files = files
        self._attempt = attempt
        self._told = told
        self._every_s = min(max(BEAT_EVERY_S, world_size / _RANKS_A_SECOND), _LONGEST_BEAT_S)
        self._host = node_name()
        self._count = 0
        self._said: str | None = None  # what told this rank, as the last beat had it
        self._beat_at = self._asked_at = 0.0
        self._dumped: set[str] = set()
        self._main = MainThread()
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="hpc_ds watcher", daemon=True)

    def start(self) -> None:
        """Begin to watch, until the interpreter ends."""
        if threading.current_thread() is threading.main_thread():
            self._hear_from(self._writer)
        self._told.watched = True
        self._thread.start()
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)

    def _hear_from(self, writer: int) -> None:
        """Have the interpreter write the numbers of signals; a descriptor that is there already stays."""
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if before not in {-1, self._writer}:
            signal.set_wakeup_fd(before)

    def _forget(self) -> None:
        """In a forked child: its signals are not this rank's."""
        self._hear_from(-1)

    def stop(self) -> None:
        """End the thread, and tell how far this rank has come."""
        if os.getpid() != self.pid or self._stopped:
            return
        self._hear_from(-1)
        self._stopped = True
        os.write(self._writer, b"\0")
        self._thread.join(_GOODBYE_S)
        if getattr(sys, "last_value", None) is None and not progress.stopping:
            mark("finished")
        if not self._thread.is_alive():
            self._beat(time.monotonic())

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            self._told.watched = False  # the main thread looks at the clock itself

    def _watch(self) -> None:
        for folder in (self._files.beats(self._attempt), self._files.stacks(self._attempt)):
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
        while not self._stopped:
            self._told.look_at_the_clock()
            now = time.monotonic()
            if now >= self._beat_at or self._told.by != self._said:
                self._beat(now)
            if now >= self._asked_at:
                self._asked_at = now + min(self._every_s, _LONGEST_QUESTION_S)
                if self._is_asked_for_stacks():
                    self._dump("asked for by the supervisor")
            if self._told.by is not None and not progress.stopping and self._told.seconds_left() < _NEAR_S:
                self._dump(f"told to stop by {self._told.by}, and the end is near")
            self._sleep()

    def _sleep(self) -> None:
        """Wait for a signal, or until it is time for something."""
        wait_s = min(self._beat_at - time.monotonic(), BEAT_EVERY_S if self._told.by is None else _LOOK_EVERY_S)
        if select.select([self._reader], [], [], max(wait_s, 0.0))[0]:
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._reader, BEAT_BYTES):
                    if number in self._told.signals:
                        self._told.hear(number)

    def _beat(self, now: float) -> None:
        """Write where this rank is: in place and at once, so that a reader sees the old line or the new one, or half of one."""
        self._beat_at = now + self._every_s
        self._said = self._told.by
        self._count += 1
        still_s = self._main.look(now) if threading.current_thread() is self._thread else 0.0
        beat = {
            "rank": self.rank,
            "host": self._host[:64],
            "pid": self.pid,
            "count": self._count,
            "step": progress.step,
            "phase": progress.phase[:20],
            "idle_s": round(now - progress.at, 1),
            "still_s": round(still_s, 1),
            "told": self._said,
            "where": self._main.where[-120:],
        }
        line = json.dumps(beat)
        if len(line) >= BEAT_BYTES:  # of letters that JSON writes with six
            line = json.dumps({**beat, "where": ""})
        whole = line.encode().ljust(BEAT_BYTES - 1) + b"\n"
        path = self._files.beats(self._attempt) / f"rank-{self.rank}.json"
        with contextlib.suppress(OSError):
            # Opened each time: on NFS others see what was written when the file is closed.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(descriptor, whole, 0)
            finally:
                os.close(descriptor)

    def _is_asked_for_stacks(self) -> bool:
        try:
            return self._files.dump_request(self._attempt).exists()
        except OSError:  # a file server that does not answer as it should
            return False

    def _dump(self, why: str) -> None:
        """Write the stacks of all threads, once for each reason."""
        if why in self._dumped:
            return
        self._dumped.add(why)
        path = self._files.stacks(self._attempt) / f"rank-{self.rank}.txt"
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(
                f"rank {self.rank} on {self._host}, pid {self.pid}, {at}: {why}; step {progress.step}, phase "
                f"{progress.phase}, main thread at {self._main.where}\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("end of the stacks\n\n")
