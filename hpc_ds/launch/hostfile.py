"""Hostfiles: which hosts, and how many processes on each, in DeepSpeed's form ``name slots=N``; written in others too.

What may be one, stricter than DeepSpeed where DeepSpeed runs on fewer hosts than meant: no host twice, no ``slots=0``,
nothing glued to the number; a folded name ``gpu[01-04]`` stands for its hosts instead of for itself.

From Slurm, slots are the first of these that is there:

    SLURM_GPUS_PER_TASK     times the tasks of each node, which Slurm packs unevenly (3,1 for 4 tasks on 2 nodes)
    SLURM_GPUS_PER_NODE     what a job asks of each node; a step inherits it, so there the next one goes first
    SLURM_GPUS_ON_NODE      what this node has: all its GPUs in an --exclusive job, the step's own in a step
    SLURM_TASKS_PER_NODE    one process a task, where no GPU is asked for

The components of a heterogeneous job come one after the other; each has these variables with ``_HET_GROUP_n`` behind.

Source: https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/launcher/runner.py; variables as Slurm 22.05 sets
them in batch scripts, steps, salloc and interactive steps.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import starmap
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hpc_ds.errors import HostfileError, NodeListError
from hpc_ds.launch.allocation import is_task
from hpc_ds.launch.node_list import expand, expand_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MAX_SLOTS = 65_536
FORMS = {"deepspeed": " slots=", "openmpi": " slots=", "mpich": ":", "plain": ""}
"""What reads it -> what stands between name and number; ``mpich`` is Intel MPI's machine file too, ``plain`` has none."""
_T = TypeVar("_T")
# What DeepSpeed and ssh would take for one host: user@host and addresses too, but no option.
_SINGLE = re.compile(r"[^\s#\[\],-][^\s\[\],]*")
_PLAIN_LINE = re.compile(rf"\s*({_SINGLE.pattern})\s+slots=([1-9][0-9]{{0,3}})(?=[\s#]|\Z)")

_STEP = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE")
_JOB = ("SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_TASKS_PER_NODE")
GPU_VARIABLES = ("SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_GPUS")
"""Variables of Slurm that tell of GPUs."""
_CURE = "give a node list and --slots"


class Host(NamedTuple):
    """A host and the number of processes it takes, one a GPU where it has any."""

    name: str
    slots: int


def render(hosts: list[Host], form: str = "deepspeed") -> str:
    """The text of a hostfile: ``parse(render(hosts)) == hosts``.

    Raises:
        HostfileError: no hosts, one of them twice, slots below 1, or a form that nobody knows or that cannot say it.
    """
    if form not in FORMS:
        raise HostfileError(f"form {form!r}: not a form of hostfiles; use {', '.join(FORMS)}", key="form", value=form)
    checked = _checked("hostfile", hosts)
    if form == "mpich" and (name := next((host.name for host in checked if ":" in host.name), None)):
        raise HostfileError(f"form 'mpich': {name!r} has a ':', which parts name and number there; use a name without")
    between = FORMS[form]
    if not between:
        return "".join([f"{name}\n" for name, _ in checked])
    return "".join([f"{name}{between}{slots}\n" for name, slots in checked])


def parse(text: str, source: str = "hostfile") -> list[Host]:
    """The hosts of a hostfile, in its order, which is the order of ranks.

    Blank lines and comments are skipped, and so is what follows the number (``slots=4 max_slots=8``).

    Raises:
        HostfileError: a line is not of this form, a host is there twice, or there is none; it names the line.
    """
    # Not splitlines, which ends lines where no editor does.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    plain = list(map(_PLAIN_LINE.match, lines))
    hosts = [Host(match[1], int(match[2])) for match in plain if match]
    if len(hosts) < len(lines) or len({host.name for host in hosts}) < len(hosts):
        hosts = _parse_each(lines, source)
    if not hosts:
        raise HostfileError(f"{source}: no hosts in it; write one 'NAME slots=N' a line", file=source)
    return hosts


