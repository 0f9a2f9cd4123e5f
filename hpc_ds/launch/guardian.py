"""A parent that waits for one child and ends all that is left below when it has ended, however that was."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING

from hpc_ds.cluster import process

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE_S = 10.0


def guarded(work: Callable[[], int], close: Sequence[int]) -> int:
    """Do some work in a child, and see that nothing of it is left; returns its exit status.

    Both adopt the orphans below them. The child is in a process group of its own, gets the signals that its guardian
    gets, and SIGTERM when that is killed.

    Args:
        work: what the child does; it begins with those signals blocked, and with handlers that do nothing.
        close: descriptors that the guardian gives up, so that their other side sees the child's end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, signal.SIGCHLD))
    for number in (*_PASSED_ON, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)  # one that is ignored, as below nohup, would not even be waited for
    process.outlive_parent()  # it is not over when the launcher is
    process.adopt_orphans()
    set_up = process.child_setup(die_with_parent=signal.SIGTERM)
    child = os.fork()
    if child == 0:
        _as_child(work, set_up)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in close:
        os.dup2(nothing, descriptor)
    status = _wait(child)
    _end_what_is_left()
    return 128 - status if status < 0 else status


def _as_child(work: Callable[[], int], set_up: Callable[[], None]) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        process.adopt_orphans()
        for number in _PASSED_ON:
            signal.signal(number, lambda _number, _frame: None)
        set_up()
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        status = work()
    except BaseException:  # noqa: BLE001 - whatever it is, the child must not go on as its parent
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(status)


def _wait(child: int) -> int:
    """Wait for a child, pass signals on to it and reap orphans meanwhile; returns its exit status, -n for signals."""
    while True:
        info = signal.sigwaitinfo((*_PASSED_ON, signal.SIGCHLD))
        if info.si_signo != signal.SIGCHLD:
            os.kill(child, info.si_signo)
            os.kill(child, signal.SIGCONT)
            continue
        reap_orphans({child})
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _end_what_is_left() -> None:
    """Kill what there is below: the child leaves nothing behind unless it was killed, and its ranks with it."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while reap_orphans(()) and time.monotonic() < give_up_at:
        process.send(process.descendants(os.getpid()), signal.SIGKILL)
        signal.sigtimedwait((signal.SIGCHLD,), 0.05)


def reap_orphans(kept: Collection[int]) -> bool:
    """Collect children that have ended, up to the first that its owner waits for; whether there are children still."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in kept:
                return True
            os.waitpid(ended.si_pid, 0)
        return True
    return False
