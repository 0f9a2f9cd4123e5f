"""What a rank raised, where the supervisor finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.run_dir import RunDir

if TYPE_CHECKING:
    from pathlib import Path

PRELUDE = """
import os, sys, threading
from hpc_ds.runtime import preemption
"""


def end_of(program: str, folder: Path) -> tuple[int, str, dict[str, Any] | None]:
    """Exit status, last words, and what is told of rank 3, of a program that a run starts."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        env={"HPCDS_RUN_DIR": str(folder), "HPCDS_ATTEMPT": "2"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    path = RunDir(folder).failures(2) / "rank-3.json"
    return done.returncode, done.stderr, json.loads(path.read_text()) if path.exists() else None


def test_an_error_is_told_with_its_traceback(tmp_path: Path) -> None:
    program = """
def inner(number):
    return 1 / number
preemption.attend(3, 4)
try:
    inner(0)
except ZeroDivisionError as error:
    raise ValueError('of the script: äöü') from error
"""
    before = time.time()
    code, words, told = end_of(program, tmp_path)
    assert code == 1
    assert words.rstrip().endswith("ValueError: of the script: äöü")
    assert told is not None
    assert set(told) == {"rank", "host", "time", "type", "message", "traceback"}
    assert (told["rank"], told["host"], told["type"]) == (3, os.uname().nodename, "ValueError")
    assert told["message"] == "of the script: äöü"
    assert before <= told["time"] <= time.time()
    assert told["traceback"] == words.rstrip().splitlines()


NOT_TOLD = {
    "a stop": ("raise preemption.Preempted('saved')", 75),
    "an exit": ("sys.exit(3)", 3),
    "a key": ("raise KeyboardInterrupt", -2),
    "the end": ("pass", 0),
    "an error of a thread": ("t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()", 0),
    "an error of a child": ("if os.fork() == 0: raise ValueError\nos.wait()", 0),
}


@pytest.mark.parametrize(("program", "code"), NOT_TOLD.values(), ids=NOT_TOLD)
def test_what_is_no_failure_of_the_rank_is_not_told(program: str, code: int, tmp_path: Path) -> None:
    found, _, told = end_of(f"preemption.attend(3, 4)\n{program}", tmp_path)
    assert (found, told) == (code, None)


def test_the_hook_that_was_there_is_called_too(tmp_path: Path) -> None:
    program = """
sys.excepthook = lambda kind, error, trace: print('mine:', error, file=sys.stderr)
preemption.attend(0, 4)
preemption.attend(3, 4)
raise ValueError('once')
"""
    code, words, told = end_of(program, tmp_path)
    assert (code, words) == (1, "mine: once\n")
    assert told is not None


def test_an_error_that_cannot_be_written_or_said_is_shown_all_the_same(tmp_path: Path) -> None:
    program = """
class Odd(Exception):
    def __str__(self):
        raise RuntimeError
preemption.attend(3, 4)
raise Odd
"""
    code, words, told = end_of(program, tmp_path)
    assert (code, told is not None and told["type"]) == (1, "Odd")
    assert "Odd: <exception str() failed>" in words
    (tmp_path / "file").touch()
    code, words, told = end_of("preemption.attend(3, 4)\nraise ValueError('still said')", tmp_path / "file")
    assert (code, told) == (1, None)
    assert words.rstrip().endswith("ValueError: still said")


def test_what_is_told_is_bounded(tmp_path: Path) -> None:
    program = """
def deep(number):
    if number:
        deep(number - 1)
        deep(number - 2)
    raise ValueError('x' * 100_000)
preemption.attend(3, 4)
try:
    deep(900)
except ValueError as error:
    for _ in range(3):
        error = ValueError('y' * 100_000, error)
    raise error
"""
    code, _, told = end_of(program, tmp_path)
    assert code == 1
    assert told is not None
    assert len(told["message"]) <= 4_000
    assert len(told["traceback"]) <= 400
    assert len(json.dumps(told)) < 1_000_000
