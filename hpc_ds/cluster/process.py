"""Linux processes: who descends from whom, who still lives, and who dies with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)  # as this process was started
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def node_name() -> str:
    """What the scheduler calls the machine that this process runs on."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def child_setup(die_with_parent: signal.Signals) -> Callable[[], None]:
    """What a child does between fork and exec: unblock all signals, and ask for one when its parent ends.

    For ``Popen(preexec_fn=...)`` of processes with one thread that wait for signals with them blocked: a child would
    inherit the block. It gets back the limit of open files that this process began with. The function makes system calls
    only, which is all that is safe there.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def set_up() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, _FILES)
        libc.prctl(_PR_SET_PDEATHSIG, int(die_with_parent), 0, 0, 0)
        if os.getppid() != parent:  # it ended already
            os.kill(os.getpid(), die_with_parent)

    return set_up


def outlive_parent() -> None:
    """Ask for no signal when the parent ends, whatever was asked for before."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none escapes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def allow_files(number: int) -> None:
    """Let this process have so many files open, as far as it may raise its own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (number if hard == resource.RLIM_INFINITY else min(number, hard), hard)
        )


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with its id this names it for good. None: no such process."""
    stat = _stat(pid)
    return None if stat is None or stat[0] == "Z" else int(stat[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that had this id and start time still runs."""
    return start_time(pid) == started


def ancestors() -> list[int]:
    """The processes above this one, its parent first; those that ended are not among them."""
    found, pid = [], os.getppid()
    while pid > 0 and pid not in found:
        found.append(pid)
        stat = _stat(pid)
        pid = 0 if stat is None else int(stat[1])
    return found


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            stat = _stat(int(entry.name))
            if stat is not None:
                children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def send(pids: Iterable[int], *numbers: signal.Signals) -> None:
    """Send signals to processes; those that have ended are passed over."""
    for pid in pids:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command name: state, parent, ... ; None: no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