def _parse_each(lines: list[str], source: str) -> list[Host]:
    """Line by line: some are blank, or comments, or folded, or wrong."""
    known: dict[str, int] = {}
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        for host in _line(f"{source}, line {number}", line, source):
            if host.name in known:
                cure = f"it is on line {known[host.name]} too; give each host one line"
                raise HostfileError(
                    f"{source}, line {number}: host {host.name!r} twice; {cure}", file=source, value=line
                )
            known[host.name] = number
            hosts.append(host)
    return hosts


def hosts_from_list(node_list: str, slots: int) -> list[Host]:
    """The hosts of a Slurm node list, with the same slots each.

    Raises:
        NodeListError: the text is not a node list.
        HostfileError: it names a host twice, or none, or slots are below 1.
    """
    return _checked(f"node list {node_list!r}", [Host(name, slots) for name in expand(node_list)])


def hosts_from_slurm(environ: Mapping[str, str], slots: int | None = None) -> list[Host]:
    """The hosts of the Slurm step or job that ``environ`` describes; ``slots``, where given, replaces what it says.

    Raises:
        HostfileError: it describes none, or its variables do not agree; it names those seen.
    """
    in_step = is_step(environ)
    groups = 1 if in_step else _whole(environ.get("SLURM_HET_SIZE", "1"))
    if groups == 1:
        return _hosts_of_component(environ, slots, in_step=in_step)
    parts = [_hosts_of_component(_component(environ, group), slots, in_step=False) for group in range(groups)]
    if not parts:
        raise HostfileError(f"{_seen(environ, 'SLURM_HET_SIZE')}: not a number of components; {_CURE}")
    return _checked(_seen(environ, "SLURM_HET_SIZE"), [host for part in parts for host in part])


def is_step(environ: Mapping[str, str]) -> bool:
    """Whether this is a task of a step; the batch script and the shell of an interactive step are none."""
    return "SLURM_STEP_NODELIST" in environ and is_task(environ)


def _component(environ: Mapping[str, str], group: int) -> dict[str, str]:
    """The variables of one component under their plain names; those of the first stand there without a number too."""
    own: dict[str, str] = dict(environ) if group == 0 else {}
    for ending in (f"_PACK_GROUP_{group}", f"_HET_GROUP_{group}"):  # the older name first
        own |= {name.removesuffix(ending): value for name, value in environ.items() if name.endswith(ending)}
    if "SLURM_JOB_NODELIST" not in own:
        name = f"SLURM_JOB_NODELIST_HET_GROUP_{group}"
        seen = _seen(environ, "SLURM_HET_SIZE")
        raise HostfileError(f"{name}: not set, while {seen}; {_CURE}", key=name)
    return own


def _hosts_of_component(environ: Mapping[str, str], slots: int | None, *, in_step: bool) -> list[Host]:
    node_list, num_nodes, tasks_per_node = _STEP if in_step else _JOB
    nodes = _read(environ, node_list, expand)
    if not nodes:
        found = ", ".join(sorted(name for name in environ if name.startswith("SLURM_"))) or "no SLURM_ variable"
        raise HostfileError(f"{node_list}: not set, so there is no Slurm job here (seen: {found}); give a node list")
    if slots is not None:
        return _checked(_seen(environ, node_list), [Host(name, slots) for name in nodes])
    tasks = _read(environ, tasks_per_node, expand_counts)
    if (tasks and len(tasks) != len(nodes)) or environ.get(num_nodes, str(len(nodes))) != str(len(nodes)):
        seen = _seen(environ, node_list, num_nodes, tasks_per_node)
        raise HostfileError(f"{seen}: they differ in the number of nodes; {_CURE}")
    each = _gpus(environ, len(nodes), tasks, in_step=in_step) or tasks
    if not each:
        raise HostfileError(f"{tasks_per_node}: not set, nor any of {', '.join(GPU_VARIABLES)}; {_CURE}")
    return _checked(_seen(environ, node_list), list(starmap(Host, zip(nodes, each, strict=True))))


