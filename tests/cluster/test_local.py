"""Whole jobs on site local: real keepers, supervisors and ranks, and all that a cluster, a person or bad luck does to them.

The ranks are small programs without torch. A test of them costs about a second for each attempt.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from whole_runs import Runs

from hpc_ds.cluster import process
from hpc_ds.cluster.local_keeper import Limits
from hpc_ds.config.load import load_site
from hpc_ds.report.status import OVER, status_of
from hpc_ds.run_dir import RunDir, read_object
from hpc_ds.supervise.ledger import read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.local

# What every rank can do: note something for the test, wait to be told, take steps as the engine would record them.
PRELUDE = """
import json, os, signal, subprocess, sys, time
rank, attempt, root = int(os.environ["RANK"]), int(os.environ["HPCDS_ATTEMPT"]), os.environ["HPCDS_RUN_DIR"]
heard = []
def note(name, text=""):
    with open(os.path.join(root, f"{name}-{rank}-{attempt}.new"), "w") as file:
        file.write(str(text))
    os.rename(file.name, file.name[:-4])
def listen(*names):
    for name in names:
        signal.signal(signal.Signals["SIG" + name], lambda number, _: heard.append(signal.Signals(number).name))
def wait(condition=lambda: False, seconds=60):
    note("ready")
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
def steps(first, last):
    from hpc_ds.runtime.run import CurrentRun
    for step in range(first, last + 1):
        CurrentRun.from_environment().record("step", step=step, loss=1.0 / step, lr=0.1)
"""
# Saves when it is told to, as a rank of ours does; the second attempt finishes.
SAVES = """
if attempt > 1:
    sys.exit(0)
listen("TERM", "USR2", "CONT")
wait(lambda: "SIGTERM" in heard or "SIGUSR2" in heard)
time.sleep(0.3)
note("heard", sorted(set(heard)))
sys.exit(75)
"""
DEAF = """
for name in ("TERM", "USR2", "HUP", "INT"):
    signal.signal(signal.Signals["SIG" + name], signal.SIG_IGN)
wait()
"""


class Job:
    """One submitted job, looked at without starting a process."""

    def __init__(self, run: RunDir, answer: dict[str, str]) -> None:
        self.run = run
        self.answer = answer

    @property
    def state(self) -> str:
        return status_of(self.run).state

    @property
    def causes(self) -> list[str | None]:
        return [attempt.cause for attempt in read_ledger(self.run)]

    def keeper(self) -> dict[str, Any]:
        return read_object(self.run.local / "state.json")

    def processes(self) -> list[int]:
        """Everything of this run that lives, by the run folder in its command line or environment."""
        # Not that of a run of the same second, whose folder's name goes on with "-2".
        mark, found = re.compile(re.escape(os.fsencode(self.run.root)) + rb"(?=[/\0]|$)"), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                except OSError:
                    continue
                if mark.search(words) and process.start_time(int(entry.name)) is not None:
                    found.append(int(entry.name))
        return found

    def noted(self, name: str, attempt: int = 1, rank: int = 0) -> str:
        return (self.run.root / f"{name}-{rank}-{attempt}").read_text()

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = 40) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text(errors="replace") for path in sorted(self.run.logs.rglob("*.log"))]
                raise AssertionError(f"{what}: not in {timeout_s} s\n{status_of(self.run)}\n" + "\n".join(logs))
            time.sleep(0.02)

    def wait_ready(self, attempt: int = 1, ranks: int = 1) -> None:
        ready = [self.run.root / f"ready-{rank}-{attempt}" for rank in range(ranks)]
        self.wait(lambda: all(path.exists() for path in ready), "the ranks")

    def wait_over(self) -> str:
        """The state of the run when nothing of it is left."""
        self.wait(lambda: self.state in OVER and not self.processes(), "the end of the run")
        return self.state


class Bench(Runs):
    """A folder to submit jobs from, on a site that loses no time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(folder, dict(os.environ))
        self.jobs: list[Job] = []
        self.site("quick")

    def site(self, name: str, **changes: Any) -> str:
        data = {**load_site("local").model_dump(mode="json"), "grace_s": 1.5, "kill_wait_s": 1, **changes}
        (self.folder / f"{name}.json").write_text(json.dumps(data))
        return f"{name}.json"

    def job_file(self, program: str, **data: Any) -> Path:
        (self.folder / "rank.py").write_text(PRELUDE + program)
        path = self.folder / "job.json"
        path.write_text(json.dumps({"name": "job", "command": [sys.executable, "rank.py"], **data}))
        return path

    def start(self, program: str, *options: str, site: str = "quick.json", **data: Any) -> Job:
        path = self.job_file(program, **data)
        answer = json.loads(self.hpcds("submit", str(path), "--site", site, "--json", *options).stdout)
        job = Job(RunDir(Path(answer["run_dir"])), answer)
        self.jobs.append(job)
        return job

    def end(self) -> None:
        for job in self.jobs:
            for pid in job.processes():
                process.send([pid], signal.SIGKILL)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "bench")
    yield bench
    bench.end()


