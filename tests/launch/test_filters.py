"""Filters on hosts and slots: the grammar, what is refused and in which column, and laws over all of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.errors import ConfigError, HostfileError
from hpc_ds.launch.filters import Taken, take_all, take_first, take_included, take_not_excluded
from hpc_ds.launch.hostfile import Host

HOSTS = [Host("w0", 4), Host("w1", 4), Host("w2", 2), Host("w3", 1)]
NAMED = [Host("me@w0", 2), Host("you@w0", 2), Host("fe80::1", 2), Host("10.0.0.2", 2)]

INCLUDED = {
    "w0": "w0:0,1,2,3",
    "w1:0,2": "w1:0,2",
    "w2:0@w3:0": "w2:0 w3:0",
    "w0@w1:0,2": "w0:0,1,2,3 w1:0,2",
    "w3@w0:1": "w0:1 w3:0",  # the hostfile's order
    "w0:3,1,3": "w0:1,3",  # rising, once each
    "w0:0@w1:1@w0:2": "w0:0,2 w1:1",
    "w2@w2": "w2:0,1",
    "w[1-2]": "w1:0,1,2,3 w2:0,1",
    "w[0,2]:1": "w0:1 w2:1",
    "w0:01": "w0:1",
}
EXCLUDED = {
    "w0": "w1:0,1,2,3 w2:0,1 w3:0",
    "w0:0,1@w2:0,1": "w0:2,3 w1:0,1,2,3 w3:0",
    "w1:0": "w0:0,1,2,3 w1:1,2,3 w2:0,1 w3:0",
    "w[0-1]@w3": "w2:0,1",
}
INCLUDED_NAMED = {
    "me@w0:1": "me@w0:1",
    "me@w0@you@w0:0": "me@w0:0,1 you@w0:0",
    "fe80::1": "fe80::1:0,1",
    "fe80::1:1@10.0.0.2": "fe80::1:1 10.0.0.2:0,1",
}

REFUSED = {
    "w9": "column 1: no host 'w9'; there are w0, w1, w2, w3",
    "w0@w9:1": "column 4: no host 'w9'",
    "w0:0,1@w2:0,2": "column 8: host 'w2' has no slot 2; it has slots 0 to 1",
    "w3:1": "column 1: host 'w3' has no slot 1; it has slot 0 only",
    "@w0": "column 1: a host is missing",
    "w0@": "column 4: a host is missing",
    "w0@@w1": "column 4: a host is missing",
    "w0:": "column 4: a slot is missing; write whole numbers from 0, parted by ','",
    "w0:0,": "column 6: a slot is missing",
    "w0:,0": "column 4: a slot is missing",
    "w0:0,x": "column 6: 'x' is not a slot",
    "w1@w0:0-2": "column 7: '0-2' is not a slot",
    "w0:-1": "column 4: '-1' is not a slot",
    "w0: 1": "column 4: ' 1' is not a slot",
    "w0:+1": "column 4: '+1' is not a slot",
    "w0:1_0": "column 4: '1_0' is not a slot",
    "w0:\N{SUPERSCRIPT TWO}": "is not a slot",
    f"w0:{'9' * 5000}": "is not a slot",
    "w0:0:1": "column 4: '0:1' is not a slot",
    " w0": "column 1: no host ' w0'",
    "w0,w1": "column 1: no host 'w0,w1'",
    "W0": "column 1: no host 'W0'",
    "w0@w0:1": "column 4: host 'w0' is named whole and by slots; name it once",
    "w0:1@w1@w0": "column 9: host 'w0' is named whole and by slots",
    "w1@w[0-": "column 5: '[' is never closed; add the ']'",
    "w[0-9]": "no host 'w4'",
    ":0": "column 1: no host ''",
}


def written(taken: list[Taken]) -> str:
    return " ".join(f"{one.name}:{','.join(map(str, one.slots))}" for one in taken)


@pytest.mark.parametrize(("text", "expected"), INCLUDED.items())
def test_include_takes_what_it_names(text: str, expected: str) -> None:
    assert written(take_included(HOSTS, text)) == expected


@pytest.mark.parametrize(("text", "expected"), EXCLUDED.items())
def test_exclude_leaves_the_rest(text: str, expected: str) -> None:
    assert written(take_not_excluded(HOSTS, text)) == expected


@pytest.mark.parametrize(("text", "expected"), INCLUDED_NAMED.items())
def test_names_may_hold_what_parts_filters(text: str, expected: str) -> None:
    assert written(take_included(NAMED, text)) == expected


@pytest.mark.parametrize("take", [take_included, take_not_excluded])
@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_pointed_at(take: object, text: str, message: str) -> None:
    option = "--include" if take is take_included else "--exclude"
    with pytest.raises(HostfileError) as caught:
        take(HOSTS, text)  # type: ignore[operator]
    assert str(caught.value).startswith(f"{option} {text!r}, column ")
    assert message in str(caught.value)


def test_something_must_be_left() -> None:
    with pytest.raises(HostfileError, match=r"--exclude 'w\[0-3\]': nothing is left; exclude less"):
        take_not_excluded(HOSTS, "w[0-3]")


def test_a_whole_host_is_known_to_be_whole() -> None:
    assert [one.whole for one in take_included(HOSTS, "w0:0,1,2,3@w1:0@w2")] == [True, False, True]
    assert [one.whole for one in take_not_excluded(HOSTS, "w0:0")] == [False, True, True, True]


def test_the_first_hosts_and_slots() -> None:
    assert written(take_first(HOSTS, None, None)) == written(take_all(HOSTS))
    assert written(take_first(HOSTS, 2, None)) == "w0:0,1,2,3 w1:0,1,2,3"
    assert written(take_first(HOSTS, 3, 2)) == "w0:0,1 w1:0,1 w2:0,1"
    assert [one.whole for one in take_first(HOSTS, 3, 2)] == [False, False, True]


@pytest.mark.parametrize(
    ("nodes", "gpus", "message"),
    [
        (5, None, "--num_nodes 5: there are 4; give a hostfile with more, or ask for less"),
        (0, None, "--num_nodes 0: not a number of any use; give 1 or more"),
        (None, -2, "--num_gpus -2: not a number of any use"),
        (None, 2, "--num_gpus 2: host 'w3' has 1; ask for at most that many"),
        (2, 5, "--num_gpus 5: host 'w0' has 4"),
    ],
)
def test_more_than_there_is_is_refused(nodes: int | None, gpus: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        take_first(HOSTS, nodes, gpus)
    assert str(caught.value).startswith(message)


@given(st.text(alphabet="w0123:@,[]- \t\N{SUPERSCRIPT TWO}x.\0", max_size=20))
def test_any_text_is_taken_or_refused(text: str) -> None:
    for take in (take_included, take_not_excluded):
        try:
            taken = take(HOSTS, text)
        except HostfileError:
            continue
        assert taken
        order = [host.name for host in HOSTS]
        assert [order.index(one.name) for one in taken] == sorted(order.index(one.name) for one in taken)
        assert all(0 <= slot < dict(HOSTS)[one.name] for one in taken for slot in one.slots)


@given(st.dictionaries(st.sampled_from([host.name for host in HOSTS]), st.sets(st.integers(0, 3), min_size=1)))
def test_include_and_exclude_part_all_that_there_is(chosen: dict[str, set[int]]) -> None:
    slots = dict(HOSTS)
    chosen = {name: kept for name, some in chosen.items() if (kept := {slot for slot in some if slot < slots[name]})}
    text = "@".join(f"{name}:{','.join(map(str, some))}" for name, some in chosen.items())
    everything = {(host.name, slot) for host in HOSTS for slot in range(host.slots)}
    named = {(name, slot) for name, some in chosen.items() for slot in some}
    if not named or named == everything:
        return
    included = {(one.name, slot) for one in take_included(HOSTS, text) for slot in one.slots}
    left = {(one.name, slot) for one in take_not_excluded(HOSTS, text) for slot in one.slots}
    assert included == named
    assert left == everything - named
