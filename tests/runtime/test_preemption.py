"""The request to stop: a signal sets a flag and does nothing else; loops without the engine ask all ranks at once."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hpc_ds.run_dir import RunDir, read_lines, write_json
from hpc_ds.runtime.preemption import EXIT_CODE, Preempted

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
        [sys.executable, "-c", PRELUDE + program], env=environ, capture_output=True, text=True, timeout=300, check=False
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


# children


CHILD = """
def in_child(act):
    pid = os.fork()
    if pid == 0:
        act()
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
preemption.listen()
preemption.attend(0, 1)
"""


def test_sigterm_ends_a_forked_child_as_whoever_forked_it_expects(tmp_path: Path) -> None:
    assert rank(tmp_path, CHILD + "in_child(lambda: tell('SIGTERM')); say()") == (0, "-15\nFalse another rank\n")


def test_the_warning_does_not_end_a_forked_child(tmp_path: Path) -> None:
    assert rank(tmp_path, CHILD + "in_child(lambda: tell('SIGUSR2')); say()") == (0, "7\nFalse another rank\n")


def test_what_a_child_hears_is_not_heard_by_its_parent(tmp_path: Path) -> None:
    """A child has a handler of its own for a signal that its parent listens to: its number must not get into the pipe."""
    program = """
def hear_by_itself():
    signal.signal(signal.SIGTERM, lambda *_: None)
    tell('SIGTERM')
in_child(hear_by_itself)
tell('SIGUSR2')
while preemption._request.by is None:
    time.sleep(0.01)
say()
"""
    assert rank(tmp_path, CHILD + program) == (0, "7\nTrue SIGUSR2\n")


def test_a_script_keeps_the_handler_that_it_has_set_since(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: print('of the script', flush=True))
in_child(lambda: tell('SIGTERM'))
"""
    assert rank(tmp_path, CHILD + program) == (0, "of the script\n7\n")


WORKERS = """
import torch
class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return os.getpid()
preemption.listen()
preemption.attend(0, 1)
batches = iter(torch.utils.data.DataLoader(Pids(), 1, num_workers=2, worker_init_fn=preemption.ignore_in_worker))
workers = {int(next(batches)), int(next(batches))}
for worker in workers:
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        os.kill(worker, number)
print(len(workers), {int(batch) for batch in batches} == workers)
say()
"""


def test_workers_of_a_data_loader_survive_what_the_scheduler_sends_to_all_processes(tmp_path: Path) -> None:
    assert rank(tmp_path, WORKERS) == (0, "2 True\nFalse another rank\n")


# loops without the engine


def test_who_asks_listens_also_outside_of_a_run(tmp_path: Path) -> None:
    program = """
print(preemption.requested())
tell('SIGTERM', 'SIGCONT', 'SIGTERM')
print(preemption.requested(), preemption.requested(), preemption.told_by())
raise preemption.Preempted
"""
    for in_run in (False, True):
        assert rank(tmp_path, program, in_run=in_run) == (75, "False\nTrue True SIGTERM\n")


def test_the_warning_signal_of_the_job_is_what_is_listened_to(tmp_path: Path) -> None:
    program = "print(preemption.requested()); tell('SIGUSR1'); print(preemption.requested())"
    assert rank(tmp_path, program, signal_name="USR1") == (0, "False\nTrue\n")
    assert rank(tmp_path, "preemption.requested(); tell('SIGUSR2')", signal_name="USR1") == (-12, "")


def test_to_ask_loads_no_torch(tmp_path: Path) -> None:
    program = """
import hpc_ds
hpc_ds.preemption.requested()
hpc_ds.preemption.step(1, 0.5)
print('torch' in sys.modules, hpc_ds.preemption is preemption)
"""
    assert rank(tmp_path, program) == (0, "False True\n")


def test_steps_and_saves_are_told_to_the_run(tmp_path: Path) -> None:
    program = """
os.environ['HPCDS_ATTEMPT'] = '4'
class Scalar:
    def __float__(self):
        return 1.5
preemption.step(11, Scalar())
preemption.step(12, float('nan'))
preemption.step(13)
preemption.saved(13, 0.25)
from hpc_ds.runtime.progress import progress
print(progress.step)
"""
    assert rank(tmp_path, program) == (0, "13\n")
    lines = read_lines(RunDir(tmp_path).events)
    assert [(line["event"], line["attempt"], line["step"]) for line in lines] == [
        ("step", 4, 11), ("step", 4, 12), ("step", 4, 13), ("saved", 4, 13),
    ]  # fmt: skip
    assert [line["loss"] for line in lines[:3]] == [1.5, None, None]
    assert all(line["seconds"] >= 0 for line in lines)
    assert set(lines[0]) >= {"lr", "grad_norm", "time"}


def test_steps_are_told_by_rank_0_alone_and_by_nobody_outside_of_a_run(tmp_path: Path) -> None:
    other = "os.environ.update(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2');"
    assert rank(tmp_path, other + "preemption.step(1, 0.5); preemption.saved(1)") == (0, "")
    assert rank(tmp_path, "preemption.step(1, 0.5); preemption.saved(1)", in_run=False) == (0, "")
    assert not RunDir(tmp_path).events.exists()