def test_a_job_finishes_and_everything_about_it_can_be_asked(bench: Bench) -> None:
    job = bench.start("print('hello from', rank, attempt)", resources={"tasks_per_node": 2})
    assert set(job.answer) == {"run_dir", "job_id", "site"}
    assert job.answer["site"] == "local"
    assert job.answer["job_id"].startswith("local-")
    assert job.run.root.parent == bench.folder / "runs"
    assert job.wait_over() == "finished"
    assert (job.run.attempt_logs(1) / "rank-1.log").read_text() == "hello from 1 1\n"
    status = json.loads(bench.hpcds("status", job.answer["job_id"], "--json").stdout)
    assert (status["state"], [attempt["cause"] for attempt in status["attempts"]]) == ("finished", ["finished"])
    assert bench.hpcds("logs", "job", "--rank", "1").stdout == "hello from 1 1\n"
    assert "all ranks finished" in bench.hpcds("status", "job").stdout
    for verb in ("cancel", "preempt"):
        done = bench.hpcds(verb, "job", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1)
        assert "it ended already" in done.stderr
    done = bench.hpcds("resume", "job", check=False)
    assert done.returncode == 2
    assert "finished in attempt 1; there is nothing to resume" in done.stderr


HOSTILE = [
    "a b", "it's", 'say "a"', "$HOME", "`touch hacked`", "$(touch hacked)", "a\nb\n", "\u00e9\u6f22", "100%", "", "*", "\\",
]  # fmt: skip


def test_hostile_words_reach_the_ranks_byte_for_byte(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a b 'c' \"d\" $HOME `touch hacked` \u00e9 100% {{ x }};")
    try:
        env = {f"V{index}": word for index, word in enumerate(HOSTILE)}
        seen = "note('seen', json.dumps([sys.argv[1:], os.getcwd(), {k: v for k, v in os.environ.items() if k in %r}]))"
        job = bench.start(
            seen % (list(env),), args=HOSTILE, env=env, setup=["export SET='up now'"], resources={"time": "10"}
        )
        assert job.wait_over() == "finished"
        assert json.loads(job.noted("seen")) == [HOSTILE, str(bench.folder), env]
        assert not list(tmp_path.rglob("hacked"))
        assert bench.hpcds("status", str(job.run.root), "--json").returncode == 0
    finally:
        bench.end()


def test_a_neighbour_with_the_name_of_a_library_does_no_harm(bench: Bench) -> None:
    """The folder of a training script is the user's: what lies there is nobody else's business."""
    for name in ("typer", "pydantic", "json", "hpc_ds"):
        (bench.folder / "work").mkdir(exist_ok=True)
        (bench.folder / "work" / f"{name}.py").write_text("raise SystemExit(99)")
    script = bench.folder / "done.sh"
    script.write_text("exit 0")
    job = bench.start("", workdir="work", command=["/bin/sh", str(script)])
    assert job.wait_over() == "finished", job.run.scheduler_log.read_text()


def test_a_cancelled_job_leaves_no_process_behind(bench: Bench) -> None:
    # A deaf rank, a child of it, and a grandchild in a session of its own without the rank's environment.
    job = bench.start(
        'subprocess.Popen(["sleep", "63"])\n'
        'subprocess.run(["setsid", "--fork", "env", "-i", "/bin/bash", "-c", "sleep 64; true", root])\n' + DEAF,
        resources={"tasks_per_node": 2},
    )
    job.wait_ready(ranks=2)
    assert job.state == "running"
    below = process.descendants(job.keeper()["pid"])
    assert len(below) >= 7, "the supervisor, and a rank, its child and its grandchild, twice"
    bench.hpcds("cancel", "job")
    assert job.wait_over() == "cancelled"
    assert [pid for pid in below if process.start_time(pid) is not None] == []
    # The supervisor is killed together with its deaf ranks: it has said why before.
    assert job.causes == ["cancelled"]
    assert bench.hpcds("status", "job").stdout.startswith("job: cancelled")


