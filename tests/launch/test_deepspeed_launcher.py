"""The same command lines, hostfiles and filters through DeepSpeed's own launcher and ours: the same resources come out.

Where they do not, one of the two refuses, and the reason is one of those listed below; neither ever takes something else
in silence but for names in brackets, which are one host to DeepSpeed. One process of the peer answers all questions.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from deepspeed_peer import FOLDER, FOR_EVERY_RANK, FOREIGN_PREFIXES

from hpc_ds.cli.run_options import parse
from hpc_ds.errors import HpcdsError
from hpc_ds.launch.resources import Wish, choose

if TYPE_CHECKING:
    from pathlib import Path

# Reads cases from one file and writes answers to another: its words on stdout are many.
PEER = """
import argparse, contextlib, io, json, sys
from deepspeed.launcher import runner

def resources(case, path):
    open(path, "w", newline="").write(case["hostfile"])
    pool = runner.fetch_hostfile(path)
    nodes, gpus = case["num_nodes"], case["num_gpus"]
    if (nodes >= 0 or gpus >= 0) and (case["include"] or case["exclude"]):
        raise ValueError("Cannot specify num_nodes/gpus with include/exclude")  # as its main() does
    active = runner.parse_inclusion_exclusion(pool, case["include"], case["exclude"])
    return {host: list(slots) for host, slots in runner.apply_num_nodes_and_gpus(active, nodes, gpus).items()}

def line(words):
    try:
        return vars(runner.parse_args(words))
    except SystemExit:
        raise ValueError("refused") from None

