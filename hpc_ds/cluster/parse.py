"""Pure parsers of what Slurm prints."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from hpc_ds.cluster.scheduler import HELD, JobState
from hpc_ds.errors import ParseError

# "Key=value Key=value ...": a value may hold spaces, a key never does.
_FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z0-9/:_-]*)=")
_DUE_TO = re.compile(r"\*\*\* STEP \S+ ON \S+ CANCELLED AT \S+ DUE TO (?P<why>[A-Z]+(?: [A-Z]+)*)")
_TASK_END = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<tasks>[0-9,\[\]-]+): (?P<how>.+)")

_LOST_NODE = re.compile(r"srun: error: Node failure on (?P<host>[^\s,\[]+)")


def parse_job_id(text: str) -> str:
    """The job id that ``sbatch --parsable`` printed (``id`` or ``id;cluster``).

    Raises:
        ParseError: it printed something else.
    """
    lines = text.strip().splitlines()
    match = re.fullmatch(r"(\d+)(?:;.*)?", lines[-1].strip()) if lines else None
    if not match:
        raise ParseError(f"sbatch answer {text!r}: no job id in it; look whether the job is queued", text, text)
    return match.group(1)


def parse_fields(line: str) -> dict[str, str]:
    """The fields of one ``scontrol show job -o`` line."""
    marks = list(_FIELD.finditer(line))
    if not marks:
        return {}
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    return {mark.group(1): line[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}


def parse_job(line: str) -> JobState:
    """The state of a job from one ``scontrol show job -o`` line.

    Raises:
        ParseError: the line has no job state.
    """
    # What follows are paths, in which a user may have written anything.
    fields = parse_fields(line.partition(" Command=")[0])
    if "JobState" not in fields:
        raise ParseError(f"scontrol answer {line[:200]!r}: no JobState in it; is this Slurm?", line)
    preempt_time = fields.get("PreemptTime", "None")
    state = fields["JobState"].split(",")[0].split("+")[0]
    return JobState(
        state=state,
        reason=fields.get("Reason", "None"),
        restarts=_count(fields.get("Restarts") or "0", line),
        preempting=preempt_time not in {"None", "Unknown", ""},
        end_time=parse_time(fields.get("EndTime", "")),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        held=fields.get("Priority") == "0" and state in {"PENDING", "SPECIAL_EXIT", "REQUEUE_HOLD"},
        may_requeue=fields.get("Requeue") != "0",
        start_time=parse_time(fields.get("StartTime", "")),
    )


def parse_config(text: str) -> dict[str, str]:
    """What ``scontrol show config`` printed; ``(null)`` is left out."""
    pairs = (line.partition("=") for line in text.splitlines())
    found = {key.strip(): value.strip() for key, equals, value in pairs if equals}
    return {key: value for key, value in found.items() if value != "(null)"}


def parse_gpus(gres: str) -> int:
    """How many GPUs stand in a GRES such as ``gpu:a100:4(S:0-1),nvme:1``."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


QUEUE_FORMAT = "%i|%A|%T|%Q|%S|%e|%N|%r"  # the reason last: its text is free


def parse_queue(text: str) -> dict[str, JobState]:
    """Job id -> state, from what ``squeue -h -o QUEUE_FORMAT`` printed.

    A task of an array stands under both of its names, ``44_1`` and the id that the task itself sees.

    Raises:
        ParseError: a line is not in this format.
    """
    named: dict[str, JobState] = {}
    by_number: dict[str, JobState] = {}
    for line in filter(str.strip, text.splitlines()):
        fields = [field.strip() for field in line.split("|", 7)]
        if len(fields) < 8 or not fields[2].isupper():
            raise ParseError(f"squeue answer {line[:200]!r}: not a line as asked for; is this Slurm?", text, line)
        name, number, state, priority, start, end, nodes, reason = fields
        named[name] = JobState(
            state=state,
            reason=reason or "None",
            end_time=parse_time(end),
            nodes=nodes,
            held=priority == "0" and state in {"PENDING", *HELD},
            start_time=parse_time(start),
        )
        by_number.setdefault(number, named[name])
    return {**by_number, **named}