def test_a_cancelled_job_can_be_continued(bench: Bench) -> None:
    job = bench.start("wait() if attempt == 1 else note('done')")
    job.wait_ready()
    done = bench.hpcds("resume", "job", check=False)
    assert done.returncode == 2
    assert "is running; it goes on by itself" in done.stderr
    bench.hpcds("cancel", "job")
    assert job.wait_over() == "cancelled"
    told = json.loads(bench.hpcds("resume", "job", "--json").stdout)
    assert told["action"] == "resumed"
    assert told["job_id"] != job.answer["job_id"]
    assert job.wait_over() == "finished"
    assert job.causes == ["cancelled", "finished"]
    assert read_object(job.run.job)["earlier"] == [job.answer["job_id"]]


def test_a_preempted_job_tells_its_ranks_only_and_starts_again(bench: Bench) -> None:
    job = bench.start(SAVES, resources={"tasks_per_node": 2})
    job.wait_ready(ranks=2)
    bench.hpcds("preempt", "job")
    assert job.wait_over() == "finished"
    assert [job.noted("heard", rank=rank) for rank in (0, 1)] == ["['SIGCONT', 'SIGTERM']"] * 2
    assert job.causes == ["preempted", "finished"]
    first, second = read_ledger(job.run)
    assert (first.action, first.exit_code, second.number) == ("requeue", 75, 2)
    assert first.job_id == second.job_id
    assert job.keeper()["job"]["restarts"] == 1


def test_ranks_that_ignore_a_preemption_are_ended_after_the_grace_and_start_again(bench: Bench) -> None:
    job = bench.start("if attempt > 1: sys.exit(0)\n" + DEAF, site=bench.site("short", grace_s=0.3))
    job.wait_ready()
    bench.hpcds("preempt", "job")
    job.wait(lambda: job.keeper()["job"]["preempting"], "the grace")
    assert job.wait_over() == "finished"
    # The supervisor is killed together with the ranks, as on Slurm: it may have come to say why, or not.
    assert job.causes in (["preempted", "finished"], ["requeued", "finished"], ["lost", "finished"])


def test_a_job_cancelled_in_its_grace_is_not_started_again(bench: Bench) -> None:
    job = bench.start(DEAF, site=bench.site("long", grace_s=60))
    job.wait_ready()
    bench.hpcds("preempt", "job")
    job.wait(lambda: job.keeper()["job"]["preempting"], "the grace")
    bench.hpcds("cancel", "job")
    assert job.wait_over() == "cancelled"
    assert len(job.causes) == 1


def test_a_crash_before_the_first_step_is_held_and_said_why(bench: Bench) -> None:
    job = bench.start("print('last words')\nsys.exit(3 if attempt == 1 else 0)")
    assert job.wait_over() == "held"
    (attempt,) = read_ledger(job.run)
    assert attempt.detail.startswith(
        "held: it crashed before its first step (it has told of none), and would again (rank 0 on "
    )
    assert attempt.failure is not None
    assert attempt.failure["last_lines"] == ["last words"]
    assert status_of(job.run).reason == attempt.detail
    assert job.keeper()["job"]["held"]
    assert bench.hpcds("resume", "job").returncode == 0
    assert job.wait_over() == "finished"


def test_a_held_job_can_be_cancelled(bench: Bench) -> None:
    job = bench.start("sys.exit(3)")
    assert job.wait_over() == "held"
    bench.hpcds("cancel", "job")
    assert job.state == "cancelled"


def test_a_crash_after_progress_starts_again_until_there_is_none(bench: Bench) -> None:
    job = bench.start("steps(1, min(2 * attempt, 4))\nsys.exit(3)")
    assert job.wait_over() == "held"
    assert job.causes == ["crashed", "crashed", "crashed"]
    ledger = read_ledger(job.run)
    assert [(attempt.action, attempt.last_step) for attempt in ledger] == [("requeue", 2), ("requeue", 4), ("hold", 4)]
    assert "it crashed at step 4, no further than the crash before (step 4)" in ledger[2].detail
    assert status_of(job.run).steps_lost == 6


def test_a_program_that_is_not_there_is_held_and_said_why(bench: Bench) -> None:
    job = bench.start("", command=["no-such-program"])
    assert job.wait_over() == "held"
    assert "cannot be started: No such file or directory: no-such-program" in status_of(job.run).reason


