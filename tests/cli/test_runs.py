"""The verbs on runs as a person has them: real runs on site local, and Slurm's programs played where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program
from whole_runs import Run, Runs, wait_until

from hpc_ds.report.goodput import IN_ALLOCATION, OUTSIDE
from hpc_ds.supervise.ledger import Attempt

if TYPE_CHECKING:
    from collections.abc import Iterator

# A rank that takes steps as an engine would tell of them, until it is told to stop; the last attempt finishes.
PROGRAM = """
import os, signal, sys, time
from hpc_ds.runtime.run import CurrentRun
run, rank, told = CurrentRun.from_environment(), int(os.environ["RANK"]), []
for name in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(name, lambda number, _: told.append(number))
print("rank", rank, "of", os.environ["WORLD_SIZE"], "attempt", run.attempt, flush=True)
ready = [run.files.root / f"ready-{one}-{run.attempt}" for one in range(int(os.environ["WORLD_SIZE"]))]
ready[rank].touch()
while not all(path.exists() for path in ready):
    time.sleep(0.01)
first = 1 + sum(1 for _ in run.files.events.open()) if run.files.events.exists() else 1
for step in range(first, 10_000):
    if rank == 0:
        run.record("step", step=step, loss=1.0 / step, lr=0.1, seconds=0.05)
    time.sleep(0.05)
    if os.path.exists(run.files.root / "enough"):
        sys.exit(0)
    if told:
        sys.exit(75)
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    (tmp_path / "rank.py").write_text(PROGRAM)
    runs = Runs(tmp_path, os.environ)
    yield runs
    for folder in (tmp_path / "runs").glob("*"):
        (folder / "enough").touch()
        runs.hpcds("cancel", str(folder), check=False)


def started(runs: Runs, *options: str) -> Run:
    job = runs.folder / "job.json"
    job.write_text(json.dumps({"name": "job", "command": [sys.executable, "rank.py"], "steps": 20_000}))
    return runs.submit(job, "--site", "local", *options)


def told(runs: Runs, *words: str) -> Any:
    return json.loads(runs.hpcds(*words, "--json").stdout)


def wait_for_attempt(run: Run, number: int, step: int = 1) -> None:
    def reached() -> bool:
        return sum(event["attempt"] == number for event in run.steps()) >= step

    wait_until(reached, 120, run, f"step {step} of attempt {number}")


@pytest.mark.local
def test_a_running_run_is_told_of_and_requeued_but_not_changed(runs: Runs) -> None:
    run = started(runs)
    wait_for_attempt(run, 1, 5)
    (status,) = told(runs, "status")
    assert (status["run_dir"], status["state"], status["steps"]) == (str(run.folder), "running", 20_000)
    assert status["eta_s"] > 0
    assert told(runs, "requeue", "job") == {"run_dir": str(run.folder), "job_id": run.job_id, "action": "requeued"}
    wait_for_attempt(run, 2)
    assert [attempt["cause"] for attempt in told(runs, "history", "job")] == ["requeued", None]
    refused = runs.hpcds("resume", "job", "--tasks-per-node", "1", check=False)
    assert refused.returncode == 2
    assert "is running; `hpcds cancel` it first to change it" in refused.stderr
    runs.hpcds("cancel", "job")
    assert run.wait_until_over()["state"] == "cancelled"
    refused = runs.hpcds("requeue", "job", check=False)
    assert refused.returncode == 2
    assert "is cancelled, so there is nothing to queue again; `hpcds resume` continues the run" in refused.stderr


# What cannot be changed into -> what is said.
UNFIT = {
    ("--set", "resources.node=2"): "resources.node: unknown key",
    ("--set", "site=slurm"): "a run keeps its site; submit a new run instead",
    ("--time", "0:10"): "not longer than restart.lead",
    ("--set", 'training={"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}'): "train_batch_size 7: not",
}