def answer(ask, *args):
    try:
        return ask(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

cases = json.load(open(sys.argv[1]))
with contextlib.redirect_stderr(io.StringIO()):
    answers = {
        "resources": [answer(resources, case, sys.argv[1] + ".hosts") for case in cases["resources"]],
        "lines": [answer(line, words) for words in cases["lines"]],
    }
json.dump(answers, open(sys.argv[2], "w"))
"""

PLAIN = "w0 slots=4\nw1 slots=4\nw2 slots=2\n"
# hostfile, include, exclude, num_nodes, num_gpus
ALIKE = [
    (PLAIN, "", "", -1, -1),
    ("# two\n\n  w1\t slots=4  \nw0 slots=2 # slow\r\n", "", "", -1, -1),
    ("w0 slots=4 max_slots=8\n", "", "", -1, -1),
    ("me@w0 slots=1\n10.0.0.2 slots=1\nfe80::1 slots=1\n", "", "", -1, -1),
    (PLAIN, "w0", "", -1, -1),
    (PLAIN, "w0@w1:0,2", "", -1, -1),
    (PLAIN, "w2@w0:1", "", -1, -1),
    (PLAIN, "w0:3,1,3", "", -1, -1),
    (PLAIN, "w0:0@w1:1@w0:2", "", -1, -1),
    (PLAIN, "w1@w1", "", -1, -1),
    (PLAIN, "", "w0", -1, -1),
    (PLAIN, "", "w0:0,1@w2:0,1", -1, -1),
    (PLAIN, "", "w1:0@w0", -1, -1),
    (PLAIN, "", "", 2, -1),
    (PLAIN, "", "", -1, 2),
    (PLAIN, "", "", 1, 3),
]
BOTH_REFUSE = [
    ("", "", "", -1, -1),
    ("# none\n", "", "", -1, -1),
    ("w0\n", "", "", -1, -1),
    ("w0:4\n", "", "", -1, -1),
    ("w0 slots = 4\n", "", "", -1, -1),
    ("w0 SLOTS=4\n", "", "", -1, -1),
    ("w0 slots=a\n", "", "", -1, -1),
    ("w0 slots=-1\n", "", "", -1, -1),
    ("w0 slots=4\nw0 slots=2\n", "", "", -1, -1),
    (PLAIN, "w9", "", -1, -1),
    (PLAIN, "w0:4", "", -1, -1),
    (PLAIN, "w0:", "", -1, -1),
    (PLAIN, "w0:0-2", "", -1, -1),
    (PLAIN, "w0:a", "", -1, -1),
    (PLAIN, "w0:0:1", "", -1, -1),
    (PLAIN, "w0@", "", -1, -1),
    (PLAIN, "@w0", "", -1, -1),
    (PLAIN, "w0,w1", "", -1, -1),
    (PLAIN, "w0:1_0", "", -1, -1),
    (PLAIN, " w0", "", -1, -1),
    (PLAIN, "w0", "w1", -1, -1),
    (PLAIN, "w0", "", 1, -1),
    (PLAIN, "", "w0", -1, 1),
]
# What DeepSpeed takes and we refuse -> the start of our reason, after the words that say where.
ONLY_WE_REFUSE = {
    ("w0 slots=0\n", "", "", -1, -1): "slots '0'; give 1 to 65536",  # no ranks there, and it says nothing
    ("w0 slots=4x\n", "", "", -1, -1): "slots '4x'; give",
    ("-w0 slots=4\n", "", "", -1, -1): "does not start with '-'",
    (PLAIN, "", "", 4, -1): "--num_nodes 4: there are 3",  # it runs on fewer
    (PLAIN, "", "", -1, 4): "--num_gpus 4: host 'w2' has 2",  # it invents slots
    (PLAIN, "", "", 0, -1): "--num_nodes 0: not a number of any use",  # it means all
    (PLAIN, "", "w0@w1@w2", -1, -1): "nothing is left",  # an empty dictionary, and an IndexError later
    (PLAIN, "w0@w0:1", "", -1, -1): "host 'w0' is named whole and by slots",  # it takes one slot
    (PLAIN, "w0: 1", "", -1, -1): "' 1' is not a slot",
    (PLAIN, "w0:+1", "", -1, -1): "'+1' is not a slot",
}
# What DeepSpeed refuses and we take -> what we take.
ONLY_DEEPSPEED_REFUSES: dict[tuple[str, str, str, int, int], dict[str, list[int]]] = {
    ("me@w0 slots=2\n", "me@w0:1", "", -1, -1): {"me@w0": [1]},
    ("fe80::1 slots=2\n", "fe80::1:1", "", -1, -1): {"fe80::1": [1]},
    (PLAIN, "w[0-1]:1", "", -1, -1): {"w0": [1], "w1": [1]},
}
# Names in brackets are one host to DeepSpeed, which ssh then does not find.
TAKEN_OTHERWISE = {
    ("w[0-1] slots=2\n", "", "", -1, -1): {"w0": [0, 1], "w1": [0, 1]},
    ("w0,w1 slots=1\n", "", "", -1, -1): {"w0": [0], "w1": [0]},
}
# Our reasons that DeepSpeed does not know, for cases made by chance.
OUR_REASONS = (
    "named whole and by slots", "nothing is left", "--num_nodes", "--num_gpus", "slots '0", "give 1 to 65536", "is not a slot",
)  # fmt: skip

LINES = [
    "train.py",
    "train.py --master_port 3 -q --help -- x",
    "-H hosts -i w0:0@w1 train.py --lr 1",
    "--hostfile=hosts --exclude w0 --num_nodes -1 --num_gpus -1 train.py",
    "--num_gpus 2 --num_nodes=1 --master_port 29501 --master_addr m train.py",
    "--num_accelerators 2 train.py",
    "--launcher PDSH --launcher_args=-v --force_multi --ssh_port 23 train.py",
    "--module --no_local_rank --no_ssh --node_rank 1 --no_ssh_check --save_pid pkg.train a",
    "--no_python -q --log_level debug --venv_script v prog",
    "--bind_cores_to_rank --bind_core_list 0-3,5 --enable_each_rank_log logs train.py",
    "--autotuning run train.py",
    "-Hhosts -iw0 --host other --bind_core_l 1 --save train.py",
    "-qHhosts --no_s train.py",
    "",
    "--num_gpus two train.py",
    "--num 2 train.py",
    "--nodes 2 train.py",
    "--quiet=1 train.py",
    "--num_gpus",
]


def made_by_chance(number: int) -> list[tuple[str, str, str, int, int]]:
    chance = random.Random(7)
    names = ["w0", "w1", "w2", "w3"]
    cases = []
    for _ in range(number):
        hosts = chance.sample(names, chance.randint(1, 4))
        text = "".join(f"{host} slots={chance.randint(1, 4)}\n" for host in hosts)
        specs = []
        for _ in range(chance.randint(0, 3)):
            slots = ",".join(chance.choice(["0", "1", "2", "3", "", "x"][: chance.choice([4, 4, 4, 6])]) for _ in "12")
            specs.append(chance.choice(names) + (f":{slots}" if chance.random() < 0.6 else ""))
        filters = ["@".join(specs), ""]
        chance.shuffle(filters)
        first = (
            [chance.choice([-1, 1, 2]), chance.choice([-1, 1, 2])] if not specs or chance.random() < 0.1 else [-1, -1]
        )
        cases.append((text, filters[0], filters[1], first[0], first[1]))
    return cases


# Lines of hostfiles, put together by chance: the escapes are blanks, digits and line ends of other alphabets.
NOISE = [
    "w0 slots=2", "\tw1   slots=4 # the slow one", "w2 slots=4 max_slots=8", "w3\tslots=1\r", "", " ", "#", "  # w4 slots=4",
    "w4 slots=", "w4 slots=4x", "w4 slots=0", "w4 slots=01", "w4", "w4 gpus slots=2", "w4\u00a0slots=2", "w4 slots=\uff12",
    "w4 slots=2\x0bw5 slots=2", "w4 slots=2\u2028w5 slots=2", "w4 slots=2\rw5 slots=2", "w4 slots=2\x00", "w4 slots=2,",
]  # fmt: skip


def noisy(number: int) -> list[tuple[str, str, str, int, int]]:
    chance = random.Random(11)
    return [("\n".join(chance.sample(NOISE, chance.randint(1, 4))) + "\n", "", "", -1, -1) for _ in range(number)]


CHANCE = [*made_by_chance(600), *noisy(400)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, Any]]:
    """What DeepSpeed answers to every case: its resources or values, or what it raised as text."""
    assert FOLDER.exists(), f"{FOLDER}: the real DeepSpeed is not there; run python tests/install_deepspeed_peer.py"
    folder = tmp_path_factory.mktemp("peer")
    cases = [*ALIKE, *BOTH_REFUSE, *ONLY_WE_REFUSE, *ONLY_DEEPSPEED_REFUSES, *TAKEN_OTHERWISE, *CHANCE]
    names = ("hostfile", "include", "exclude", "num_nodes", "num_gpus")
    asked = {
        "resources": [dict(zip(names, case, strict=True)) for case in cases],
        "lines": [line.split() for line in LINES],
    }
    (folder / "cases").write_text(json.dumps(asked))
    environ = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    command = [sys.executable, "-c", PEER, str(folder / "cases"), str(folder / "answers")]
    environ |= {**FOR_EVERY_RANK, "PYTHONPATH": str(FOLDER)}
    subprocess.run(command, env=environ, cwd=folder, stdout=subprocess.DEVNULL, check=True, timeout=400)
    answers = json.loads((folder / "answers").read_text())
    return {
        "resources": dict(zip(cases, answers["resources"], strict=True)),
        "lines": dict(zip(LINES, answers["lines"], strict=True)),
    }


def ours(case: tuple[str, str, str, int, int], folder: Path) -> dict[str, list[int]] | str:
    """What we answer, in the same form."""
    text, include, exclude, num_nodes, num_gpus = case
    (folder / "hosts").write_text(text, newline="")
    nodes, gpus = (None if number == -1 else number for number in (num_nodes, num_gpus))
    try:
        taken = choose(Wish(str(folder / "hosts"), include, exclude, nodes, gpus, launcher="ssh", force_multi=True), {})
    except HpcdsError as error:
        return str(error)
    return {
        host.name: list(range(host.ranks)) if host.devices is None else list(map(int, host.devices))
        for host in taken.hosts
    }


def in_order(resources: Any) -> Any:
    return list(resources.items()) if isinstance(resources, dict) else "refused"


@pytest.mark.ranks
def test_the_same_resources(theirs: dict[str, dict[Any, Any]], tmp_path: Path) -> None:
    resources = theirs["resources"]
    for case in ALIKE:
        assert isinstance(resources[case], dict), (case, resources[case])
        assert in_order(ours(case, tmp_path)) == in_order(resources[case]), case
    for case in BOTH_REFUSE:
        assert (in_order(ours(case, tmp_path)), in_order(resources[case])) == ("refused", "refused"), case


@pytest.mark.ranks
def test_the_differences_are_those_that_are_listed(theirs: dict[str, dict[Any, Any]], tmp_path: Path) -> None:
    resources = theirs["resources"]
    for case, reason in ONLY_WE_REFUSE.items():
        answer = ours(case, tmp_path)
        assert isinstance(answer, str)
        assert reason in answer, (case, answer)
        assert isinstance(resources[case], dict), case
    for case, expected in ONLY_DEEPSPEED_REFUSES.items():
        assert (ours(case, tmp_path), in_order(resources[case])) == (expected, "refused"), case
    for case, expected in TAKEN_OTHERWISE.items():
        assert ours(case, tmp_path) == expected
        assert list(resources[case]) == [case[0].split()[0]]


@pytest.mark.ranks
def test_nothing_else_differs_in_cases_made_by_chance(theirs: dict[str, dict[Any, Any]], tmp_path: Path) -> None:
    alike = refused = 0
    for case in CHANCE:
        mine, their = ours(case, tmp_path), theirs["resources"][case]
        if isinstance(mine, str) and isinstance(their, dict):
            assert any(reason in mine for reason in OUR_REASONS), (case, mine, their)
            continue
        assert in_order(mine) == in_order(their), (case, mine, their)
        alike += isinstance(mine, dict)
        refused += isinstance(mine, str)
    assert alike > 100
    assert refused > 100


@pytest.mark.ranks
def test_the_same_command_lines(theirs: dict[str, dict[Any, Any]]) -> None:
    for text in LINES:
        their = theirs["lines"][text]
        try:
            line = parse(text.split())
        except HpcdsError:
            assert their == "ValueError: refused", text
            continue
        if line.script is None:
            assert their == "ValueError: refused", text
            continue
        assert isinstance(their, dict), (text, their)
        assert (line.script, line.args) == (their["user_script"], their["user_args"]), text
        for name, value in line.values.items():
            assert their[name] == value, (text, name)
        defaults = theirs["lines"]["train.py"]
        given = {name for name in defaults if their[name] != defaults[name]} - {"user_script", "user_args"}
        assert given <= set(line.values), text
