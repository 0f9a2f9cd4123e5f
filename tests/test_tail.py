"""Files that grow while they are read: each line once, whole, and from the beginning where the file is another one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hpc_ds.run_dir import append_line
from hpc_ds.tail import Tail, each, end_of, sample_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def add(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)


def test_each_line_is_handed_out_once(path: Path) -> None:
    tail = Tail(path)
    assert tail.new() == []
    append_line(path, {"a": 1})
    assert tail.new() == [{"a": 1}]
    assert tail.new() == []
    append_line(path, {"a": 2})
    append_line(path, {"a": 3})
    assert tail.new() == [{"a": 2}, {"a": 3}]


def test_a_line_waits_for_its_end(path: Path) -> None:
    tail = Tail(path)
    add(path, b'{"a": 1}\n{"a": ')
    assert tail.new() == [{"a": 1}]
    assert tail.new() == []
    add(path, b"2}")
    assert tail.new() == []
    add(path, b'\n{"a": 3}\n')
    assert tail.new() == [{"a": 2}, {"a": 3}]


def test_a_letter_cut_in_two_is_read_whole(path: Path) -> None:
    tail, line = Tail(path), json.dumps({"a": "é\u2028"}, ensure_ascii=False).encode() + b"\n"
    for cut in range(len(line)):
        add(path, line[cut : cut + 1])
        assert tail.new() == ([] if cut < len(line) - 1 else [{"a": "é\u2028"}])


def test_a_torn_line_is_passed_over_once_another_follows(path: Path) -> None:
    """``append_line`` gives a line that a crash tore its end."""
    tail = Tail(path)
    add(path, b'{"a": 1, "b')
    assert tail.new() == []
    append_line(path, {"a": 2})
    assert tail.new() == [{"a": 2}]


def test_what_is_no_object_is_passed_over(path: Path) -> None:
    add(path, b'[1]\n\n17\n"text"\nno\n\xff\n{"a": 1}\n')
    assert Tail(path).new() == [{"a": 1}] == end_of(path)


def test_a_file_that_became_shorter_is_read_anew(path: Path) -> None:
    tail = Tail(path)
    add(path, b'{"a": 1}\n{"a": 2}\n')
    tail.new()
    path.write_bytes(b'{"a": 3}\n')
    assert tail.new() == [{"a": 3}]


def test_a_file_that_was_replaced_is_read_anew(path: Path) -> None:
    tail = Tail(path)
    add(path, b'{"a": 1}\n')
    tail.new()
    other = path.with_name("other")
    other.write_bytes(b'{"a": 2}\n{"a": 3}\n')
    other.replace(path)
    assert tail.new() == [{"a": 2}, {"a": 3}]


def test_it_can_begin_at_a_byte(path: Path) -> None:
    add(path, b'{"a": 1}\n')
    tail = Tail(path, at=path.stat().st_size)
    assert tail.new() == []
    append_line(path, {"a": 2})
    assert tail.new() == [{"a": 2}]


def test_the_end_of_a_file_is_its_last_whole_lines(path: Path) -> None:
    assert end_of(path) == []
    for number in range(100):
        append_line(path, {"a": number}, durable=False)
    assert end_of(path) == [{"a": number} for number in range(100)]
    assert end_of(path, 35) == [{"a": 97}, {"a": 98}, {"a": 99}]
    add(path, b'{"a": 1')
    assert end_of(path, 40)[-1] == {"a": 99}


def test_all_of_a_file_can_be_read_one_by_one(path: Path) -> None:
    assert list(each(path)) == []
    path.write_text("".join(f'{{"a": {number}, "b": "{"x" * 1000}"}}\n' for number in range(3000)))
    add(path, b'{"a": 1')
    assert [one["a"] for one in each(path)] == list(range(3000)), "whatever stands between two blocks"


def test_a_sample_of_a_short_file_is_all_of_it(path: Path) -> None:
    assert sample_of(path) == []
    path.write_text("".join(f'{{"a": {number}}}\n' for number in range(1000)))
    assert [one["a"] for one in sample_of(path)] == list(range(1000))


def test_a_sample_of_a_long_file_has_both_ends_and_what_lies_between(path: Path) -> None:
    path.write_text("".join(f'{{"a": {number}}}\n' for number in range(10_000)))
    found = [one["a"] for one in sample_of(path, blocks=5, block_bytes=100)]
    assert (found[0], found[-1]) == (0, 9999)
    assert found == sorted(found)
    assert 20 < len(found) < 60
    assert {number * 4 // 10_000 for number in found} == {0, 1, 2, 3}
