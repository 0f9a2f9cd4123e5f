"""The run folder: every file name of a run, and the ways its files are written.

RUNS/<name>-<stamp>/
    config.json          the job as submitted, resolved; the mark of a run folder
    config-before-attempt-N.json  the job as it was before `hpcds resume` changed it for attempt N
    site.json            the site as it was then
    provenance.json      who, where, when, with which versions, which code, and where each value came from
    code.diff            what had changed in it since its commit
    code/                with snapshot: the copy of the code that the run runs from
    script.sbatch        what the scheduler was given
    env.sh               environment of the job, mode 0600
    environment.toml     runtime edf: the container, with the mounts of the run
    after.json           what the run waited for when it was submitted
    dependents.jsonl     the runs that wait for this one
    job.json             the scheduler's job id; written again by ``resume``
    logs/                scheduler.log, attempt-N/rank-R.log, attempt-N/launcher.log
    logs/attempt-N/      beats/rank-R.json: signs of life; failures/rank-R.json: what a rank raised;
                         dump: ranks are asked for their stacks; stacks/rank-R.txt: where each was
    checkpoints/         unless the job names another place
    attempts.jsonl       the ledger: one line when an attempt opens, one when it closes
    events.jsonl         steps, saves and resumes, written by rank 0
    deadline             seconds since the epoch at which ranks must begin to save, and at which the job ends
    rendezvous/          where rank 0 publishes its address
    local/               site local: state of the job, requests to its keeper

A sweep is a folder of runs (sweep_dir.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable


SWEEP_FILE = "hpcds-sweep.json"
"""The mark of a sweep's folder, and what its runs are."""


class RunDir:
    """A run folder by the names of its files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.site = root / "site.json"
        self.provenance = root / "provenance.json"
        self.code = root / "code"
        self.script = root / "script.sbatch"
        self.env = root / "env.sh"
        self.environment_definition = root / "environment.toml"
        self.after = root / "after.json"
        self.dependents = root / "dependents.jsonl"
        self.job = root / "job.json"
        self.logs = root / "logs"
        self.scheduler_log = self.logs / "scheduler.log"
        self.checkpoints = root / "checkpoints"
        self.ledger = root / "attempts.jsonl"
        self.events = root / "events.jsonl"
        self.deadline = root / "deadline"
        self.rendezvous = root / "rendezvous"
        self.local = root / "local"

    def __repr__(self) -> str:
        return f"RunDir({str(self.root)!r})"

    def attempt_logs(self, attempt: int) -> Path:
        """The folder with the logs of one attempt."""
        return self.logs / f"attempt-{attempt}"

    def beats(self, attempt: int) -> Path:
        """The folder in which each rank of an attempt gives signs of life."""
        return self.attempt_logs(attempt) / "beats"

    def failures(self, attempt: int) -> Path:
        """The folder in which a rank of an attempt writes what it raised."""
        return self.attempt_logs(attempt) / "failures"

    def stacks(self, attempt: int) -> Path:
        """The folder in which a rank of an attempt writes where it is, when it is asked."""
        return self.attempt_logs(attempt) / "stacks"

    def dump_request(self, attempt: int) -> Path:
        """A file that asks every rank of an attempt for its stacks as soon as it is there."""
        return self.attempt_logs(attempt) / "dump"

    def config_before(self, attempt: int) -> Path:
        """Where the job is kept as it was before ``resume`` changed it for an attempt."""
        return self.root / f"config-before-attempt-{attempt}.json"

    @classmethod
    def create(cls, runs: Path, name: str) -> RunDir:
        """Make a new folder below ``runs``; two runs made in the same second get different ones.

        Raises:
            RunError: the folder cannot be made.
        """
        run = cls(new_folder(runs, name))
        run.make_folders()
        return run

    def make_folders(self) -> None:
        """Make the folders that every run has."""
        for folder in (self.logs, self.checkpoints, self.rendezvous):
            folder.mkdir()

    @classmethod
    def open(cls, root: Path) -> RunDir:
        """The run in ``root``.

        Raises:
            RunError: there is none.
        """
        run = cls(root.resolve())
        if not _is_run(run.root):
            missing = "no such folder" if not _exists(root) else "not a run folder (it has no config.json)"
            raise RunError(
                f"run {str(root)!r}: {missing}; give the folder that `hpcds submit` printed", value=str(root)
            )
        return run

    @classmethod
    def find(cls, text: str, runs: Path) -> RunDir:
        """The run that ``text`` means: a run folder, a job id, a run name, or a folder's name; the newest of several.

        Looked for in ``runs``, then among all runs this user submitted from this machine's home.

        Raises:
            RunError: no run is meant.
        """
        if os.sep in text or _is_run(Path(text)):
            return cls.open(runs / text if _is_run(runs / text) and not _is_run(Path(text)) else Path(text))
        found = [run for run in _known_runs(runs) if text in run.names()]
        if not found and is_sweep(runs / text):
            raise RunError(f"run {text!r}: a sweep; name one of its runs, such as {text}/1", value=text)
        if not found:
            raise RunError(
                f"run {text!r}: neither a run folder nor the job id or name of a run in {str(runs)!r}; check it",
                value=text,
            )
        return max(found, key=lambda run: run.config.stat().st_mtime)

    @classmethod
    def all_in(cls, runs: Path, *, elsewhere: bool = False) -> list[RunDir]:
        """The runs in a folder, oldest first; with ``elsewhere`` those too that this user submitted into other folders."""
        known = _known_runs(runs) if elsewhere else [run for run in _beside(runs) if _is_run(run.root)]
        return sorted(known, key=lambda run: (run.config.stat().st_mtime, run.root.name))

    def names(self) -> set[str]:
        """All that a user may call this run."""
        job_id = str(read_object(self.job).get("job_id", ""))
        if is_sweep(self.root.parent):
            return {job_id} - {""}  # its number and its job's name are not its own
        return {self.root.name, job_id, str(read_object(self.config).get("name", ""))} - {""}

    @property
    def label(self) -> str:
        """What to call the run in a table."""
        return f"{self.root.parent.name}/{self.root.name}" if is_sweep(self.root.parent) else self.root.name

    def remember(self) -> None:
        """Add this run to the user's list, so that ``find`` knows it from any folder."""
        remember(self.root)


