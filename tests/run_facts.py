"""What is known of a run from its folder and from the processes of this machine, on any site."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.run_dir import RunDir, read_object
from hpc_ds.supervise.ledger import read_ledger

if TYPE_CHECKING:
    from whole_runs import Run

    from hpc_ds.supervise.ledger import Attempt


def attempts(run: Run) -> list[Attempt]:
    """The ledger of a run."""
    return read_ledger(RunDir(run.folder))


def causes(run: Run) -> list[str | None]:
    """Why the attempts of a run ended."""
    return [attempt.cause for attempt in attempts(run)]


def job_id_of(run: Run) -> str:
    """The job that the run is now."""
    return str(read_object(RunDir(run.folder).job).get("job_id") or run.job_id)


def samples(run: Run) -> dict[int, list[int]]:
    """Step -> the samples that all ranks trained in it, in the attempt that took it last."""
    lines = [line for path in sorted(run.folder.glob("samples-*.jsonl")) for line in run.lines(path.name)]
    last: dict[int, int] = {}
    for line in lines:
        last[line["step"]] = max(last.get(line["step"], 0), line["attempt"])
    found: dict[int, list[int]] = {step: [] for step in sorted(last)}
    for line in lines:
        if line["attempt"] == last[line["step"]]:
            found[line["step"]] += line["samples"]
    return found


def taken_again(run: Run) -> list[int]:
    """The steps that were taken more than once."""
    counts = Counter(event["step"] for event in run.steps())
    return sorted(step for step, count in counts.items() if count > 1)


def read_process(pid: int, name: str) -> bytes:
    """One file of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def environ_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = read_process(pid, "environ").decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def processes_of(run: Run) -> list[int]:
    """Every live process of a run: its keeper, its supervisor, srun, its ranks, and what they started."""
    mark, folder = f"HPCDS_RUN_DIR={run.folder}\0".encode(), os.fsencode(run.folder)
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            pid = int(entry.name)
            command = read_process(pid, "cmdline")
            serves = folder in command and (b"supervise" in command or b"local_keeper" in command)
            state = read_process(pid, "stat").rpartition(b") ")[2][:1]
            if state not in {b"Z", b""} and (serves or mark in read_process(pid, "environ")):
                found.append(pid)
    return found


def ranks_of(run: Run) -> dict[int, int]:
    """Rank -> process, of the ranks that live now; without their own children."""
    found = {}
    for pid in processes_of(run):
        environ, command = environ_of(pid), read_process(pid, "cmdline")
        rank = environ.get("SLURM_PROCID") or environ.get("RANK")
        if rank is not None and "HPCDS_RUN_DIR" in environ and command.startswith(os.fsencode(sys.executable)):
            stat = read_process(pid, "stat").rpartition(b") ")[2].split()
            if stat and "HPCDS_RUN_DIR" not in environ_of(int(stat[1])):
                found[int(rank)] = pid
    return found
