"""Every error that hpc_ds raises on purpose, as one tree, each with the exit code of the command that meets it.

HpcdsError                 1
├── ConfigError            2   what a user wrote: a file, a key, a value, an option
│   ├── SiteError          2   a site file, or a site name nobody knows
│   ├── NodeListError      2   text that is not a Slurm node list
│   ├── HostfileError      2   a hostfile, or a filter on it
│   └── RunError           2   a run folder, job id or run name that is not one
├── LaunchError            1   ranks that could not be started, or a host that was lost
├── RankError              2   environment variables that do not say which rank this is
├── SchedulerError         3   what a scheduler said, or did not
│   ├── CommandError       3   a program that could not be run, failed, or took too long
│   │   ├── NoAnswerError  3   it took too long: what it was asked for may have happened
│   │   └── NoProgramError 3   there is no such program here
│   ├── RefusedError       3   a scheduler that said no, and would say so again
│   ├── SubmitError        3   a job that the scheduler refused
│   └── ParseError         3   output of a scheduler that we do not understand
├── FunctionError          1   a Python function that raised in its job, or left no result
├── UnfinishedError        1   a Python function whose job is not over yet
├── CheckpointError        4   a checkpoint that could not be written or read
│   └── DamagedError       4   files of a checkpoint that are not what was written
└── DivergedError          5   training that cannot go on: overflow at the smallest loss scale

A message has the form ``<thing> <value>: <what is wrong>; <what to do>``: one sentence, lower case, no full stop.
"""

from __future__ import annotations

from typing import ClassVar


class HpcdsError(Exception):
    """Something went wrong that a user can understand and mend."""

    exit_code: ClassVar[int] = 1


class ConfigError(HpcdsError):
    """A file, key, value or option that a user wrote is not usable."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, file: str | None = None, key: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.file = file
        self.key = key
        self.value = value


class SiteError(ConfigError):
    """A site is unknown, or its file is not a site file."""


class NodeListError(ConfigError):
    """Text is not a Slurm node list.

    Attributes:
        text: the whole text as given.
        column: 1-based position of the first character that is wrong.
    """

    def __init__(self, text: str, column: int, problem: str) -> None:
        super().__init__(f"node list {text!r}, column {column}: {problem}", value=text)
        self.text = text
        self.column = column


class HostfileError(ConfigError):
    """A hostfile, or an include or exclude filter on it, is not usable."""


class RunError(ConfigError):
    """A run folder, job id or run name does not name a run."""


class LaunchError(HpcdsError):
    """Ranks could not be started, or a host was lost with its ranks."""


class RankError(HpcdsError):
    """The environment does not say which rank this process is.

    Attributes:
        seen: the variables that were looked at and found.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, seen: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.seen = dict(seen or {})


class SchedulerError(HpcdsError):
    """A scheduler refused, failed or answered nonsense."""

    exit_code: ClassVar[int] = 3


class CommandError(SchedulerError):
    """A program could not be run, failed, or took too long.

    Attributes:
        command: the argument list.
        returncode: its exit status; None when it never ran or was stopped by its time limit.
        stderr: what it said.
    """

    def __init__(self, command: list[str], returncode: int | None, stderr: str, message: str | None = None) -> None:
        words = " ".join(stderr.split()) or "it said nothing"
        super().__init__(message or f"{command[0]}: exit status {returncode}: {words}")
        self.command = command
        self.returncode = returncode
        self.stderr = stderr


class NoAnswerError(CommandError):
    """A program was stopped by its time limit; what it was asked for may have happened."""


class NoProgramError(CommandError):
    """There is no such program on PATH, as in a container without Slurm's clients."""


class RefusedError(SchedulerError):
    """The scheduler said no to a request, and would say so again."""


class SubmitError(SchedulerError):
    """The scheduler refused a job."""


class ParseError(SchedulerError):
    """A scheduler's output is not in a form we know.

    Attributes:
        text: the whole output.
        part: the part that is not understood.
    """

    def __init__(self, message: str, text: str, part: str = "") -> None:
        super().__init__(message)
        self.text = text
        self.part = part


class FunctionError(HpcdsError):
    """A Python function raised in its job, or the job ended without its result.

    Attributes:
        job_id: the scheduler's.
        rank: that raised, or left nothing; None where it is not about one.
        trace: the traceback; empty where there is none.
    """

    def __init__(self, message: str, *, job_id: str = "", rank: int | None = None, trace: str = "") -> None:
        super().__init__(message)
        self.job_id = job_id
        self.rank = rank
        self.trace = trace


class UnfinishedError(HpcdsError, TimeoutError):
    """A Python function's job is not over yet."""


class CheckpointError(HpcdsError):
    """A checkpoint could not be written or read.

    Attributes:
        path: the folder or file concerned.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing, or do not hold what was written; an older checkpoint may still be whole.

    Attributes:
        damage: which file, and what is wrong with it.
    """

    def __init__(self, message: str, path: str | None = None, damage: str = "") -> None:
        super().__init__(message, path)
        self.damage = damage


class DivergedError(HpcdsError):
    """Training cannot go on: gradients overflow at the smallest loss scale."""

    exit_code: ClassVar[int] = 5
