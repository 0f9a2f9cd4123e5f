"""Stand-ins at the seams: a shell that runs nothing, and a scheduler that is a list of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.cluster.shell import Completed
from hpc_ds.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.run_dir import RunDir

    Answer = str | Completed | Exception


class FakeShell:
    """Records every command and answers it from a table, as ``hpc_ds.cluster.shell.run`` would.

    The table goes from the beginning of a command line (the longest that fits is taken) to what it prints, to a
    Completed, to the error that running it raises, or to a list of these, of which the last one stays.
    """

    def __init__(self, answers: Mapping[str, Answer | list[Answer]]) -> None:
        self._answers = {begin: answer if isinstance(answer, list) else [answer] for begin, answer in answers.items()}
        self.commands: list[list[str]] = []
        self.timeouts_s: list[float] = []

    def __call__(self, command: list[str], *, timeout_s: float = 30.0, check: bool = True) -> Completed:
        self.commands.append(command)
        self.timeouts_s.append(timeout_s)
        fitting = [begin for begin in self._answers if " ".join(command).startswith(begin)]
        if not fitting:
            raise AssertionError(f"{command}: the test has no answer to it")
        answers = self._answers[max(fitting, key=len)]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        done = Completed(0, answer, "") if isinstance(answer, str) else answer
        if check and done.returncode != 0:
            raise CommandError(command, done.returncode, done.stderr or done.stdout)
        return done


def refusal(words: str, returncode: int = 1) -> Completed:
    """A program that failed with these words."""
    return Completed(returncode, "", words)


class FakeScheduler:
    """Records every request; ``show`` hands out the given states in turn, of which the last one stays.

    An exception in the place of a state, or under the name of a request, is raised. Requests are noted as ``hold 25``.
    """

    def __init__(self, states: Iterable[JobState | Exception | None], **failures: Exception) -> None:
        self._states = list(states)
        self._failures = failures
        self.requests: list[str] = []
        self.shown: list[str] = []
        self.dead: set[str] = set()

    def show(self, job_id: str) -> JobState | None:
        self.shown.append(job_id)
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def submit(self, run: RunDir, after: str | None = None, exclude: Sequence[str] = ()) -> str:
        self._request("submit", " ".join([run.root.name, *([f"after {after}"] if after else []), *exclude]))
        return "1"

    def cancel(self, job_id: str) -> None:
        self._request("cancel", job_id)

    def preempt(self, job_id: str) -> None:
        self._request("preempt", job_id)

    def requeue(self, job_id: str) -> None:
        self._request("requeue", job_id)

    def hold(self, job_id: str) -> None:
        self._request("hold", job_id)

    def exclude(self, job_id: str, nodes: Sequence[str]) -> None:
        self._request("exclude", " ".join([job_id, *nodes]))

    def depend(self, job_id: str, dependency: str) -> None:
        self._request("depend", f"{job_id} {dependency}")

    def kill_wait_s(self) -> float:
        return 8.0

    def down(self, nodes: Sequence[str]) -> list[str]:
        return [node for node in nodes if node in self.dead]

    def release(self, job_id: str) -> None:
        self._request("release", job_id)

    def _request(self, name: str, subject: str) -> None:
        self.requests.append(f"{name} {subject}")
        if name in self._failures:
            raise self._failures[name]


def fake_program(folder: Path, name: str, text: str) -> Path:
    """An executable bash script, for programs that are found on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path