@pytest.mark.local
def test_a_cancelled_run_goes_on_with_other_resources(runs: Runs) -> None:
    run = started(runs, "--tasks-per-node", "2")
    wait_for_attempt(run, 1)
    runs.hpcds("cancel", "job")
    assert run.wait_until_over()["state"] == "cancelled"
    before = (run.folder / "config.json").read_text()
    for options, words in UNFIT.items():
        refused = runs.hpcds("resume", "job", *options, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert words in refused.stderr
        assert (run.folder / "config.json").read_text() == before
        assert not list(run.folder.glob("config-before-*"))
    assert told(runs, "resume", "job", "--tasks-per-node", "1", "--time", "30")["job_id"] != run.job_id
    assert (run.folder / "config-before-attempt-2.json").read_text() == before
    assert "#LOCAL time_limit_s=1800" in (run.folder / "script.sbatch").read_text()
    wait_for_attempt(run, 2)
    (run.folder / "enough").touch()
    assert run.wait_until_over()["state"] == "finished"
    told_afterwards(runs)


def told_afterwards(runs: Runs) -> None:
    """What the verbs say of a run of two attempts, of two ranks and then of one."""
    assert runs.hpcds("logs", "job").stdout == "rank 0 of 1 attempt 2\n"
    line = {"attempt": 1, "rank": 1, "line": "rank 1 of 2 attempt 1"}
    assert told(runs, "logs", "job", "--attempt", "1", "--rank", "1") == line
    every = runs.hpcds("logs", "job", "--attempt", "1", "--rank", "all").stdout.splitlines()
    assert every == ["0: rank 0 of 2 attempt 1", "1: rank 1 of 2 attempt 1"]
    assert "attempt 2 of job" in runs.hpcds("logs", "job", "--scheduler").stdout
    rows = told(runs, "history", "job")
    assert [(row["cause"], row["lost_steps"]) for row in rows] == [("cancelled", 0), ("finished", 0)]
    report = told(runs, "report", "job")
    assert [one["devices"] for one in report["attempts"]] == [2, 1]
    assert 0 < report["goodput"] < 1
    assert report["seconds"]["stopped"] > 0
    assert "goodput" in runs.hpcds("report", "job").stdout
    assert told(runs, "status") == []
    assert told(runs, "list")[0]["state"] == "finished"


@pytest.mark.local
def test_watching_ends_with_the_last_run(runs: Runs) -> None:
    first, second = started(runs), started(runs)
    for run in (first, second):
        wait_for_attempt(run, 1)
        (run.folder / "enough").touch()
    lines = runs.hpcds("status", "--watch", str(first.folder), str(second.folder)).stdout.splitlines()
    for run in (first, second):
        assert [line for line in lines if f"{run.folder.name}: finished (finished in attempt 1)" in line]
    last = runs.hpcds("status", "--watch", "--json", str(first.folder)).stdout.splitlines()[-1]
    assert json.loads(last)["state"] == "finished"
    assert runs.hpcds("status", "--watch").stdout == "no run in 'runs' is going on; `hpcds list` shows all\n"


# Slurm played: squeue and scontrol say what the file "said" says; everything called is written down.
PLAYED = {
    "sbatch": "[ $1 = --test-only ] && exit 0; n=$(cat $here/count 2>/dev/null || echo 24); echo $((n + 1)) | tee $here/count",
    "squeue": "cat $here/queue",
    "scontrol": '[ "$1" = show ] && echo "JobId=$4 JobState=$(cat $here/said)"; true',
    "scancel": 'echo CANCELLED > $here/said; [ "$1" != 26 ] || { echo "scancel: error: Invalid job id 26" >&2; exit 1; }',
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
}


@pytest.fixture
def played(tmp_path: Path) -> Runs:
    """A folder with a job, and programs of Slurm on PATH."""
    for name, text in PLAYED.items():
        log = f'here=$(dirname $0)/..; echo {name} "$@" >> $here/calls'
        fake_program(tmp_path / "bin", name, f"{log}\n{text}")
    (tmp_path / "job.json").write_text(json.dumps({"name": "gpt", "command": ["true"], "env": {"A": "1"}}))
    (tmp_path / "queue").write_text("")
    (tmp_path / "said").write_text("PENDING Reason=Resources")
    return Runs(tmp_path, {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})


def called(runs: Runs, program: str) -> list[str]:
    return [line for line in (runs.folder / "calls").read_text().splitlines() if line.startswith(f"{program} ")]


def submitted(runs: Runs, count: int) -> list[Run]:
    return [runs.submit(runs.folder / "job.json", "--site", "slurm") for _ in range(count)]


STATUS_KEYS = {
    "run_dir", "name", "site", "job_id", "state", "reason", "step", "loss", "saved_step", "steps_lost", "queue_state",
    "queue_reason", "expected_start", "ends_at", "nodes", "excluded_nodes", "step_at", "steps", "steps_per_s",
    "samples_per_s", "eta_s", "submitted", "failure", "quiet_ranks", "attempts",
}  # fmt: skip


def test_many_runs_are_told_of_by_one_squeue(played: Runs) -> None:
    first, second, third = submitted(played, 3)
    queue = "25|25|PENDING|7|2030-01-31T13:45:00|N/A||Resources\n26|26|RUNNING|7|N/A|N/A|n[1-2]|None\n"
    (played.folder / "queue").write_text(queue)
    found = told(played, "status")
    assert [(one["run_dir"], one["state"], one["queue_reason"]) for one in found] == [
        (str(first.folder), "waiting", "Resources"),
        (str(second.folder), "running", None),
    ]
    assert all(set(one) == STATUS_KEYS for one in found)
    assert found[0]["expected_start"] == time.mktime((2030, 1, 31, 13, 45, 0, 0, 0, -1))
    assert len(called(played, "squeue")) == 1
    assert len(called(played, "sacct")) == 1
    table = played.hpcds("status", "25", "27").stdout
    assert "in the queue (Resources), expected at 2030-01-31 13:45" in table
    assert "the job ended before its first attempt began" in table
    rows = told(played, "list")
    assert [(row["job_id"], row["state"], row["attempts"]) for row in rows] == [
        ("25", "waiting", 0), ("26", "running", 0), ("27", "failed", 0),
    ]  # fmt: skip
    assert set(rows[0]) == {
        "run_dir", "name", "site", "job_id", "state", "step", "attempts", "submitted", "age_s",
    }  # fmt: skip
    assert third.folder.name in played.hpcds("list").stdout
    one = played.hpcds("status", "25").stdout
    assert one.startswith("gpt: waiting (in the queue (Resources))\n  expected to start at 2030-01-31 13:45 (in ")


def test_runs_of_other_folders_are_listed_when_asked_for(played: Runs) -> None:
    (run,) = submitted(played, 1)
    assert told(played, "list", "--runs", "elsewhere") == []
    assert [row["run_dir"] for row in told(played, "list", "--runs", "elsewhere", "--all")] == [str(run.folder)]
    assert played.hpcds("list", "--runs", "elsewhere").stdout.startswith("no run in 'elsewhere'; `hpcds list --all`")


def test_several_runs_are_cancelled_and_one_that_cannot_be_is_named(played: Runs) -> None:
    submitted(played, 3)
    done = played.hpcds("cancel", "25", "26", "27", "--json", check=False)
    assert [one["job_id"] for one in json.loads(done.stdout)] == ["25", "27"]
    assert (done.returncode, done.stderr) == (3, "hpcds: scancel: exit status 1: scancel: error: Invalid job id 26\n")
    assert called(played, "scancel") == ["scancel 25", "scancel 26", "scancel 27"]
    assert played.hpcds("preempt", "25", "27").stdout.count("preempted job") == 2


def test_a_waiting_job_that_is_changed_is_cancelled_and_submitted_anew(played: Runs) -> None:
    (run,) = submitted(played, 1)
    before = (run.folder / "config.json").read_text()
    environment = (run.folder / "env.sh").read_text()
    answer = told(played, "resume", "gpt", "--nodes", "3", "--time", "2:00:00", "--set", "restart.max_crashes=1")
    assert (answer["job_id"], answer["action"]) == ("26", "resumed")
    assert called(played, "scancel") == ["scancel 25"]
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["resources"]["nodes"], config["resources"]["time"]) == (3, "2:00:00")
    assert config["restart"]["max_crashes"] == 1
    script = (run.folder / "script.sbatch").read_text()
    assert "#SBATCH --nodes=3\n" in script
    assert "#SBATCH --time=2:00:00\n" in script
    assert (run.folder / "config-before-attempt-1.json").read_text() == before
    assert (run.folder / "env.sh").read_text() == environment
    job = json.loads((run.folder / "job.json").read_text())
    assert (job["job_id"], job["earlier"], set(job["queued"])) == ("26", ["25"], {"25", "26"})
    told(played, "resume", "gpt", "--set", "env.A=2")
    assert "export A=2" in (run.folder / "env.sh").read_text()
    assert (run.folder / "config-before-attempt-1.json").read_text() == before, "no attempt has begun since"