ACCOUNT_FORMAT = "JobID,State,ElapsedRaw,Start,NodeList"


@dataclass(frozen=True, slots=True)
class Account:
    """One start of a job as slurmdbd keeps it.

    Attributes:
        job_id: a task of an array as ``44_1``.
        state: Slurm's last word, such as ``NODE_FAIL``.
        elapsed_s: how long nodes were given to it.
        start: seconds since the epoch; None where it never started.
    """

    job_id: str
    state: str
    elapsed_s: int
    start: float | None
    nodes: str


def parse_accounts(text: str) -> list[Account]:
    """Every start of every job, from what ``sacct -D -X -P -n --format=ACCOUNT_FORMAT`` printed; oldest first.

    Raises:
        ParseError: a line is not in this format.
    """
    found = []
    for line in filter(str.strip, text.splitlines()):
        fields = line.split("|")
        if len(fields) != 5 or not fields[2].isdigit():
            raise ParseError(f"sacct answer {line[:200]!r}: not a line as asked for; is this Slurm?", text, line)
        job_id, state, elapsed, start, nodes = fields
        found.append(Account(job_id, state.split(" ")[0], int(elapsed), parse_time(start), nodes))
    return sorted(found, key=lambda account: account.start or 0.0)


IS_DOWN = re.compile(r"down|drain|fail|unk|.*\*")
"""States of nodes in sinfo's words that can run no job; an asterisk: it does not answer."""
OFFER_FORMAT = "%P|%D|%c|%m|%G|%T"


@dataclass(frozen=True, slots=True)
class Offer:
    """Nodes of one kind and state in one partition.

    Attributes:
        default: jobs that name no partition go there.
        cores, memory_mb: of a node, at least.
        gres: such as ``gpu:4``; empty where there is none.
        works: they can run jobs, now or when those on them have ended.
    """

    partition: str
    default: bool
    nodes: int
    cores: int
    memory_mb: int
    gres: str
    works: bool


def parse_offers(text: str) -> list[Offer]:
    """What the partitions have, from what ``sinfo --noheader --format=OFFER_FORMAT`` printed.

    Raises:
        ParseError: a line is not in this format.
    """
    found = []
    for line in filter(str.strip, text.splitlines()):
        fields = line.strip().split("|")
        numbers = [re.match(r"\d+", field) for field in fields[1:4]]  # "4+": some have more
        if len(fields) != 6 or None in numbers:
            raise ParseError(f"sinfo answer {line[:200]!r}: not a line as asked for; is this Slurm?", text, line)
        nodes, cores, memory = (int(number[0]) for number in numbers if number)
        gres = "" if fields[4] in {"(null)", "N/A"} else fields[4]
        works = not IS_DOWN.match(fields[5])
        name = fields[0]
        found.append(Offer(name.removesuffix("*"), name.endswith("*"), nodes, cores, memory, gres, works))
    return found


def _count(text: str, line: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ParseError(f"scontrol answer {line[:200]!r}: Restarts={text} is no number; is this Slurm?", line, text)
    return int(text[:9])


def parse_time(text: str) -> float | None:
    """Seconds since the epoch of Slurm's local time, such as ``2026-01-31T13:45:00``; None for Unknown, None, N/A."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def parse_due_to(line: str) -> str | None:
    """Why Slurm ended a step, from ``... CANCELLED AT <time> DUE TO PREEMPTION ***``; None where it does not say."""
    match = _DUE_TO.search(line)
    return match["why"] if match else None


def parse_lost_node(line: str) -> str | None:
    """The node in ``srun: error: Node failure on n3``; None where no node is said to be lost."""
    match = _LOST_NODE.match(line.strip())
    return match["host"] if match else None


def parse_task_end(line: str) -> tuple[str, int, str] | None:
    """Host, first task id and manner of one srun message such as ``srun: error: n2: task 3: Killed``; else None."""
    match = _TASK_END.match(line.strip())
    if not match:
        return None
    first = re.search(r"\d+", match["tasks"])
    return match["host"], int(first.group()) if first else 0, match["how"].strip()
