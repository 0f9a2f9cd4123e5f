"""Node lists against Slurm itself: ``scontrol show hostnames`` and ``show hostlist`` on thousands of made-up lists.

Only the client is asked; no controller runs. Many lists go into one call, parted by a name that none of them makes.

Left out, because not every Slurm knows them: text after the last bracket (22.05 calls it invalid, 23.11 takes it) and
newlines (a separator since 23.02). Left out, because we refuse what Slurm takes: ``n[1-]``, blanks in brackets, numbers
of 19 digits and more in brackets, a name that starts with "-".
"""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING, TypeAlias

import pytest

from hpc_ds.errors import NodeListError
from hpc_ds.launch.node_list import expand, fold

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slurm

LISTS = 4000
LISTS_A_CALL = 200
FOLDED = 300
MARK = "next-list"

# Slurm's exit status is 0 for all of these; each is invalid, or garbage (an unclosed bracket gives a host "n]").
INVALID = ["n[]", "n[1,]", "n[1,,2]", "n[a]", "n[3-1]", "n[1-65537]", "n[1]]", "n[1-2-3]", "n[1-2", "n["]

Scontrol: TypeAlias = "Callable[[str, str], list[str]]"


@pytest.fixture
def scontrol(tmp_path: Path) -> Scontrol:
    """``scontrol show WHAT TEXT`` as lines, with a configuration that only this test sees."""
    config = tmp_path / "slurm.conf"
    config.write_text("ClusterName=oracle\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=p Nodes=n1\n")
    environ = {**os.environ, "SLURM_CONF": str(config)}

    def show(what: str, text: str) -> list[str]:
        command = ["scontrol", "show", what, text]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()

    return show


def a_number(chance: random.Random) -> str:
    return f"{chance.choice([0, 1, 7, 9, 10, 98, 99, 100, 999, chance.randrange(2000)]):0{chance.randint(1, 5)}}"


def a_range(chance: random.Random) -> str:
    low = a_number(chance)
    if chance.random() < 0.4:
        return low
    high = int(low) + chance.choice([0, 1, 2, 5, 12])
    return f"{low}-{high:0{chance.randint(1, 5)}}"


def an_item(chance: random.Random) -> str:
    item = chance.choice(["n", "gpu-a100-", "r1.n", "x_", "", "0", "n09"])
    brackets = chance.choice([0, 1, 1, 1, 2, 2, 3, 4])
    for _ in range(brackets):
        ranges = ",".join(a_range(chance) for _ in range(chance.choice([1, 1, 2, 3] if brackets < 3 else [1, 1, 2])))
        item += chance.choice(["", "", "n", "-" if item else "", "c0"]) + f"[{ranges}]"
    return item if brackets else f"{item or 'm'}{chance.choice(['', '-ib', '.org', a_number(chance)])}"


def a_list(chance: random.Random) -> str:
    separators = [",", ",", ",", " ", "\t", ",,", ", "]
    text = chance.choice(["", "", "", ",", " "])
    for _ in range(chance.choice([1, 1, 2, 3, 5])):
        text += an_item(chance) + chance.choice(separators)
    return text if chance.random() < 0.2 else text.rstrip(", \t")


def some_names(chance: random.Random) -> list[str]:
    names: list[str] = []
    for _ in range(chance.randint(1, 6)):
        prefix, low, width = chance.choice(["n", "m", "r1n", ""]), int(a_number(chance)), chance.randint(1, 4)
        names += [f"{prefix}{number:0{width}}" for number in range(low, low + chance.choice([1, 1, 2, 5]))]
        names += chance.choice([[], [], names[-1:], ["n"], ["n1-ib", "n2-ib"]])
    return names


def test_expands_thousands_of_lists_as_slurm_does(scontrol: Scontrol) -> None:
    chance = random.Random(2205)
    for _ in range(LISTS // LISTS_A_CALL):
        lists = [a_list(chance) for _ in range(LISTS_A_CALL)]
        answers = "\n".join(scontrol("hostnames", f",{MARK},".join(lists))).split(MARK)
        assert len(answers) == len(lists)
        for text, answer in zip(lists, answers, strict=True):
            assert expand(text) == answer.split(), text


def test_folds_as_slurm_prints(scontrol: Scontrol) -> None:
    chance = random.Random(2311)
    for _ in range(FOLDED):
        names = some_names(chance)
        assert [fold(names)] == scontrol("hostlist", ",".join(names))
        assert expand(fold(names)) == names


def test_slurm_reads_back_what_fold_writes(scontrol: Scontrol) -> None:
    names = [f"n{number:05}" for number in range(70_000)]
    assert scontrol("hostnames", fold(names)) == names


@pytest.mark.parametrize("text", INVALID)
def test_what_slurm_calls_invalid_is_refused(scontrol: Scontrol, text: str) -> None:
    assert not set(scontrol("hostnames", text)) - {"n]"}
    with pytest.raises(NodeListError):
        expand(text)
