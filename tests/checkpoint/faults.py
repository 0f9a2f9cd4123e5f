"""Kills a process at a chosen point of the path of a save.

A point is a call to the operating system that touches a file below the checkpoint folder: Python announces opening,
renaming and removing before it does them (audit hooks), and writing and flushing are replaced by functions that announce
themselves. A process that is killed when a point is announced dies on the boundary between two such calls.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AUDITED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.rmtree"}
REPLACED = ("pwrite", "fsync")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank during one save.

    Attributes:
        point: the label of the point at which it is killed; None: never.
        occurrence: which of several points with that label, from 0.
        after_s: it is killed after so many seconds; None: never.
        everybody: the other ranks are killed with it.
        slow_s: it sleeps so long at each point.
    """

    point: str | None = None
    occurrence: int = 0
    after_s: float | None = None
    everybody: bool = False
    slow_s: float = 0.0


class Faults:
    """The points that a process passes, in the order in which it does; installed once a process."""

    def __init__(self, folder: Path, notes: Path, rank: int, fault: Fault) -> None:
        self._folder = str(folder)
        self._notes = notes
        self._rank = rank
        self._fault = fault
        self._count = itertools.count()
        self._armed = False
        self._paths: dict[int, str] = {}

    def arm(self) -> None:
        """From here on points count."""
        (self._notes / f"{self._rank}.pid").write_text(str(os.getpid()))
        sys.addaudithook(self._audit)
        for name in REPLACED:
            setattr(os, name, self._announcing(name, getattr(os, name)))
        if self._fault.after_s is not None:
            signal.signal(signal.SIGALRM, lambda *_: self._kill("at a random instant"))
            signal.setitimer(signal.ITIMER_REAL, self._fault.after_s)
        self._armed = True

    def disarm(self) -> None:
        """From here on they do not."""
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _announcing(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            self._pass(name, _opened(descriptor) if self._armed else "")
            return original(descriptor, *args)

        return call

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._armed and event in AUDITED:
            path = _opened(args[0]) if isinstance(args[0], int) else os.fsdecode(args[0])
            if event in {"os.remove", "os.rmdir"} and args[1] >= 0:
                path = f"{_opened(args[1])}/{path}"
            self._pass(event, path)

    def _pass(self, call: str, path: str) -> None:
        if not self._armed or not path.startswith(self._folder):
            return
        name = label(call, path[len(self._folder) :])
        self._note("points", name)
        if self._fault.slow_s:
            time.sleep(self._fault.slow_s)
        if name == self._fault.point and next(self._count) == self._fault.occurrence:
            self._kill(name)

    def _note(self, kind: str, text: str) -> None:
        # Straight to the kernel: nothing of it is lost when the process dies. The notes are outside of the folder.
        descriptor = os.open(self._notes / f"{self._rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{text}\n".encode())
        os.close(descriptor)

    def _kill(self, name: str) -> None:
        self._note("killed", name)
        if self._fault.everybody:
            for note in self._notes.glob("*.pid"):
                other = int(note.read_text() or os.getpid())
                if other != os.getpid():
                    os.kill(other, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _opened(descriptor: int) -> str:
    """The path of an open file."""
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - Path would hide the " (deleted)" of some


def label(call: str, path: str) -> str:
    """A point by its call and the kind of its file: ``fsync .saving/rank-0.safetensors``."""
    path = re.sub(r"\.(saving|replaced|removing)-\w+-[0-9a-f]{8}", r".\1", path.removesuffix(" (deleted)"))
    path = re.sub(r"(\.[0-9a-f]{8})+$", "", path)  # of a temporary file
    return f"{call} {re.sub(r'(step[0-9]+|same)', 'TAG', path).strip('/') or '.'}"
