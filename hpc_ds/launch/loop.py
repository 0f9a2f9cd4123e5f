"""The launcher's loop: descriptors, timers and signals, and an intake that can be stopped while the rest goes on."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import signal
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Loop:
    """What is watched, and what is called when it has something.

    Attributes:
        paused: nothing is taken in.
        only: the one descriptor that is taken in; None: all.
    """

    def __init__(self) -> None:
        self._control = selectors.EpollSelector()
        self._intake = selectors.EpollSelector()
        self._single = selectors.EpollSelector()
        self._open: selectors.EpollSelector | None = None
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)  # noqa: FBT003 - not ours
        self._control.register(self._woken, selectors.EVENT_READ, self._empty)
        self._signals = bytearray()
        self.paused = False
        self.only: int | None = None

    def watch(self, descriptor: int, call: Callable[[], object], events: int = selectors.EVENT_READ) -> None:
        """Call something whenever a descriptor is ready."""
        self._control.register(descriptor, events, call)

    def forget(self, descriptor: int) -> None:
        """Watch a descriptor no more."""
        with contextlib.suppress(KeyError):
            self._control.unregister(descriptor)

    def take(self, descriptor: int, call: Callable[[], object]) -> None:
        """Call something whenever a descriptor can be read, unless the intake is stopped."""
        self._intake.register(descriptor, selectors.EVENT_READ, call)

    def leave(self, descriptor: int) -> None:
        """Take nothing in from a descriptor any more."""
        with contextlib.suppress(KeyError):
            self._intake.unregister(descriptor)
        with contextlib.suppress(KeyError):
            self._single.unregister(descriptor)
        if self.only == descriptor:
            self.only = None

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something once, after some time."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), call))

    def wake(self) -> None:
        """End the wait of a turn, from any thread."""
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _empty(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._signals += self._woken.recv(4096).replace(b"\0", b"")

    @contextlib.contextmanager
    def catching(self, numbers: Iterable[signal.Signals]) -> Iterator[None]:
        """Let signals, and SIGCHLD, be returned by ``turn``.

        SIGHUP stays ignored where it is, below nohup; but shells ignore SIGINT for what they start in the background.
        """
        caught = {*numbers, signal.SIGCHLD}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            caught.discard(signal.SIGHUP)
        wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda _number, _frame: None) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(wakeup)

    def turn(self) -> list[signal.Signals]:
        """Wait for something, call what is to be called; the signals that came."""
        self._set_intake()
        wait = max(self._timers[0][0] - time.monotonic(), 0.0) if self._timers else None
        for key, _ in self._control.select(wait):
            if isinstance(key.data, selectors.EpollSelector):
                self._take_in(key.data)
            else:
                key.data()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        signals = [signal.Signals(number) for number in self._signals]
        self._signals.clear()
        return signals

    def _set_intake(self) -> None:
        wanted = None if self.paused else self._intake
        if wanted is not None and self.only is not None:
            wanted = self._single
            if self.only not in self._single.get_map():
                for key in list(self._single.get_map().values()):
                    self._single.unregister(key.fileobj)
                self._single.register(self.only, selectors.EVENT_READ, self._intake.get_key(self.only).data)
        if wanted is not self._open:
            if self._open is not None:
                self._control.unregister(self._open.fileno())
            if wanted is not None:
                self._control.register(wanted.fileno(), selectors.EVENT_READ, wanted)
            self._open = wanted

    def _take_in(self, source: selectors.EpollSelector) -> None:
        for key, _ in source.select(0):
            if self.paused or (self.only is not None and key.fd != self.only):
                return
            key.data()

    def close(self) -> None:
        """Close what belongs to the loop itself."""
        for selector in (self._control, self._intake, self._single):
            selector.close()
        self._woken.close()
        self._wake.close()
