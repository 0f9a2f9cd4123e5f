"""PMI-1, the lines that an MPI library and its process manager exchange when it starts: enough to tell all one address.

mpiexec.hydra (MPICH, Intel MPI, MVAPICH2) and Flux hand every process an open socket, PMI_FD. Asked directly it needs no
MPI library: that of mpi4py may be missing, or of another family. The session stays open, for a script that calls
MPI_Init later finds it as it was; it is closed at the end, or mpiexec would take the process for one that crashed.

Source: MPICH, doc/wiki/pmi "PMI-1 wire protocol", src/pmi/src/pmi_v1.c.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import socket
from typing import TYPE_CHECKING

from hpc_ds.errors import RankError
from hpc_ds.runtime import mpi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_GOODBYE_S = 5.0
_calls = itertools.count()
_open: list[bool] = []  # not empty: this process has begun a session


def is_there(environ: Mapping[str, str]) -> bool:
    """Whether the process manager can be asked, and nobody else is talking to it."""
    return environ.get("PMI_FD", "").isdigit() and "PMI_RANK" in environ and not mpi.is_loaded()


def tell_all(text: str | None, environ: Mapping[str, str], timeout_s: float) -> str:
    """What rank 0 says, on every rank. Collective over all processes of this mpiexec.

    Args:
        text: of rank 0; without spaces.
        environ: PMI_FD is read.
        timeout_s: for all to come.

    Raises:
        RankError: the process manager does not answer, or speaks another protocol; or some process did not come.
    """
    with _talk(environ, timeout_s) as ask:
        if not _open:
            ask("init", "response_to_init", pmi_version="1", pmi_subversion="1")
            _open.append(True)
            atexit.register(_close)
        space = ask("get_my_kvsname", "my_kvsname").get("kvsname", "")
        key = f"hpc_ds_{next(_calls)}"
        if text is not None:
            ask("put", "put_result", kvsname=space, key=key, value=text)
        ask("barrier_in", "barrier_out")
        return ask("get", "get_result", kvsname=space, key=key).get("value", "")


@contextlib.contextmanager
def _talk(environ: Mapping[str, str], timeout_s: float) -> Iterator[Callable[..., dict[str, str]]]:
    """A function that asks the process manager: a command, the answer that is due, words."""
    number = environ["PMI_FD"]
    try:
        line = socket.socket(fileno=os.dup(int(number)))
    except OSError as error:
        raise RankError(f"PMI_FD {number}: no connection to mpiexec: {error.strerror}; use hpcds run") from error
    try:
        line.settimeout(timeout_s)
        yield lambda command, answer, **words: _ask(line, command, answer, words)
    except TimeoutError:
        raise RankError(
            f"PMI: some process did not come within {timeout_s:g} s; did every process of this mpiexec start?"
        ) from None
    except OSError as error:
        raise RankError(f"PMI_FD {number}: mpiexec does not answer: {error.strerror}; use hpcds run") from error
    finally:
        line.settimeout(None)  # of the socket itself, which an MPI library may use next
        line.close()


def _ask(line: socket.socket, command: str, answer: str, words: Mapping[str, str]) -> dict[str, str]:
    """One line of ``key=value`` each way."""
    line.sendall(" ".join([f"cmd={command}", *(f"{key}={value}" for key, value in words.items())]).encode() + b"\n")
    text = b""
    while not text.endswith(b"\n"):
        part = line.recv(4096)
        if not part:
            raise RankError(f"PMI: mpiexec closed the connection at {command}; look at its messages, or use hpcds run")
        text += part
    told = dict(word.split("=", 1) for word in text.decode(errors="replace").split() if "=" in word)
    if told.get("cmd") != answer or told.get("rc", "0") != "0":
        raise RankError(f"PMI: mpiexec answers {text!r} to {command}, which is not PMI-1; use hpcds run")
    return told


def _close() -> None:
    """Say goodbye, unless MPI has taken the session over and does it itself."""
    if not mpi.is_loaded():
        with contextlib.suppress(RankError), _talk(os.environ, _GOODBYE_S) as ask:
            ask("finalize", "finalize_ack")
