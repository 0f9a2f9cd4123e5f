"""srun: the command line, and a stand-in that says what srun of Slurm 22.05 says about its tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program

from hpc_ds.config.job import JobConfig, Resources
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.launch import srun
from hpc_ds.launch.failure import Failure, first_failure
from hpc_ds.launch.runner import CHECKPOINTED
from hpc_ds.launch.srun import SrunRunner, exit_code_of, site_options, srun_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# Python 3.12 warns of a fork where torch has threads. The child only sets signals before it becomes another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def resources(**data: Any) -> Resources:
    asked: Resources = check(Resources, data, "job.json")
    return asked


def test_the_step_takes_the_whole_allocation() -> None:
    asked = resources(nodes=2, gpus_per_node=4, cpus_per_task=16)
    command = srun_command(["python", "a b.py", "--x=$1"], asked, ["--mpi=none"])
    assert command[:9] == [
        "srun",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--cpus-per-task=16",
        "--mpi=none",
    ]
    assert command[9:11] == ["/bin/sh", "-c"]
    assert command[-3:] == ["python", "a b.py", "--x=$1"]
    assert not [word for word in srun_command(["x"], resources(), []) if "cpus" in word]


FOLDERS = ["run", "a b", "it's", "100% %j", "$HOME", "`touch hacked`", "\\", "*", "\u00e9", "a;touch hacked"]


@pytest.mark.parametrize("name", FOLDERS)
def test_each_task_writes_to_the_log_of_its_rank(name: str, tmp_path: Path) -> None:
    """The command behind srun's options, run as a task would run it: words arrive as they are, in the rank's own log."""
    command = srun_command([sys.executable, "-c", "import sys; print(sys.argv[1:])", name, "", "$1"], resources(), [])
    task = command[command.index("/bin/sh") :]
    logs = tmp_path / name / "logs" / "attempt-2"
    logs.mkdir(parents=True)
    (logs / "rank-7.log").write_text("before\n")
    environ = {**os.environ, "HPCDS_RUN_DIR": str(tmp_path / name), "HPCDS_ATTEMPT": "2", "SLURM_PROCID": "7"}
    ran = subprocess.run(task, env=environ, cwd=tmp_path, capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"", b"")
    assert (logs / "rank-7.log").read_text() == f"before\n{[name, '', '$1']}\n"
    assert not list(tmp_path.rglob("hacked"))


def test_a_task_becomes_its_rank(tmp_path: Path) -> None:
    """No shell stands between srun and a rank: signals reach it, and its exit code is its own."""
    command = srun_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], resources(), [])
    (tmp_path / "logs" / "attempt-1").mkdir(parents=True)
    environ = {**os.environ, "HPCDS_RUN_DIR": str(tmp_path), "HPCDS_ATTEMPT": "1", "SLURM_PROCID": "0"}
    assert subprocess.run(command[command.index("/bin/sh") :], env=environ, check=False).returncode == -9


EXIT_CODES = {
    "Exited with exit code 3": 3,
    "Exited with exit code 75": 75,
    "Exited with exit code 0": 0,
    "Killed": 137,
    "Terminated": 143,
    "Segmentation fault": 139,
    "Segmentation fault (core dumped)": 139,
    "Aborted (core dumped)": 134,
    "Bus error": 135,
    "Floating point exception": 136,
    "Illegal instruction": 132,
    "User defined signal 2": 140,
    "Hangup": 129,
    "Out Of Memory": 137,
    "Something new": 1,
    "": 1,
}


@pytest.mark.parametrize(("words", "code"), EXIT_CODES.items())
def test_the_words_of_srun_stand_for_an_exit_code(words: str, code: int) -> None:
    assert exit_code_of(words) == code


class Bench:
    """Runs a bash script in the place of srun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self._runners: list[SrunRunner] = []

    def start(self, text: str, *words: str) -> SrunRunner:
        fake_program(self.folder / "bin", "srun", text)
        environ = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FOLDER": str(self.folder)}
        runner = SrunRunner(["srun", *words], environ, self.logs)
        self._runners.append(runner)
        runner.start()
        return runner

    def failure(self, runner: SrunRunner) -> Failure | None:
        """Who failed first."""
        return runner.failure or first_failure(runner.ends, self.folder / "failures", self.logs)

    def end(self) -> None:
        for runner in self._runners:
            if runner._srun is not None:
                runner._srun.kill()
                runner._srun.wait()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(srun, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(srun, "_KILL_PATIENCE_S", 0.2)
    bench = Bench(tmp_path)
    yield bench
    bench.end()


def outcome(runner: SrunRunner, timeout_s: float = 30) -> int:
    deadline = time.monotonic() + timeout_s
    while (code := runner.poll()) is None:
        assert time.monotonic() < deadline, "srun did not end"
        time.sleep(0.01)
    return code


def say(words: str) -> str:
    return f"echo 'srun: error: {words}' >&2; "


# What srun says, the exit status it ends with -> the exit code, and the failure (rank, host, exit code, how).
ENDS: dict[str, tuple[str, int, tuple[int | None, str, int, str] | None]] = {
    "all finished": ("exit 0", 0, None),
    "all saved": (say("n[1-2]: tasks 0-3: Exited with exit code 75") + "exit 75", CHECKPOINTED, None),
    "some saved, some were done": (say("n1: task 0: Exited with exit code 75") + "exit 75", CHECKPOINTED, None),
    "one failed": (say("n2: task 3: Exited with exit code 3") + "exit 3", 3, (3, "n2", 3, "exit code 3")),
    "one was killed": (
        say("n2: task 1: Killed") + "exit 137",
        137,
        (1, "n2", 137, "killed by SIGKILL (out of memory?)"),
    ),
    "out of memory": (
        say("n1: task 0: Out Of Memory") + "exit 1",
        137,
        (0, "n1", 137, "killed by SIGKILL (out of memory?)"),
    ),
    "one saved, then one failed": (
        say("n1: task 0: Exited with exit code 75") + say("n2: task 2: Aborted (core dumped)") + "exit 134",
        134,
        (2, "n2", 134, "killed by SIGABRT"),
    ),
    "one failed, and srun says 75": (
        say("n1: task 1: Exited with exit code 1") + say("n1: task 0: Exited with exit code 75") + "exit 75",
        1,
        (1, "n1", 1, "exit code 1"),
    ),
    "the first of two counts": (
        say("n1: task 1: Exited with exit code 4") + say("n1: task 0: Exited with exit code 5") + "exit 5",
        4,
        (1, "n1", 4, "exit code 4"),
    ),
    "no step": (
        say("Unable to create step for job 25: Requested nodes are busy") + "exit 1",
        1,
        (None, "", 1, "srun ended with exit code 1"),
    ),
    "no launch": (
        say("task 0 launch failed: Unspecified error") + "exit 0",
        1,
        (None, "", 1, "task 0 launch failed: Unspecified error"),
    ),
    "no application": (
        say("Application launch failed: Invalid node name specified") + "sleep 30; exit 0",
        1,
        (None, "", 1, "Application launch failed: Invalid node name specified"),
    ),
    "killed itself": ("kill -9 $$", 137, (None, "", 137, "srun ended with killed by SIGKILL (out of memory?)")),
    "a line without an end": (
        "printf 'srun: error: n1: task 0: Exited with exit code 6' >&2; exit 6",
        6,
        (None, "", 6, "srun ended with exit code 6"),
    ),
}


@pytest.mark.parametrize(("text", "code", "failure"), ENDS.values(), ids=ENDS)
def test_how_a_step_ends(text: str, code: int, failure: tuple[int | None, str, int, str] | None, bench: Bench) -> None:
    runner = bench.start(text)
    assert outcome(runner) == code
    found = bench.failure(runner)
    assert (None if found is None else (found.rank, found.host, found.exit_code, found.how)) == failure
    assert outcome(runner) == code, "asked again, it says the same"


def test_the_words_of_a_launcher_that_failed_are_kept(bench: Bench) -> None:
    runner = bench.start(say("Unable to create step for job 25: Requested nodes are busy") + "exit 1")
    outcome(runner)
    failure = bench.failure(runner)
    assert failure is not None
    assert failure.last_lines == ["srun: error: Unable to create step for job 25: Requested nodes are busy"]


def test_the_last_words_of_the_rank_that_failed_are_kept(bench: Bench) -> None:
    text = 'echo "Traceback" > "$FOLDER/logs/rank-2.log"; ' + say("n2: task 2: Exited with exit code 1") + "exit 1"
    runner = bench.start(text)
    outcome(runner)
    assert bench.failure(runner) == Failure(2, "n2", 1, "exit code 1", ["Traceback"])


def test_why_slurm_ended_the_step_is_kept(bench: Bench) -> None:
    words = "slurmstepd: error: *** STEP 25.0 ON n1 CANCELLED AT 2026-01-31T13:45:00 DUE TO {} ***"
    text = f"echo '{words.format('PREEMPTION')}' >&2; echo '{words.format('TIME LIMIT')}' >&2; exit 143"
    runner = bench.start(text)
    outcome(runner)
    assert runner.due_to == "PREEMPTION"
    runner = bench.start("exit 0")
    outcome(runner)
    assert runner.due_to is None


def test_words_of_an_earlier_start_are_not_read_again(bench: Bench) -> None:
    bench.logs.mkdir()
    (bench.logs / "launcher.log").write_text("srun: error: n1: task 0: Killed\n")
    runner = bench.start("exit 0")
    assert outcome(runner) == 0
    assert bench.failure(runner) is None


def test_a_message_that_comes_in_two_pieces_is_one(bench: Bench) -> None:
    runner = bench.start("printf 'srun: error: n1: ta' >&2; sleep 0.3; echo 'sk 1: Killed' >&2; exit 137")
    assert outcome(runner) == 137
    failure = bench.failure(runner)
    assert failure is not None
    assert (failure.rank, failure.host) == (1, "n1")


def polled_until(runner: SrunRunner, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert runner.poll() is None or condition()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_others_are_ended_after_a_failure(bench: Bench) -> None:
    runner = bench.start(
        f"trap 'touch \"$FOLDER/told\"; {say('n1: task 0: Killed')} exit 137' TERM; "
        + say("n1: task 1: Exited with exit code 3")
        + "while true; do sleep 0.05; done"
    )
    polled_until(runner, lambda: bool(runner.ends))
    assert not (bench.folder / "told").exists(), "the others get time to say what they saw"
    assert outcome(runner) == 3
    assert (bench.folder / "told").exists()
    failure = bench.failure(runner)
    assert failure is not None
    assert failure.rank == 1


def test_ranks_that_save_are_given_their_time(bench: Bench) -> None:
    """75 is no failure: nobody is ended because another one has saved already."""
    runner = bench.start(say("n1: task 1: Exited with exit code 75") + "sleep 0.8; exit 75")
    assert outcome(runner) == CHECKPOINTED
    assert bench.failure(runner) is None


def test_a_launcher_that_ignores_the_end_is_killed(bench: Bench) -> None:
    runner = bench.start(
        "trap '' TERM; " + say("n1: task 1: Exited with exit code 3") + "while true; do sleep 0.05; done"
    )
    assert outcome(runner) == 3
    assert runner._srun is not None
    assert runner._srun.returncode == -9


def test_a_step_that_is_told_to_end_ends(bench: Bench) -> None:
    runner = bench.start("while true; do sleep 0.05; done")
    assert runner.poll() is None
    runner.terminate()
    runner.terminate()
    assert outcome(runner) == 143
    failure = bench.failure(runner)
    assert failure is not None


def test_words_and_environment_reach_srun(bench: Bench) -> None:
    runner = bench.start('printf "%s\\n" "$@" > "$FOLDER/words"; cat > "$FOLDER/input"', "a b", "", "$X")
    assert outcome(runner) == 0
    assert (bench.folder / "words").read_text() == "a b\n\n$X\n"
    assert (bench.folder / "input").read_text() == ""


def test_a_runner_that_was_not_started_has_not_ended(tmp_path: Path) -> None:
    runner = SrunRunner(["srun"], {}, tmp_path)
    assert runner.poll() is None
    runner.terminate()


def test_srun_that_is_not_there_is_an_oserror_for_the_supervisor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SrunRunner(["srun"], {"PATH": str(tmp_path)}, tmp_path / "logs").start()


def site_of(**data: Any) -> SiteConfig:
    site: SiteConfig = check(SiteConfig, {"name": "s", "description": "d", "scheduler": "slurm", **data}, "site.json")
    return site


def test_srun_is_told_what_the_site_wants() -> None:
    full: JobConfig = check(
        JobConfig, {"command": ["x"], "resources": {"gpus_per_node": 4, "tasks_per_node": 4}}, "job.json"
    )
    half: JobConfig = check(
        JobConfig, {"command": ["x"], "resources": {"gpus_per_node": 4, "tasks_per_node": 2}}, "job.json"
    )
    none: JobConfig = check(JobConfig, {"command": ["x"]}, "job.json")
    by_rank = site_of(gpu_request="gpus_per_task", srun=["--gpu-bind=closest"])
    assert site_options(full, by_rank) == ["--gpu-bind=closest", "--gpus-per-task=1"]
    assert site_options(half, by_rank) == ["--gpu-bind=closest", "--gpus-per-task=2"]
    assert site_options(none, by_rank) == ["--gpu-bind=closest"]
    whole = site_of(gpus_per_node=4, srun_full_node=["--cpu-bind=map_cpu:0,1,2,3"])
    assert site_options(full, whole) == ["--cpu-bind=map_cpu:0,1,2,3"]
    assert site_options(half, whole) == site_options(none, whole) == []
