"""Slurm node lists: folded text ``gpu[01-04]`` to names and back, as Slurm does it and stricter.

    list   := item (separator item)*       a separator is a run of "," space tab newline; one at either end is ignored
    item   := (text | "[" ranges "]")+     text is made of letters, digits, "-", "_", "."; an item never starts with "-"
    ranges := range ("," range)*           no blanks
    range  := number | number "-" number   each name is padded to the width of the first number

Order and duplicates stay. The last group of an item turns fastest; of the others the *first* does, which is Slurm's
order and not the usual product: ``a[1-2]b[1-2]c[1-2]`` is a1b1c1 a1b1c2 a2b1c1 a2b1c2 a1b2c1 a1b2c2 a2b2c1 a2b2c2.
Text after the last bracket is taken, as Slurm does since 23.11.

What Slurm takes and this refuses: ``n[1-]``, ``n[1, 2]`` (Slurm pads it to n02), an unclosed bracket before 23.02,
numbers of more than 18 digits in brackets (Slurm's counter wraps around), a name that a program would take for an
option, and ``{...}`` hostlist functions, which only the controller can answer.

Source: src/common/hostlist.c of Slurm; compared with ``scontrol show hostnames`` in tests/slurm.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from hpc_ds.errors import NodeListError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_RANGE = 65_536  # hosts in one range: Slurm's limit
MAX_PRODUCT = 1_048_576  # hosts in one item of several brackets: ours, so that a slip does not eat the memory
MAX_DIGITS = 18  # below 2**63, however the digits read

_DIGITS = "0123456789"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + _DIGITS + "-_."
_NAME = str.maketrans("", "", _CHARACTERS)
_LIST = str.maketrans("", "", _CHARACTERS + "[], \t\n")


def expand(text: str) -> list[str]:
    """The names a node list stands for, in Slurm's order, duplicates kept.

    Raises:
        NodeListError: the text is not a node list; it says in which column.
    """
    if unknown := text.translate(_LIST):
        raise NodeListError(text, text.index(unknown[0]) + 1, _unknown(unknown[0]))
    blank = text.replace("\t", " ").replace("\n", " ")
    before, *chunks = blank.split("[")
    words = _outside(text, 1, before)
    names = [word for word in words[:-1] if word]
    prefix, groups, size = words[-1], [], 1
    known: dict[str, list[str]] = {}  # racks are often alike
    column = len(before) + 1  # of the bracket that opens
    for chunk in chunks:
        ranges, closed, after = chunk.partition("]")
        if not closed:
            raise _unclosed(text, column, column + len(chunk) + 1)
        numbers = known.get(ranges) or known.setdefault(ranges, _numbers(text, column + 1, ranges))
        words = _outside(text, column + len(ranges) + 2, after)
        groups.append((numbers, words[0]))
        size *= len(numbers)
        if len(groups) > 1 and size > MAX_PRODUCT:
            raise NodeListError(text, column, f"more than {MAX_PRODUCT} hosts in one item; write several items")
        if len(words) > 1:
            names += _product(prefix, groups)
            names += [word for word in words[1:-1] if word]
            prefix, groups, size = words[-1], [], 1
        column += len(chunk) + 1
    names += _product(prefix, groups)
    if (option := f" {blank}".replace(",", " ").find(" -")) >= 0:
        raise NodeListError(text, option + 1, "a host name does not start with '-'; remove it")
    return names


def fold(names: Iterable[str]) -> str:
    """The shortest text Slurm would print for these names: ``expand(fold(names)) == list(names)``.

    As in ``scontrol show hostlist``, only neighbours fold, and only by their last number: nothing is sorted or dropped.

    Raises:
        NodeListError: one of them is not the name of a host.
    """
    items: list[str] = []
    for (prefix, numbered), pairs in groupby(map(_split, names), key=lambda pair: (pair[0], pair[1] != "")):
        numbers = [number for _, number in pairs]
        if not numbered:
            items += [prefix] * len(numbers)
        elif len(numbers) == 1:
            items.append(prefix + numbers[0])
        else:
            items.append(f"{prefix}[{_ranges(numbers)}]")
    return ",".join(items)


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers, at least one, sorted and with neighbours folded: ``1-3,7``."""
    return _ranges(list(map(str, sorted(numbers))))