def new_folder(runs: Path, name: str) -> Path:
    """Make a new folder below ``runs``, named by name and time.

    Raises:
        RunError: it cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    if not str(runs.absolute()).isprintable():
        raise RunError(f"runs folder {str(runs)!r}: has a character that no job script can hold; choose another")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for count in range(1, 1000):
            root = runs.resolve() / (f"{name}-{stamp}" if count == 1 else f"{name}-{stamp}-{count}")
            with contextlib.suppress(FileExistsError):
                root.mkdir()
                return root
    except OSError as error:
        raise RunError(f"runs folder {str(runs)!r}: no run can be made in it: {error}; choose another") from None
    raise RunError(f"runs folder {str(runs)!r}: a thousand runs named {name} in one second; wait a moment")


def remember(root: Path) -> None:
    """Add the folder of a run or a sweep to the user's list."""
    path = _index_path()
    with contextlib.suppress(OSError):  # a convenience: a home that cannot be written must not stop a run
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, {"run": str(root)}, durable=False)


def is_sweep(root: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return _exists(root / SWEEP_FILE)


def runs_in(sweep: Path) -> list[RunDir]:
    """The runs of a sweep, in the order of their numbers."""
    numbers = sorted(int(path.name) for path in sweep.iterdir() if path.name.isdigit())
    return [RunDir(sweep / str(number)) for number in numbers]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to exist
        return False


def _is_run(root: Path) -> bool:
    return _exists(root / "config.json")


def _index_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "hpcds" / "runs.jsonl"


def _beside(runs: Path) -> list[RunDir]:
    return _expanded(sorted(runs.resolve().iterdir())) if runs.is_dir() else []


def _expanded(roots: Iterable[Path]) -> list[RunDir]:
    """Runs; in the place of a sweep, all of its runs."""
    return [run for root in roots for run in (runs_in(root) if is_sweep(root) else [RunDir(root)])]


def known_roots(runs: Path) -> list[Path]:
    """Folders of runs and sweeps: those in ``runs``, then those that this user submitted from this machine's home."""
    here = sorted(runs.resolve().iterdir()) if runs.is_dir() else []
    remembered = [Path(line["run"]) for line in read_lines(_index_path()) if isinstance(line.get("run"), str)]
    return list(dict.fromkeys([*here, *remembered]))


def _known_runs(runs: Path) -> list[RunDir]:
    return [run for run in _expanded(known_roots(runs)) if _is_run(run.root)]


def write_atomic(path: Path, text: str, mode: int = 0o644, *, durable: bool = True) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one, also (if ``durable``) after a crash."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any, mode: int = 0o644, *, durable: bool = True) -> None:
    """Replace a file by ``data`` as indented JSON."""
    write_atomic(path, as_text(data), mode, durable=durable)


def as_text(data: Any) -> str:
    """Data as the JSON files of a run hold them."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def append_line(path: Path, data: dict[str, Any], *, durable: bool = True) -> None:
    """Add one JSON line in one write, so that lines of several writers never mix.

    A last line that a crash tore gets its end first, so that it does not take this one with it.
    """
    line = (json.dumps(data, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" + line if torn else line)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line torn by a crash is left out."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.split("\n"):  # splitlines would also cut at characters that JSON leaves as they are
        with contextlib.suppress(ValueError):
            data = json.loads(line)
            if isinstance(data, dict):
                lines.append(data)
    return lines
