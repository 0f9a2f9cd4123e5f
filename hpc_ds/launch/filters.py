"""Which of the hosts and slots that there are a launch takes: ``--include``, ``--exclude``, ``--num_nodes``, ``--num_gpus``.

    filter := spec ("@" spec)*                 worker-2:0@worker-3:0,1
    spec   := name | name ":" slot ("," slot)*  a name alone is all its slots
    name   := a host of the hostfile, or a folded list of them, gpu[01-04]
    slot   := a number from 0

The result has the order of the hostfile, whatever the order of the filter. A host may be named several times
(``n1:0@n1:1`` is ``n1:0,1``), not both whole and by slots. A host of which nothing is left is dropped.

Source: https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/launcher/runner.py (as mended by its #8239).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.errors import ConfigError, HostfileError, NodeListError
from hpc_ds.launch.node_list import expand

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hpc_ds.launch.hostfile import Host


class Taken(NamedTuple):
    """What a launch takes of one host.

    Attributes:
        slots: in rising order.
        whole: whether these are all that the host has.
    """

    name: str
    slots: Sequence[int]
    whole: bool


class _Spec(NamedTuple):
    """One part of a filter; slots are None for a whole host."""

    name: str
    slots: list[int] | None
    column: int


def take_all(hosts: Iterable[Host]) -> list[Taken]:
    """All slots of all hosts."""
    return [Taken(name, range(slots), whole=True) for name, slots in hosts]


def take_included(hosts: Sequence[Host], include: str) -> list[Taken]:
    """What ``--include`` names.

    Raises:
        HostfileError: it is malformed, or names a host or slot that is not there; it says in which column.
    """
    wanted = _wanted("--include", include, dict(hosts))
    return [_taken(name, slots, wanted[name]) for name, slots in hosts if name in wanted]


def take_not_excluded(hosts: Sequence[Host], exclude: str) -> list[Taken]:
    """What ``--exclude`` leaves.

    Raises:
        HostfileError: as for ``--include``, or nothing is left.
    """
    unwanted = _wanted("--exclude", exclude, dict(hosts))
    left = []
    for name, slots in hosts:
        if name not in unwanted:
            left.append(Taken(name, range(slots), whole=True))
        elif (gone := unwanted[name]) is not None and len(gone) < slots:
            left.append(Taken(name, [slot for slot in range(slots) if slot not in gone], whole=False))
    if not left:
        raise HostfileError(f"--exclude {exclude!r}: nothing is left; exclude less", key="exclude", value=exclude)
    return left


def take_first(hosts: Sequence[Host], num_nodes: int | None, num_gpus: int | None) -> list[Taken]:
    """The first hosts, and of each the first slots; None is all of them.

    Raises:
        ConfigError: there are not so many.
    """
    for key, number in (("num_nodes", num_nodes), ("num_gpus", num_gpus)):
        if number is not None and number < 1:
            raise ConfigError(f"--{key} {number}: not a number of any use; give 1 or more", key=key, value=number)
    if num_nodes is not None and num_nodes > len(hosts):
        there = f"there are {len(hosts)}" if len(hosts) > 1 else "there is one host"
        raise ConfigError(
            f"--num_nodes {num_nodes}: {there}; give a hostfile with more, or ask for less",
            key="num_nodes",
            value=num_nodes,
        )
    first = hosts[:num_nodes]
    if num_gpus is None:
        return take_all(first)
    few = next((host for host in first if host.slots < num_gpus), None)
    if few is not None:
        raise ConfigError(
            f"--num_gpus {num_gpus}: host {few.name!r} has {few.slots}; ask for at most that many, or name slots "
            "with --include",
            key="num_gpus",
            value=num_gpus,
        )
    return [Taken(name, range(num_gpus), whole=num_gpus == slots) for name, slots in first]


def _taken(name: str, slots: int, wanted: set[int] | None) -> Taken:
    if wanted is None or len(wanted) == slots:
        return Taken(name, range(slots), whole=True)
    return Taken(name, sorted(wanted), whole=False)


def _wanted(option: str, text: str, there: dict[str, int]) -> dict[str, set[int] | None]:
    """Host -> the slots that the filter names; None for all of them."""
    wanted: dict[str, set[int] | None] = {}
    for name, slots, column in _specs(option, text, there):
        if name not in there:
            raise _error(option, text, column, f"no host {name!r}; there are {_few(there)}")
        if name in wanted and (wanted[name] is None) != (slots is None):
            raise _error(option, text, column, f"host {name!r} is named whole and by slots; name it once")
        if slots is None:
            wanted[name] = None
            continue
        if (high := max(slots)) >= there[name]:
            number = there[name]
            has = f"has slots 0 to {number - 1}" if number > 1 else "has slot 0 only"
            raise _error(option, text, column, f"host {name!r} has no slot {high}; it {has}")
        wanted[name] = (wanted.get(name) or set()) | set(slots)
    return wanted


def _specs(option: str, text: str, there: dict[str, int]) -> Iterator[_Spec]:
    column = 1
    known: dict[str, list[int]] = {}  # hosts are often alike
    pieces = iter(text.split("@"))
    for piece in pieces:
        spec = piece
        name = _name_of(spec, there)
        if name not in there and (longer := _with_user(spec, text[column + len(spec) :], there)):
            spec, name = longer
            next(pieces)
        if not spec:
            raise _error(option, text, column, "a host is missing; write NAME or NAME:SLOT,SLOT, parted by '@'")
        slots = None
        if len(spec) > len(name):
            words = spec[len(name) + 1 :]
            slots = known.get(words) or known.setdefault(words, _slots(option, text, column + len(name) + 1, words))
        for one in _names(option, text, column, name):
            yield _Spec(one, slots, column)
        column += len(spec) + 1


def _with_user(user: str, following: str, there: dict[str, int]) -> tuple[str, str] | None:
    """A spec and its host, where "@" stands in the name of the host: ``me@worker-1:0``."""
    if not following:
        return None
    spec = f"{user}@{following.partition('@')[0]}"
    name = _name_of(spec, there)
    return (spec, name) if name in there else None


def _name_of(spec: str, there: dict[str, int]) -> str:
    """The host of a spec. ":" also stands in names that are addresses of IPv6."""
    if spec in there or ":" not in spec:
        return spec
    name, _, slots = spec.rpartition(":")
    # "n1:0:1" is no address: what is wrong there is the second part.
    return name if name in there or slots == "" or ":" not in name else spec.partition(":")[0]


def _names(option: str, text: str, column: int, name: str) -> list[str]:
    if "[" not in name:
        return [name]
    try:
        return expand(name)
    except NodeListError as error:
        raise _error(option, text, column + error.column - 1, str(error).partition(": ")[2]) from error


def _slots(option: str, text: str, column: int, slots: str) -> list[int]:
    numbers = []
    for word in slots.split(","):
        if not (word.isascii() and word.isdigit() and len(word) < 10):
            what = f"{word!r} is not a slot" if word else "a slot is missing"
            raise _error(option, text, column, f"{what}; write whole numbers from 0, parted by ','")
        numbers.append(int(word))
        column += len(word) + 1
    return numbers


def _few(there: dict[str, int]) -> str:
    names = list(there)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _error(option: str, text: str, column: int, problem: str) -> HostfileError:
    return HostfileError(f"{option} {text!r}, column {column}: {problem}", key=option.removeprefix("--"), value=text)