def test_ranks_are_warned_before_the_time_limit_and_start_again(bench: Bench) -> None:
    job = bench.start(SAVES, resources={"time": "0:30"}, restart={"lead": 28})
    assert job.wait_over() == "finished"
    assert job.noted("heard") == "['SIGCONT', 'SIGUSR2']"
    assert job.causes == ["walltime", "finished"]
    assert read_ledger(job.run)[0].action == "requeue"


def test_a_job_that_is_ended_by_its_time_limit_starts_again(bench: Bench) -> None:
    """Its ranks ignored the warning and were ended at the limit: the cause is the clock all the same."""
    program = "if attempt > 1: sys.exit(0)\nsignal.signal(signal.SIGUSR2, signal.SIG_IGN)\nwait()"
    job = bench.start(program, resources={"time": "0:03"}, restart={"lead": 1})
    assert job.wait_over() == "finished", read_ledger(job.run)
    *before, last = job.causes
    assert last == "finished"
    assert set(before) == {"walltime"}, "on a busy machine the second start may take three seconds too"


def test_a_job_that_may_not_start_again_is_held(bench: Bench) -> None:
    job = bench.start("sys.exit(75)", restart={"max_restarts": 1})
    assert job.wait_over() == "held"
    assert job.causes == ["stopped", "stopped"]
    assert "it was started again 1 times, and restart.max_restarts is 1" in status_of(job.run).reason


