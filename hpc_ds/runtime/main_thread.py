"""The main thread, seen from another one: where it is, and for how long it has not run any Python.

Looks that see the same stack with the same instructions prove nothing by themselves: a loop that polls is always seen in its
sleep. So the main thread is asked, too: the interpreter is given a call to make there as soon as that thread runs Python
again. One that waits inside of C makes none.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType

_STANDARD = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_INSTALLED = ("site-packages", "dist-packages")


class MainThread:
    """Looks at the main thread from time to time.

    Attributes:
        where: the innermost function that is neither torch's nor of the standard library, else the innermost.
    """

    def __init__(self) -> None:
        self.where = ""
        self._ident = threading.main_thread().ident
        self._stack: list[tuple[int, int]] = []
        self._moved_at = time.monotonic()
        self._foreign: dict[CodeType, bool] = {}

    def look(self, now: float) -> float:
        """See where it is; returns the seconds since it was last known to run Python.

        The frames are let go of before another thread can run, so that no value of theirs lives longer by it.
        """
        frame = sys._current_frames().get(self._ident or 0)  # noqa: SLF001 - there is no other way
        stack, where = [], None
        while frame is not None:
            stack.append((id(frame), frame.f_lasti))
            if where is None and not self._is_foreign(frame.f_code):
                where = frame.f_code, frame.f_lineno
            elif len(stack) == 1:
                innermost = frame.f_code, frame.f_lineno
            frame = frame.f_back
        if stack:
            code, line = where or innermost
            self.where = f"{Path(code.co_filename).name}:{line} {code.co_name}"
        if stack != self._stack or _has_answered():
            self._stack, self._moved_at = stack, now
            _ask()
        return now - self._moved_at

    def _is_foreign(self, code: CodeType) -> bool:
        known = self._foreign.get(code)
        if known is None:
            known = self._foreign[code] = _is_of_others(code.co_filename)
        return known


def _is_of_others(file: str) -> bool:
    """Whether a source file is torch's, or the standard library's."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    if file.startswith("<frozen") or (torch is not None and file.startswith(str(Path(torch).parent))):
        return True
    return file.startswith(_STANDARD) and not any(word in file for word in _INSTALLED)


# The question is a set that is not empty. What the interpreter is told to call is PySet_Clear itself: a Python function would
# be one more frame, in the main thread, for torch.compile to meet. The set is never freed: the call may outlive this module.
_question: set[str] = set()
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_question))
_add_pending_call = ctypes.pythonapi.Py_AddPendingCall
_add_pending_call.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
_clear = ctypes.cast(ctypes.pythonapi.PySet_Clear, ctypes.c_void_p)


def _ask() -> None:
    if not _question:
        _question.add("still there?")
        if _add_pending_call(_clear, id(_question)) != 0:  # too many of others are waiting
            _question.clear()


def _has_answered() -> bool:
    return not _question
