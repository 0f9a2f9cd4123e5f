"""Runs ``hpcds`` many times without importing it each time: a process that has imported it forks for each command line.

Of the time that a verb takes, nearly all is importing. A fork gets what a started interpreter has: command line, environment,
working folder, standard streams, exit code; its module path begins with its folder, as with ``python -m hpc_ds``. What
depends on the start, such as which modules a verb imports, is tested with real starts.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import io
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOMS = ("cli", "cluster", "config", "launch", "report", "script", "supervise")  # none of them imports torch
LENGTH = 8  # bytes, before a request


class HpcdsServer:
    """The process that forks; it ends with this one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hpc_ds-server-")
        self._address = str(Path(self._folder.name, "socket"))
        command = [sys.executable, str(Path(__file__).resolve()), self._address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdout is not None
        assert self._process.stdout.read(1), "it did not start"

    def run(
        self, args: Sequence[str], env: Mapping[str, str], cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([sys.executable, "-m", "hpc_ds", *args], capture_output=True, stdin=DEVNULL)``."""
        request = json.dumps({"args": list(args), "env": dict(env), "cwd": str(cwd)}).encode()
        pipes = [os.pipe() for _ in range(2)]
        texts = ["", ""]
        readers = [threading.Thread(target=_read, args=(pipe[0], texts, place)) for place, pipe in enumerate(pipes)]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._address)
            socket.send_fds(connection, [len(request).to_bytes(LENGTH, "big")], [pipe[1] for pipe in pipes])
            for _, written in pipes:
                os.close(written)
            connection.sendall(request)
            answer = connection.makefile()
            guard = threading.Timer(timeout_s, os.kill, (int(answer.readline()), signal.SIGKILL))
            for thread in (guard, *readers):
                thread.start()
            for reader in readers:
                reader.join()
            code = int(answer.readline())
            guard.cancel()
        return subprocess.CompletedProcess(["hpcds", *args], code, *texts)

    def stop(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)
        self._folder.cleanup()


@functools.cache
def hpcds_server() -> HpcdsServer:
    """The one of this process."""
    server = HpcdsServer()
    atexit.register(server.stop)
    return server


def _read(descriptor: int, texts: list[str], place: int) -> None:
    with open(descriptor, encoding="utf-8") as file:
        texts[place] = file.read()


def serve(address: str) -> tuple[dict[str, object], list[int]] | None:
    """Fork for each request: a fork returns with it, the server returns without one when its client has gone."""
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    os.write(1, b"1")
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                header, descriptors, _, _ = socket.recv_fds(connection, LENGTH, 2)
                with connection.makefile("rb") as file:
                    request = json.loads(file.read(int.from_bytes(header, "big")))
                pid = os.fork()
                if pid == 0:
                    return request, descriptors
                for descriptor in descriptors:
                    os.close(descriptor)
                connection.sendall(b"%d\n" % pid)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            else:
                pid, connection = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                connection.sendall(b"%d\n" % code)
                connection.close()


def become(request: dict[str, object], descriptors: list[int]) -> None:
    """Make this fork what a started interpreter would be."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in zip((nothing, *descriptors), range(3), strict=True):
        os.dup2(descriptor, place)
    os.closerange(3, 1 << 16)
    sys.stdin, sys.stdout = io.TextIOWrapper(io.FileIO(0)), io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")))
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w")), errors="backslashreplace", line_buffering=True)
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[arg-type]
    time.tzset()
    os.chdir(str(request["cwd"]))
    sys.path[0] = str(Path.cwd())
    sys.argv = [str(Path(importlib.import_module("hpc_ds").__file__ or "").with_name("__main__.py")), *request["args"]]  # type: ignore[misc]


def preload() -> None:
    """Import all that no verb imports with torch."""
    import hpc_ds

    for module in pkgutil.walk_packages(hpc_ds.__path__, "hpc_ds."):
        if module.name.split(".")[1] in ROOMS:
            importlib.import_module(module.name)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    preload()
    if (told := serve(sys.argv[1])) is not None:
        become(*told)
        from hpc_ds.cli.entry import main

        main()