def supervisor_of(job: Job) -> int:
    (pid,) = [
        pid
        for pid in process.descendants(job.keeper()["pid"])
        if b"supervise" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return pid


def test_a_killed_supervisor_takes_its_ranks_along_and_the_run_can_be_continued(bench: Bench) -> None:
    job = bench.start("note('done') if attempt > 1 else steps(1, 3)\n" + "attempt > 1 or wait()")
    job.wait_ready()
    os.kill(supervisor_of(job), signal.SIGKILL)
    assert job.wait_over() == "failed"
    assert (
        "its supervisor was killed, and nothing started it again; `hpcds resume` continues it"
        in status_of(job.run).reason
    )
    bench.hpcds("resume", "job")
    assert job.wait_over() == "finished"
    assert job.causes == ["lost", "finished"]
    assert read_ledger(job.run)[0].last_step == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
def test_without_its_keeper_nothing_of_a_job_lives_on(number: signal.Signals, bench: Bench) -> None:
    program = f"if attempt > 1: sys.exit(0)\nif rank == 0: wait()\n{DEAF}"
    job = bench.start(program, resources={"tasks_per_node": 2})
    job.wait_ready(ranks=2)
    os.kill(job.keeper()["pid"], number)
    job.wait(lambda: not job.processes(), "the end of its processes", timeout_s=15)
    assert job.state in OVER
    bench.hpcds("resume", "job")
    assert job.wait_over() == "finished"


def test_a_run_whose_ranks_still_live_is_not_started_a_second_time(bench: Bench) -> None:
    """Two attempts at once would write the same files."""
    job = bench.start(DEAF)
    job.wait_ready()
    os.kill(job.keeper()["pid"], signal.SIGKILL)
    if bench.hpcds("resume", "job", check=False).returncode == 0:
        job.wait_ready(attempt=2)
    ranks = [pid for pid in job.processes() if b"rank.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) <= 1, "two attempts at once"


def test_a_run_that_is_continued_twice_at_once_is_continued_once(bench: Bench) -> None:
    job = bench.start("sys.exit(3) if attempt == 1 else wait()")
    assert job.wait_over() == "held"
    command = [sys.executable, "-m", "hpc_ds", "resume", str(job.run.root)]
    both = [
        subprocess.Popen(command, env=bench.env, cwd=bench.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    codes = sorted(one.wait() for one in both)
    job.wait_ready(attempt=2)
    time.sleep(0.5)
    ranks = [pid for pid in job.processes() if b"rank.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert (len(ranks), codes[0]) == (1, 0)


def test_a_killed_rank_ends_the_others_and_is_named(bench: Bench) -> None:
    job = bench.start(
        "note('pid', os.getpid())\nlisten('TERM')\nwait(lambda: heard)\nnote('heard', heard)",
        resources={"tasks_per_node": 2},
    )
    job.wait_ready(ranks=2)
    os.kill(int(job.noted("pid", rank=1)), signal.SIGKILL)
    assert job.wait_over() == "held"
    assert job.noted("heard", rank=0) == "['SIGTERM']"
    assert "(rank 1 on " in status_of(job.run).reason
    assert "killed by SIGKILL (out of memory?)" in status_of(job.run).reason


def test_two_runs_at_once_do_not_see_each_other(bench: Bench) -> None:
    program = "wait(lambda: os.path.exists(os.path.join(root, 'go')))\nnote('root', root)"
    first, second = bench.start(program), bench.start(program)
    assert first.run.root != second.run.root
    first.wait_ready()
    second.wait_ready()
    bench.hpcds("cancel", first.answer["job_id"])
    assert first.wait_over() == "cancelled"
    assert second.state == "running"
    (second.run.root / "go").touch()
    assert second.wait_over() == "finished"
    assert second.noted("root") == str(second.run.root)


def test_a_job_survives_the_terminal_it_was_submitted_from(bench: Bench) -> None:
    path = bench.job_file("wait(lambda: os.path.exists(os.path.join(root, 'go')))")
    terminal = subprocess.Popen(
        ["bash", "-c", f"{sys.executable} -m hpc_ds submit {path} --site quick.json --json; echo end; sleep 60"],
        cwd=bench.folder,
        env=bench.env,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert terminal.stdout is not None
    answer = json.loads(terminal.stdout.readline())
    assert terminal.stdout.readline() == b"end\n"
    job = Job(RunDir(Path(answer["run_dir"])), answer)
    bench.jobs.append(job)
    job.wait_ready()
    os.killpg(terminal.pid, signal.SIGHUP)
    os.killpg(terminal.pid, signal.SIGKILL)
    terminal.wait()
    terminal.stdout.close()
    time.sleep(0.2)
    assert job.state == "running"
    (job.run.root / "go").touch()
    assert job.wait_over() == "finished"


def test_a_run_can_be_followed_to_its_end(bench: Bench) -> None:
    bench.job_file("print('words')\nsteps(1, 3)")
    done = bench.hpcds("submit", "job.json", "--site", "quick.json", "--follow")
    assert "attempt 1 begins on " in done.stdout
    assert "attempt 1 ended: finished; all ranks finished" in done.stdout
    bench.job_file("sys.exit(3)")
    done = bench.hpcds("submit", "job.json", "--site", "quick.json", "--follow", check=False)
    assert done.returncode == 1
    assert "held: it crashed before its first step" in done.stdout


def test_the_words_of_all_attempts_are_followed(bench: Bench) -> None:
    job = bench.start("print('attempt', attempt, flush=True)\n" + SAVES)
    job.wait_ready()
    follower = subprocess.Popen(
        [sys.executable, "-m", "hpc_ds", "logs", "-f", str(job.run.root)],
        env=bench.env,
        cwd=bench.folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    bench.hpcds("preempt", "job")
    assert follower.communicate(timeout=60)[0] == "attempt 1\nattempt 2\n"
    assert follower.returncode == 0
    assert bench.hpcds("logs", "job", "--attempt", "1").stdout == "attempt 1\n"
    missing = bench.hpcds("logs", "job", "--attempt", "7", check=False)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


def test_a_job_without_a_site_runs_here_where_no_slurm_answers(bench: Bench) -> None:
    path = bench.job_file("")
    bench.env["PATH"] = str(Path(sys.executable).parent) + ":/bin"
    for program in ("sbatch", "sinfo"):
        (bench.folder / program).write_text("#!/bin/sh\nexit 1\n")
        (bench.folder / program).chmod(0o755)
    bench.env["PATH"] = f"{bench.folder}:{bench.env['PATH']}"
    answer = json.loads(bench.hpcds("submit", str(path), "--json").stdout)
    assert answer["site"] == "local"
    job = Job(RunDir(Path(answer["run_dir"])), answer)
    bench.jobs.append(job)
    assert job.wait_over() == "finished"


LIMITS = {
    "": (None, 0, signal.SIGUSR2, 20, 30),
    "#LOCAL time_limit_s=90\n#LOCAL lead_s=5\n#LOCAL signal=TERM\n#LOCAL grace_s=1.5\n#LOCAL kill_wait_s=2\n": (
        90,
        5,
        signal.SIGTERM,
        1.5,
        2,
    ),
    "echo '#LOCAL time_limit_s=90'\n ## #LOCAL lead_s=5\n": (None, 0, signal.SIGUSR2, 20, 30),
}


@pytest.mark.parametrize(("script", "limits"), LIMITS.items(), ids=["none", "all", "elsewhere"])
def test_the_limits_of_a_script_are_read(script: str, limits: tuple[Any, ...]) -> None:
    assert Limits.of(f"#!/bin/bash\n{script}") == Limits(*limits)