def test_a_resumed_run_keeps_off_the_nodes_that_failed_it(played: Runs) -> None:
    (run,) = submitted(played, 1)
    fake_program(played.folder / "bin", "sinfo", "echo n1 idle; echo n2 idle; echo n3 idle")
    (played.folder / "said").write_text("CANCELLED Partition=main NumNodes=1")
    lines = [
        {"event": "closed", "number": number, "closed": 2.0, "cause": "node_failure", "node": "n1"} for number in (1, 2)
    ]
    (run.folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told(played, "resume", "gpt")
    assert "scontrol update JobId=26 ExcNodeList=n1" in called(played, "scontrol")
    assert told(played, "status", "gpt")["excluded_nodes"] == ["n1"]


def test_a_refused_change_leaves_the_run_as_it_was(played: Runs) -> None:
    (run,) = submitted(played, 1)
    (played.folder / "said").write_text("CANCELLED")
    fake_program(played.folder / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    names = ("config.json", "script.sbatch", "env.sh", "job.json")
    before = {name: (run.folder / name).read_text() for name in names}
    done = played.hpcds("resume", "gpt", "--partition", "x", "--set", "env.A=2", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "invalid partition specified: x" in done.stderr
    assert {name: (run.folder / name).read_text() for name in names} == before
    assert not list(run.folder.glob("config-before-*"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("PENDING Reason=Resources", "job 25 is pending: it is in the queue already; wait for it"),
        ("PENDING Priority=0 Reason=JobHeldUser", "job 25 is held; `hpcds resume` releases it"),
        ("COMPLETING", "job 25 is ending; look at `hpcds status` in a moment"),
        ("FAILED", "job 25 is failed, so there is nothing to queue again; `hpcds resume` continues the run"),
    ],
)
def test_only_a_run_that_runs_is_requeued(said: str, words: str, played: Runs) -> None:
    submitted(played, 1)
    (played.folder / "said").write_text(said)
    done = played.hpcds("requeue", "gpt", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert not [call for call in called(played, "scontrol") if "requeue" in call]


def test_a_job_that_is_just_ending_is_waited_for_before_its_run_resumes(played: Runs) -> None:
    submitted(played, 1)
    (played.folder / "said").write_text("COMPLETING")
    ending = threading.Timer(1.0, (played.folder / "said").write_text, ["CANCELLED"])
    ending.start()
    assert told(played, "resume", "gpt")["action"] == "resumed"
    ending.join()


def test_a_terminal_shows_a_run_live(played: Runs) -> None:
    """In a terminal the same lines are painted over, and the story comes last."""
    (run,) = submitted(played, 1)
    ledger = run.folder / "attempts.jsonl"
    ledger.write_text(
        '{"event": "opened", "number": 1, "job_id": "25", "opened": 1.0}\n'
        '{"event": "closed", "number": 1, "closed": 2.0, "cause": "finished", "detail": "all ranks finished"}\n'
    )
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "hpc_ds", "status", "--watch", "gpt"]
    with subprocess.Popen(command, stdin=child, stdout=child, env=played.env, cwd=played.folder) as watching:
        os.close(child)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while fresh := os.read(parent, 65536):
                shown += fresh
    os.close(parent)
    assert watching.returncode == 0
    assert b"finished in attempt 1" in shown
    assert b"run folder" in shown


DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
HISTORY_KEYS = {*Attempt.__dataclass_fields__, "seconds", "running", "lost_steps"}
REPORT_KEYS = {
    "run_dir", "name", "state", "goodput", "seconds", "unit", "hours", "hours_by_cause", "sacct_allocated_s", "attempts",
    "allocated", *IN_ALLOCATION, *OUTSIDE, "number", "cause", "devices",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted({*STATUS_KEYS, *HISTORY_KEYS, *REPORT_KEYS, "age_s", "line", "action"}))
def test_every_key_is_documented(key: str) -> None:
    assert f"`{key}`" in DOCUMENTED
