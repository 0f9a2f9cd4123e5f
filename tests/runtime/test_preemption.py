"""The request to stop: a signal sets a flag and does nothing else; a deadline does the same."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from hpc_ds.run_dir import RunDir, write_json
from hpc_ds.runtime import preemption
from hpc_ds.runtime.preemption import EXIT_CODE, Preempted, _Request

if TYPE_CHECKING:
    from pathlib import Path

PRELUDE = """
import os, signal, sys, threading, time
from hpc_ds.runtime import preemption
def tell(*names):
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])
def say():
    print(preemption.told_to_stop(), preemption.told_by())
"""


def rank(folder: Path, program: str, *, in_run: bool = True, signal_name: str | None = None) -> tuple[int, str]:
    """Exit status and words of a process that runs ``program``, in a run whose job names a signal."""
    if signal_name is not None:
        write_json(RunDir(folder).config, {"restart": {"signal": signal_name}})
    environ = {"HPCDS_RUN_DIR": str(folder)} if in_run else {}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_signal_sets_a_flag_and_the_program_goes_on(tmp_path: Path) -> None:
    program = "preemption.listen(); say(); tell('SIGTERM'); say(); print('still here')"
    assert rank(tmp_path, program) == (0, "False another rank\nTrue SIGTERM\nstill here\n")


# The signal that the job names -> signals sent -> what the rank was told by, or the signal that ended it.
SIGNALS = {
    "the usual one": ("USR2", "'SIGUSR2'", "True SIGUSR2\n"),
    "no job file": (None, "'SIGUSR2'", "True SIGUSR2\n"),
    "another one": ("USR1", "'SIGUSR1'", "True SIGUSR1\n"),
    "TERM all the same": ("USR1", "'SIGTERM'", "True SIGTERM\n"),
    "only TERM": ("TERM", "'SIGTERM'", "True SIGTERM\n"),
    "HUP": ("HUP", "'SIGHUP'", "True SIGHUP\n"),
    "with CONT": ("USR2", "'SIGUSR2', 'SIGCONT'", "True SIGUSR2\n"),
    "three times": ("USR2", "'SIGTERM', 'SIGCONT', 'SIGTERM', 'SIGTERM'", "True SIGTERM\n"),
    "the first one counts": ("USR2", "'SIGUSR2', 'SIGTERM'", "True SIGUSR2\n"),
    "CONT alone": ("USR2", "'SIGCONT'", "False another rank\n"),
}


@pytest.mark.parametrize(("named", "sent", "words"), SIGNALS.values(), ids=SIGNALS)
def test_the_signals_of_a_job_are_heard(named: str | None, sent: str, words: str, tmp_path: Path) -> None:
    assert rank(tmp_path, f"preemption.listen(); tell({sent}); say()", signal_name=named) == (0, words)


def test_signals_that_the_job_does_not_name_keep_their_meaning(tmp_path: Path) -> None:
    assert rank(tmp_path, "preemption.listen(); tell('SIGUSR2'); say()", signal_name="USR1") == (-12, "")


def test_outside_of_a_run_signals_keep_their_meaning(tmp_path: Path) -> None:
    assert rank(tmp_path, "preemption.listen(); tell('SIGTERM'); say()", in_run=False) == (-15, "")


def test_a_thread_cannot_listen_and_does_not_fail(tmp_path: Path) -> None:
    program = """
thread = threading.Thread(target=preemption.listen)
thread.start()
thread.join()
say()
preemption.listen()
tell('SIGTERM')
say()
"""
    assert rank(tmp_path, program) == (0, "False another rank\nTrue SIGTERM\n")


def test_listening_twice_is_listening_once(tmp_path: Path) -> None:
    program = """
preemption.listen()
signal.signal(signal.SIGTERM, lambda *_: print('of the script'))
preemption.listen()
tell('SIGTERM')
"""
    assert rank(tmp_path, program) == (0, "of the script\n")


def test_a_signal_in_the_middle_of_a_wait_does_not_break_it(tmp_path: Path) -> None:
    program = """
preemption.listen()
threading.Timer(0.1, tell, ['SIGTERM']).start()
start = time.monotonic()
time.sleep(0.5)
print(time.monotonic() - start >= 0.5)
say()
"""
    assert rank(tmp_path, program) == (0, "True\nTrue SIGTERM\n")


def test_workers_of_data_loaders_hear_nothing(tmp_path: Path) -> None:
    program = "preemption.listen(); preemption.ignore_in_worker(0); tell('SIGTERM', 'SIGUSR2'); say()"
    assert rank(tmp_path, program) == (0, "False another rank\n")


def test_workers_ignore_the_signal_that_the_job_names(tmp_path: Path) -> None:
    """A worker that was spawned, and not forked, has no handler of its rank."""
    program = "preemption.ignore_in_worker(0); tell('SIGUSR1'); print('alive')"
    assert rank(tmp_path, program, signal_name="USR1") == (0, "alive\n")


def test_to_be_preempted_is_to_end_with_75() -> None:
    assert EXIT_CODE == 75
    assert (Preempted("why").code, str(Preempted("why")), str(Preempted())) == (75, "why", "checkpointed on request")
    assert isinstance(Preempted(), SystemExit)


def test_a_script_that_does_not_catch_it_ends_with_75(tmp_path: Path) -> None:
    assert rank(tmp_path, "raise preemption.Preempted('checkpointed step 3')") == (75, "")


DEADLINES = {
    "past": (lambda: f"{time.time() - 1} {time.time() + 9}", "deadline"),
    "past, with a line end": (lambda: f"{time.time() - 1} {time.time() + 9}\n", "deadline"),
    "to come": (lambda: f"{time.time() + 100} {time.time() + 110}", None),
    "nothing": (lambda: "", None),
    "one number": (lambda: str(time.time() - 1), None),
    "no number": (lambda: "soon later", None),
    "no time": (lambda: "nan nan", None),
}


@pytest.mark.parametrize(("text", "by"), DEADLINES.values(), ids=DEADLINES)
def test_a_deadline_that_has_passed_is_a_request(
    text: object, by: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadline").write_text(text())  # type: ignore[operator]
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    request = _Request()
    request.look_at_the_clock()
    assert request.by == by


def test_a_deadline_that_is_not_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = _Request()
    request.look_at_the_clock()
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "none"))
    request.look_at_the_clock()
    assert request.by is None


def test_the_clock_is_looked_at_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    request = _Request()
    request.look_at_the_clock()
    (tmp_path / "deadline").write_text("0 1")
    request.look_at_the_clock()
    assert request.by is None, "it was looked at a moment ago"
    clock[0] += 5.1
    request.look_at_the_clock()
    assert request.by == "deadline"


def test_a_signal_is_not_overruled_by_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadline").write_text("0 1")
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    request = _Request()
    request.hear(15, None)
    request.look_at_the_clock()
    assert request.by == "SIGTERM"


def test_the_time_left_is_known_from_what_told_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = _Request()
    monkeypatch.setattr(preemption, "_request", request)
    assert preemption.seconds_left() == math.inf
    (tmp_path / "deadline").write_text(f"{time.time() - 1} {time.time() + 600}")
    monkeypatch.setenv("HPCDS_DEADLINE", str(tmp_path / "deadline"))
    assert 500 < preemption.seconds_left() <= 600
    request.hear(15, None)  # SIGTERM: the scheduler ends the job now, whatever its time limit
    assert 0 < preemption.seconds_left() <= 30
    request.at -= 100
    assert preemption.seconds_left() == 0
