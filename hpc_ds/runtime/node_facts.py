"""What the doctor finds out about a node by itself, without the other ranks: versions, memory, folders, cores, limits.

Plain data, in MiB and seconds, and no judgement: that is made by whoever has the facts of all nodes
(``runtime/verdict.py``). Nothing here loads torch or MPI.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import threading
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.runtime.rank import MPI_VARIABLES
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MIB = 1 << 20
_WRITTEN = os.urandom(_MIB)
_WRITE_WITHIN_S = 20.0


def versions() -> dict[str, str]:
    """Of what can be told without loading it."""
    found = {"hpc_ds": __version__, "python": platform.python_version(), "kernel": platform.release()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["mpi4py"] = metadata.version("mpi4py")
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace").split()
        found |= {"driver": next(word for word in words if word[0].isdigit() and "." in word)}
    return found


def memory() -> dict[str, float | None]:
    """Memory of this node in MiB: what is there, what can be had, and what the cgroup still allows (None: anything)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, available = (int(lines[name].split()[0]) / 1024 for name in ("MemTotal", "MemAvailable"))
    return {"total_mib": round(total), "available_mib": round(available), "allowed_mib": _left_in_cgroup()}


def _left_in_cgroup() -> float | None:
    """The least that this process's cgroup, or one above it, has left."""
    left = [room for folder in _cgroups() if (room := _room(folder)) is not None]
    return round(min(left) / _MIB) if left else None


def _cgroups() -> Iterable[Path]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
                own = root / path.lstrip("/")
                yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _room(cgroup: Path) -> int | None:
    """Bytes between use and limit of one cgroup, of version 2 or 1; what caches hold can be had."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            bound = int((cgroup / limit).read_text(encoding="ascii"))  # "max" is none
            if bound < 1 << 60:
                return bound - int((cgroup / used).read_text(encoding="ascii")) + _cached(cgroup)
    return None


def _cached(cgroup: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(maxsplit=1) for line in lines)
        return int(fields.get("inactive_file") or fields.get("total_inactive_file") or 0)
    return 0


def folder(path: str, *, write: bool = True) -> dict[str, Any]:
    """Room in a folder in MiB, and whether a file of 1 MiB can be written there, made durable, and read back.

    A file server that does not answer is not waited for: that is the error then.

    Args:
        path: of the folder; one that is not there is an error.
        write: whether to try; else only the room is told.
    """
    found: dict[str, Any] = {"path": path}

    def look() -> None:
        try:
            found.update(_room_in(path))
            if write:
                found["write_s"], same = _write_and_read(Path(path))
                found.update({} if same else {"error": "what is read back is not what was written"})
        except OSError as error:
            found["error"] = f"{error.strerror or error}"

    if not within(_WRITE_WITHIN_S, look):
        return {"path": path, "error": f"no answer in {_WRITE_WITHIN_S:g} s"}
    return found


def within(seconds: float, function: Callable[[], None]) -> bool:
    """Whether a function came to its end in time; else it is left behind in its thread."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _room_in(path: str) -> dict[str, Any]:
    room = os.statvfs(path)
    return {
        "free_mib": round(room.f_bavail * room.f_frsize / _MIB),
        "total_mib": round(room.f_blocks * room.f_frsize / _MIB),
    }


def _write_and_read(place: Path) -> tuple[float, bool]:
    """Seconds, and whether it came back as it was."""
    path = place / f".hpcds-doctor-{uuid.uuid4().hex[:12]}"
    begin = time.monotonic()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        view = memoryview(_WRITTEN)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        read = os.pread(descriptor, _MIB, 0)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
    return round(time.monotonic() - begin, 4), read == _WRITTEN


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def limits() -> dict[str, Any]:
    """Soft limits of this process, None where there is none: open files; memory that may be locked, in MiB."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    return {
        "open_files": None if files == unlimited else files,
        "locked_mib": None if locked == unlimited else round(locked / _MIB, 3),
    }


def infiniband() -> list[str]:
    """The InfiniBand (or RoCE) devices of this node: they need locked memory."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in Path("/sys/class/infiniband").iterdir())
    return []


def mpi_signs() -> list[str]:
    """What an MPI launcher, or Slurm's PMI, left in the environment of this process."""
    return [name for name in MPI_VARIABLES if name in os.environ]