def expand_counts(text: str) -> list[int]:
    """The counts of ``SLURM_TASKS_PER_NODE`` and its kind, one a node: ``2(x3),1`` is 2 2 2 1.

    Raises:
        NodeListError: the text is not of this form; it says in which column.
    """
    counts: list[int] = []
    column = 1
    for part in text.split(","):
        count, repeated, rest = part.partition("(x")
        times, closed, after = rest.partition(")") if repeated else ("1", ")", "")
        if not (_number(count) and _number(times) and closed and not after):
            raise NodeListError(text, column, f"{part!r} is not a count; write N or N(xTIMES), parted by commas")
        if not 0 < int(times) <= MAX_RANGE:
            raise NodeListError(text, column, f"{part!r} repeats {int(times)} times; write 1 to {MAX_RANGE}")
        counts += [int(count)] * int(times)
        column += len(part) + 1
    return counts


def _outside(text: str, column: int, part: str) -> list[str]:
    """The words of a part outside brackets; the first and the last may be empty or touch a bracket."""
    if "]" in part:
        raise NodeListError(text, column + part.index("]"), "']' closes nothing; add the '[' or remove it")
    return part.replace(",", " ").split(" ")


def _numbers(text: str, column: int, ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        low, dash, high = part.partition("-")
        if dash and _number(low) and _number(high):
            start, stop = int(low), int(high) + 1
            if stop <= start:
                raise NodeListError(text, column, f"range {part!r} runs backwards; write the smaller number first")
            if stop - start > MAX_RANGE:
                raise NodeListError(text, column, f"range {part!r} has more than {MAX_RANGE} hosts; write it as two")
            plain = map(str, range(start, stop))
            numbers += [number.zfill(len(low)) for number in plain] if low[0] == "0" else plain
        elif not dash and _number(low):
            numbers.append(low)
        else:
            raise _not_a_range(text, column, part)
        column += len(part) + 1
    return numbers


def _product(prefix: str, groups: list[tuple[list[str], str]]) -> list[str]:
    if not groups:
        return [prefix] if prefix else []
    heads = [prefix]
    for numbers, literal in groups[:-1]:
        heads = [head + number + literal for number in numbers for head in heads]
    numbers, suffix = groups[-1]
    return [head + number + suffix for head in heads for number in numbers]


def _split(name: str) -> tuple[str, str]:
    """A name without its last number, and that number; without one that can be folded, the name and nothing."""
    unknown = name.translate(_NAME)
    if unknown or not name or name[0] == "-":
        column = name.index(unknown[0]) + 1 if unknown else 1
        raise NodeListError(name, column, "not the name of one host; use letters, digits, '.', '_', and '-' inside")
    prefix = name.rstrip(_DIGITS)
    number = name[len(prefix) :]
    return (prefix, number) if len(number) <= MAX_DIGITS else (name, "")


def _ranges(numbers: list[str]) -> str:
    parts: list[str] = []
    low = high = numbers[0]
    hosts = 1
    for number in numbers[1:]:
        if hosts < MAX_RANGE and number == str(int(high) + 1).zfill(len(low)):
            high, hosts = number, hosts + 1
            continue
        parts.append(low if hosts == 1 else f"{low}-{high}")
        low, high, hosts = number, number, 1
    parts.append(low if hosts == 1 else f"{low}-{high}")
    return ",".join(parts)


def _number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS


def _unknown(character: str) -> str:
    if character in "{}":
        return "hostlist functions '{...}' are answered by the Slurm controller only; write the nodes themselves"
    return f"{character!r} is in no host name; use letters, digits, '-', '_', '.' and brackets"


def _unclosed(text: str, column: int, following: int) -> NodeListError:
    if following <= len(text):
        return NodeListError(text, following, f"'[' inside the bracket of column {column}; close that one first")
    return NodeListError(text, column, "'[' is never closed; add the ']'")


def _not_a_range(text: str, column: int, part: str) -> NodeListError:
    if " " in part:
        return NodeListError(text, column + part.index(" "), "blank inside a bracket; remove it")
    if not part:
        return NodeListError(text, column, "a number is missing; write N or N-M, parted by commas")
    if part.replace("-", "").isdigit() and len(part) > MAX_DIGITS:
        return NodeListError(text, column, f"a number of more than {MAX_DIGITS} digits; write the names one by one")
    return NodeListError(text, column, f"{part!r} is not a number or a range; write N or N-M")