def write(path: Path, text: str) -> None:
    """Replace a file as a whole.

    Raises:
        HostfileError: there is no folder for it, something else has its name, or it cannot be written.
    """
    from hpc_ds.run_dir import write_atomic

    target = path.resolve()
    if not target.parent.is_dir():
        raise HostfileError(f"hostfile {str(path)!r}: no folder {str(target.parent)!r}; make it first", file=str(path))
    if path.exists() and not path.is_file():
        raise HostfileError(f"hostfile {str(path)!r}: not a regular file; give another name", file=str(path))
    try:
        write_atomic(target, text)
    except OSError as error:
        cure = "give a file in a folder you can write"
        raise HostfileError(f"hostfile {str(path)!r}: {error.strerror}; {cure}", file=str(path)) from error


def _checked(where: str, hosts: list[Host]) -> list[Host]:
    if not hosts:
        raise HostfileError(f"{where}: no hosts in it; name at least one")
    if len({host.name for host in hosts}) < len(hosts):
        name, times = Counter(host.name for host in hosts).most_common(1)[0]
        raise HostfileError(f"{where}: host {name!r} {times} times; name each host once", value=name)
    for name, slots in hosts:
        if not 0 < slots <= MAX_SLOTS:
            raise HostfileError(f"{where}: slots={slots} for host {name!r}; give 1 to {MAX_SLOTS}", value=slots)
        if not _SINGLE.fullmatch(name):
            raise HostfileError(f"{where}: {name!r} is not the name of one host; give one word", value=name)
    return hosts


def _line(where: str, line: str, source: str) -> list[Host]:
    name, *words = line.split()
    if not words or not words[0].startswith("slots="):
        raise HostfileError(f"{where}: {line.strip()!r} is not a host; write 'NAME slots=N'", file=source, value=line)
    count = words[0].removeprefix("slots=").partition("#")[0]
    slots = _whole(count)
    if not 0 < slots <= MAX_SLOTS:
        raise HostfileError(f"{where}: slots {count!r}; give 1 to {MAX_SLOTS}", file=source, value=line)
    try:
        return [Host(each, slots) for each in ([name] if _SINGLE.fullmatch(name) else expand(name))]
    except NodeListError as error:
        raise HostfileError(f"{where}: {error}", file=source, value=line) from error


def _gpus(environ: Mapping[str, str], num_nodes: int, tasks: list[int], *, in_step: bool) -> list[int]:
    """GPUs of each node; nothing where none were asked for."""
    found = {name: _count_gpus(name, environ[name]) for name in GPU_VARIABLES if environ.get(name)}
    if tasks and found.get("SLURM_GPUS_PER_TASK"):
        return [found["SLURM_GPUS_PER_TASK"] * count for count in tasks]
    total, asked = found.get("SLURM_GPUS", 0), found.get("SLURM_GPUS_PER_NODE", 0)
    here = found.get("SLURM_GPUS_ON_NODE", total if num_nodes == 1 else 0)
    each = (here or asked) if in_step else (asked or here)
    whole = environ.get("SLURM_JOB_NUM_NODES", str(num_nodes)) == str(num_nodes)
    if whole and total and not asked and each * num_nodes != total:
        # --gpus=5 on two nodes is 4 and 1, and no variable says so.
        seen = _seen(environ, "SLURM_GPUS", "SLURM_GPUS_ON_NODE")
        raise HostfileError(f"{seen}: {num_nodes} nodes may have unlike numbers of GPUs; ask with --gpus-per-node")
    return [each] * num_nodes if each else []


def _count_gpus(name: str, value: str) -> int:
    """The number in ``4``, ``a100:4`` or ``a100:2,v100:1``."""
    counts = [_whole(part.rpartition(":")[2]) for part in value.split(",")]
    if min(counts) < 0:
        raise HostfileError(f"{name} {value!r}: not a number of GPUs (4, a100:4); {_CURE}", key=name, value=value)
    return sum(counts)


def _whole(word: str) -> int:
    """The number that a word of digits is, else -1."""
    return int(word) if word.isascii() and word.isdigit() and len(word) < 10 else -1


def _read(environ: Mapping[str, str], name: str, reader: Callable[[str], list[_T]]) -> list[_T]:
    try:
        return reader(environ[name]) if environ.get(name) else []
    except NodeListError as error:
        raise HostfileError(f"{name}: {error}; {_CURE}", key=name, value=environ[name]) from error


def _seen(environ: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name} {environ[name]!r}" for name in names if name in environ)
