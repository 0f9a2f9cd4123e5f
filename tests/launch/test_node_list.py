"""Node lists: what each text stands for, where a wrong one is wrong, and that folding loses nothing.

Expected values are Slurm's own (``scontrol show hostnames``); tests/slurm/test_node_list_oracle.py asks it again.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.errors import NodeListError
from hpc_ds.launch.node_list import MAX_PRODUCT, MAX_RANGE, expand, expand_counts, fold

if TYPE_CHECKING:
    from collections.abc import Callable

EXPANSIONS = {
    "": "",
    " ,\t\n, ": "",
    "n1": "n1",
    "alpha,beta": "alpha beta",
    "n1,n1": "n1 n1",
    "n3,n1,n2": "n3 n1 n2",
    ",,n1 \t\nn2,": "n1 n2",
    "n[1-3]": "n1 n2 n3",
    "n[2,1,2]": "n2 n1 n2",
    "[1-3]": "1 2 3",
    "n[09-11]": "n09 n10 n11",
    "n[1-03]": "n1 n2 n3",
    "n[0001-3]": "n0001 n0002 n0003",
    "n[099-100]": "n099 n100",
    "n[0-1]": "n0 n1",
    "n[00-01]": "n00 n01",
    "n[001-003,10]": "n001 n002 n003 n10",
    "n[01,1]": "n01 n1",
    "n[7-7]": "n7",
    "a[1-2],b,c[3]": "a1 a2 b c3",
    "a b[1-2] c": "a b1 b2 c",
    "r[1-2]n[1-2]": "r1n1 r1n2 r2n1 r2n2",
    "n[1-2][3-4]": "n13 n14 n23 n24",
    "n[1-2]x[3],q": "n1x3 n2x3 q",
    "gpu-a100-[1-2]": "gpu-a100-1 gpu-a100-2",
    "n[1-2]-ib": "n1-ib n2-ib",
    "n[1-2].cluster.org,m": "n1.cluster.org n2.cluster.org m",
    "a[1-2]b[1-2]c[1-2]": "a1b1c1 a1b1c2 a2b1c1 a2b1c2 a1b2c1 a1b2c2 a2b2c1 a2b2c2",
    "n[1-2][3-4][5-6]": "n135 n136 n235 n236 n145 n146 n245 n246",
    "a[1-2]b[1]c[1-2]d[1-2]": "a1b1c1d1 a1b1c1d2 a2b1c1d1 a2b1c1d2 a1b1c2d1 a1b1c2d2 a2b1c2d1 a2b1c2d2",
    "n[999999999999999999]": "n999999999999999999",
    "n99999999999999999999": "n99999999999999999999",
}

REFUSALS = {
    "n[1-2": (2, "'[' is never closed; add the ']'"),
    "n[": (2, "'[' is never closed"),
    "m[1],n[1-2,k": (7, "'[' is never closed"),
    "n[[1-2]]": (3, "'[' inside the bracket of column 2; close that one first"),
    "n]": (2, "']' closes nothing"),
    "n[1]]": (5, "']' closes nothing"),
    "n[1],m]": (7, "']' closes nothing"),
    "n[]": (3, "a number is missing"),
    "n[1,]": (5, "a number is missing"),
    "n[1,,2]": (5, "a number is missing"),
    "n[1-]": (3, "'1-' is not a number or a range; write N or N-M"),
    "n[-1]": (3, "'-1' is not a number or a range"),
    "n[1-2-3]": (3, "'1-2-3' is not a number or a range"),
    "n[1-4/2]": (6, "'/' is in no host name"),
    "n[a-b]": (3, "'a-b' is not a number or a range"),
    "n[1, 2]": (5, "blank inside a bracket; remove it"),
    "n[1 -2]": (4, "blank inside a bracket"),
    "n[1\n]": (4, "blank inside a bracket"),
    "n[3-1]": (3, "range '3-1' runs backwards; write the smaller number first"),
    "n[0-65536]": (3, "range '0-65536' has more than 65536 hosts; write it as two"),
    "n[1-1234567890123456789]": (3, "a number of more than 18 digits; write the names one by one"),
    "m,n[1,1234567890123456789]": (7, "a number of more than 18 digits"),
    "n[1-2000]m[1-2000]": (11, "more than 1048576 hosts in one item; write several items"),
    "-n1": (1, "a host name does not start with '-'; remove it"),
    "n1,-oProxyCommand": (4, "a host name does not start with '-'"),
    "block{4}": (6, "hostlist functions '{...}' are answered by the Slurm controller only; write the nodes themselves"),
    "n1;rm": (3, "';' is in no host name"),
    "n1\r\nn2": (3, r"'\r' is in no host name"),
    "nœud1": (2, "'œ' is in no host name"),
    "n[1-\N{SUPERSCRIPT TWO}]": (5, "is in no host name"),
}

FOLDS = {
    "": "",
    "n5": "n5",
    "n1 n2 n3": "n[1-3]",
    "n3 n1 n2": "n[3,1-2]",
    "n3 n4 n1 n2": "n[3-4,1-2]",
    "n1 n1": "n[1,1]",
    "n1 n2 n2 n3": "n[1-2,2-3]",
    "foo foo": "foo,foo",
    "n n1 n2": "n,n[1-2]",
    "n1 m1 n2": "n1,m1,n2",
    "n09 n10 n11": "n[09-11]",
    "n9 n10 n11": "n[9-11]",
    "n1 n01": "n[1,01]",
    "n01 n2": "n[01,2]",
    "n9 n010": "n[9,010]",
    "n099 n100": "n[099-100]",
    "n001 n002 n3": "n[001-002,3]",
    "5 6 7": "[5-7]",
    "r1n01 r1n02 r2n01": "r1n[01-02],r2n01",
    "n1-ib n2-ib": "n1-ib,n2-ib",
    "n1234567890123456789 n1234567890123456790": "n1234567890123456789,n1234567890123456790",
    "n999999999999999999 n1000000000000000000": "n999999999999999999,n1000000000000000000",
}

COUNTS = {
    "1": [1],
    "2(x3),1": [2, 2, 2, 1],
    "5,1(x2)": [5, 1, 1],
    "72(x1)": [72],
    "0,4": [0, 4],
}

NOT_COUNTS = {
    "": (1, "'' is not a count; write N or N(xTIMES), parted by commas"),
    "2,": (3, "'' is not a count"),
    "1,2(x3": (3, "'2(x3' is not a count"),
    "2(3)": (1, "'2(3)' is not a count"),
    "2x3": (1, "'2x3' is not a count"),
    "2(x3)4": (1, "'2(x3)4' is not a count"),
    "2(x)": (1, "'2(x)' is not a count"),
    "-1": (1, "'-1' is not a count"),
    "1, 2": (3, "' 2' is not a count"),
    "\N{SUPERSCRIPT TWO}": (1, "is not a count"),
    "9" * 5000: (1, "is not a count"),
    "2(x0)": (1, "'2(x0)' repeats 0 times; write 1 to 65536"),
    "1,2(x65537)": (3, "'2(x65537)' repeats 65537 times"),
}

LETTERS = "abz-_.09"
name = st.builds(
    lambda head, number, tail: head + number + tail,
    st.text(LETTERS, max_size=3),
    st.integers(0, 120).map(str) | st.integers(0, 12).map("{:02}".format) | st.text("019", max_size=21),
    st.sampled_from(["", "", "", "-ib", ".org"]),
).filter(lambda text: text != "" and not text.startswith("-"))
neighbours = st.builds(
    lambda head, first, width, length: [f"{head}{number:0{width}}" for number in range(first, first + length)],
    st.sampled_from(["", "n", "r1n", "gpu-"]),
    st.integers(0, 110),
    st.integers(1, 4),
    st.integers(0, 15),
)
names_lists = st.lists(name.map(lambda one: [one]) | neighbours, max_size=12).map(lambda parts: [*chain(*parts)])


@pytest.mark.parametrize(("text", "names"), EXPANSIONS.items())
def test_expands_as_slurm_does(text: str, names: str) -> None:
    assert expand(text) == names.split()


@pytest.mark.parametrize(("text", "expected"), REFUSALS.items())
def test_a_wrong_list_is_refused_with_its_column(text: str, expected: tuple[int, str]) -> None:
    column, problem = expected
    with pytest.raises(NodeListError) as caught:
        expand(text)
    assert (caught.value.text, caught.value.column) == (text, column)
    assert problem in str(caught.value)


def test_a_range_of_65536_hosts_is_the_longest() -> None:
    names = expand("n[00001-65536]")
    assert (len(names), names[0], names[-1]) == (MAX_RANGE, "n00001", "n65536")


def test_two_brackets_may_make_a_million_hosts() -> None:
    assert len(expand("r[1-1024]n[1-1024]")) == MAX_PRODUCT


@pytest.mark.parametrize(("names", "text"), FOLDS.items())
def test_folds_as_slurm_prints(names: str, text: str) -> None:
    assert fold(names.split()) == text


def test_fold_takes_any_iterable() -> None:
    assert fold(f"n{number}" for number in range(3)) == "n[0-2]"


def test_fold_starts_a_new_range_after_65536_hosts() -> None:
    names = [f"n{number}" for number in range(MAX_RANGE + 2)]
    assert fold(names) == "n[0-65535,65536-65537]"
    assert expand(fold(names)) == names


@pytest.mark.parametrize(
    ("bad", "column"), [("", 1), ("n 1", 2), ("n1,n2", 3), ("n[1]", 2), ("-n", 1), ("é", 1), ("n\n", 2)]
)
def test_fold_refuses_what_is_not_one_name(bad: str, column: int) -> None:
    with pytest.raises(NodeListError, match="not the name of one host") as caught:
        fold(["n1", bad])
    assert (caught.value.text, caught.value.column) == (bad, column)


@pytest.mark.parametrize(("text", "counts"), COUNTS.items())
def test_counts_are_one_a_node(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize(("text", "expected"), NOT_COUNTS.items(), ids=lambda value: str(value)[:20])
def test_wrong_counts_are_refused_with_their_column(text: str, expected: tuple[int, str]) -> None:
    column, problem = expected
    with pytest.raises(NodeListError) as caught:
        expand_counts(text)
    assert (caught.value.text, caught.value.column) == (text, column)
    assert problem in str(caught.value)


@given(names_lists)
def test_expand_undoes_fold(names: list[str]) -> None:
    assert expand(fold(names)) == names


garbage = (
    st.text("n1-0[], \t\n{x(2)}é") | st.text() | st.from_regex(r"n\[[0-9,-]{0,9}\](x\[[0-9,-]{0,9}\])?", fullmatch=True)
)


def column_of_refusal(reader: Callable[[str], list[str] | list[int]], text: str) -> int | None:
    try:
        reader(text)
    except NodeListError as error:
        return error.column
    return None


@pytest.mark.parametrize("reader", [expand, expand_counts])
@given(text=garbage)
def test_garbage_raises_nothing_but_node_list_error(reader: Callable[[str], list[str] | list[int]], text: str) -> None:
    column = column_of_refusal(reader, text)
    assert column is None or 1 <= column <= len(text) + 1


@given(st.text("n1-0[], \t"))
def test_what_expand_makes_is_what_fold_takes(text: str) -> None:
    if column_of_refusal(expand, text) is None:
        assert expand(fold(expand(text))) == expand(text)
