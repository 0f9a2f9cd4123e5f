"""The folder of a sweep: one job array, whose tasks are runs.

RUNS/<name>-<stamp>/
    hpcds-sweep.json     name, site, job id, throttle, and the values of each task; the mark of a sweep's folder
    script.sbatch        what the scheduler was given: an array (not on site local)
    provenance.json      as in a run; code.diff and code/ are here and not in the runs
    after.json           what the sweep waited for when it was submitted
    1/ 2/ ...            the runs, each with all that a run has
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_ds.errors import RunError
from hpc_ds.run_dir import SWEEP_FILE, RunDir, is_sweep, known_roots, read_object, runs_in


class SweepDir:
    """A sweep's folder by the names of its files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sweep = root / SWEEP_FILE
        self.script = root / "script.sbatch"
        self.provenance = root / "provenance.json"
        self.local = root / "local"

    def __repr__(self) -> str:
        return f"SweepDir({str(self.root)!r})"

    def run(self, number: int) -> RunDir:
        """One of its runs."""
        return RunDir(self.root / str(number))

    def runs(self) -> list[RunDir]:
        """All of them, in the order of their numbers."""
        return runs_in(self.root)

    def data(self) -> dict[str, Any]:
        """What its JSON file says."""
        return read_object(self.sweep)

    @property
    def job_id(self) -> str:
        """Of the array, as it was submitted."""
        return str(self.data().get("job_id", ""))


def find_sweep(text: str, runs: Path) -> SweepDir | None:
    """The sweep that ``text`` means: its folder, its array's job id, or its name; the newest of several; or None."""
    for root in (Path(text), runs / text):
        if is_sweep(root):
            return SweepDir(root.resolve())
    if "/" in text:
        return None
    sweeps = [SweepDir(root) for root in known_roots(runs) if is_sweep(root)]
    found = [one for one in sweeps if text in {one.root.name, one.job_id, str(one.data().get("name", ""))}]
    return max(found, key=lambda one: one.sweep.stat().st_mtime, default=None)


def runs_named(text: str, runs: Path) -> list[RunDir]:
    """The run that ``text`` means; all of its runs where it means a sweep.

    Raises:
        RunError: neither is meant.
    """
    sweep = find_sweep(text, runs)
    try:
        run = RunDir.find(text, runs)
    except RunError:
        if sweep is None:
            raise
        return sweep.runs()
    newer = sweep is not None and sweep.sweep.stat().st_mtime > run.config.stat().st_mtime
    return sweep.runs() if sweep is not None and newer else [run]
