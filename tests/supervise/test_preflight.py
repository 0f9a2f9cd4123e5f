"""The preflight of an attempt: when it is due, what follows it, and that it never lets unfit nodes have the ranks."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeScheduler, fake_program

from hpc_ds.cluster.scheduler import JobState
from hpc_ds.config.job import JobConfig, Restart
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.supervise import preflight, supervisor, talk, watch
from hpc_ds.supervise.ledger import Attempt, read_ledger
from hpc_ds.supervise.policy import after_preflight, excluded_nodes
from hpc_ds.supervise.supervisor import Supervisor

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.run_dir import RunDir

# Python 3.12 warns of a fork where torch has threads. The child only sets signals before it becomes another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

RUNNING = JobState("RUNNING", nodes="vm")
TRAINED = "print('trained')"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(talk, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(talk, "_LOOKS", 1)
    monkeypatch.setattr(preflight, "_GRACE_S", 0.0)
    monkeypatch.setattr(preflight, "_LOOK_AGAIN_S", 0.0)
    for name in ("_ANSWER_AT_START_S", "_ANSWER_AT_END_S", "_HELD_STILL_FOR_S"):
        monkeypatch.setattr(supervisor, name, 0.0)


def job_of(**data: Any) -> JobConfig:
    job: JobConfig = check(JobConfig, {"name": "a", "command": [sys.executable, "-c", TRAINED], **data}, "job.json")
    return job


def attempt(run: RunDir, scheduler: FakeScheduler, **data: Any) -> Attempt:
    Supervisor(run, job_of(**data), load_site("local"), "25", scheduler).attempt()
    return read_ledger(run)[-1]


def python_that(tmp_path: Path, text: str) -> dict[str, str]:
    """An environment of kind venv whose interpreter does something else."""
    fake_program(tmp_path / "venv" / "bin", "python", text)
    return {"kind": "venv", "path": str(tmp_path / "venv")}


def was_trained(run: RunDir, number: int = 1) -> bool:
    return (run.attempt_logs(number) / "rank-0.log").exists()


def past(cause: str, *, nodes: str = "n[1-2]", node: str = "", preflight_s: float | None = 1.0) -> Attempt:
    return Attempt(1, nodes=nodes, cause=cause, node=node, preflight_s=preflight_s)


DUE: dict[str, tuple[Any, list[Attempt], bool]] = {
    "not asked for": (False, [], False),
    "the first attempt": (True, [], True),
    "after a preemption, on nodes that passed": (True, [past("preempted")], False),
    "after a crash": (True, [past("crashed")], True),
    "after a lost node": (True, [past("preempted"), past("node_failure", preflight_s=None)], True),
    "on another node": (True, [past("preempted", nodes="n[1,3]")], True),
    "on nodes that passed one after the other": (
        True,
        [past("stopped", nodes="n1"), past("stopped", nodes="n2")],
        False,
    ),
    "nobody has looked yet": (True, [past("preempted", preflight_s=None)], True),
    "always": ({"always": True}, [past("preempted")], True),
    "with other options": ({"slow": "warn"}, [past("preempted")], False),
}


@pytest.mark.parametrize("case", DUE)
def test_when_it_is_due(case: str) -> None:
    wish, earlier, due = DUE[case]
    assert preflight.is_due(job_of(preflight=wish), earlier, ["n1", "n2"]) == due


def after(unfit: list[str], *before: Attempt, elsewhere: bool = True, **limits: Any) -> tuple[str, str]:
    return after_preflight(unfit, "n3: no disk", before, Restart(**limits), elsewhere=elsewhere)


def test_what_follows_a_preflight_that_failed() -> None:
    assert after(["n3"]) == ("requeue", "preflight failed: queued again without n3: n3: no disk")
    assert after([]) == ("hold", "held: the preflight failed, and not for one node: n3: no disk")
    assert after(["n3"], elsewhere=False)[1].startswith(
        "held: the preflight failed, and the job has to run on these nodes"
    )
    failed = [past("preflight", node=f"n{place}") for place in (7, 8, 9)]
    assert after(["n3"], *failed[:2])[0] == "requeue"
    assert after(["n3"], *failed) == (
        "hold",
        "held: 4 nodes would be left out, and restart.max_excluded_nodes is 3: n3: no disk",
    )
    assert after(["n9"], *failed)[1].startswith("held: the preflight failed 4 times in a row")
    assert after(["n3"], max_excluded_nodes=0)[1].startswith("held: 1 nodes would be left out")
    assert after(["n3"], past("preempted"), max_restarts=1)[1].startswith("held: it was started again 1 times")


def test_one_failed_preflight_excludes_its_nodes() -> None:
    attempts = [
        past("preflight", node="n[3-4]"),
        past("crashed", node="n5"),
        past("hang", node="n6"),
        past("hang", node="n5"),
    ]
    assert excluded_nodes(attempts, 9) == ["n3", "n4", "n5"]
    assert excluded_nodes(attempts, 1) == ["n5"]


def test_ranks_start_after_a_preflight_that_passed(run: RunDir) -> None:
    """The real doctor, alone on this machine."""
    closed = attempt(
        run, FakeScheduler([RUNNING]), preflight={"limit_minutes": 5}, checkpoint={"dir": str(run.root / "not-yet")}
    )
    story = (run.attempt_logs(1) / "preflight" / "report.json").read_text()
    assert (closed.cause, closed.action, closed.exit_code) == ("finished", "finish", 0), story
    assert closed.preflight_s is not None
    assert (run.attempt_logs(1) / "rank-0.log").read_text() == "trained\n"
    (record,) = json.loads(story)["records"]
    assert (record["phase"], record["node"], record["errors"]) == ("done", os.uname().nodename, {})
    assert not run.failures(1).exists()
    assert not run.rendezvous.exists(), "it met elsewhere"


def test_without_it_nothing_is_looked_at(run: RunDir) -> None:
    assert attempt(run, FakeScheduler([RUNNING])).preflight_s is None
    assert not (run.attempt_logs(1) / "preflight").exists()


def test_a_doctor_that_cannot_be_started_holds_the_run(run: RunDir, tmp_path: Path) -> None:
    scheduler = FakeScheduler([RUNNING])
    closed = attempt(run, scheduler, preflight=True, runtime={"kind": "venv", "path": str(tmp_path / "no-venv")})
    assert (closed.cause, closed.action, closed.exit_code, closed.node) == ("preflight", "hold", 1, "")
    assert "no rank reported; did the doctor start?" in closed.detail
    assert "no-venv/bin/python" in closed.detail
    assert scheduler.requests == ["hold 25"]
    assert not was_trained(run)


def test_what_a_doctor_that_failed_said_is_told(run: RunDir, tmp_path: Path) -> None:
    runtime = python_that(tmp_path, "echo 'No module named hpc_ds.runtime.doctor'; exit 1")
    closed = attempt(run, FakeScheduler([RUNNING]), preflight=True, runtime=runtime)
    assert (closed.cause, closed.action) == ("preflight", "hold")
    assert closed.detail.endswith("exit code 1, No module named hpc_ds.runtime.doctor)")


def test_a_doctor_that_hangs_is_ended(run: RunDir, tmp_path: Path) -> None:
    runtime = python_that(tmp_path, "exec sleep 600")
    closed = attempt(run, FakeScheduler([RUNNING]), preflight={"limit_minutes": 0.005}, runtime=runtime)
    assert (closed.cause, closed.action) == ("preflight", "hold")
    assert not was_trained(run)


def test_a_doctor_that_ends_well_without_a_word_is_not_believed(run: RunDir, tmp_path: Path) -> None:
    closed = attempt(run, FakeScheduler([RUNNING]), preflight=True, runtime=python_that(tmp_path, "exit 0"))
    assert (closed.cause, closed.exit_code) == ("preflight", 1)
    assert not was_trained(run)


def test_a_run_that_is_asked_to_stop_meanwhile_stops(run: RunDir, tmp_path: Path) -> None:
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("PENDING", restarts=1)])
    closed = attempt(run, scheduler, preflight=True, runtime=python_that(tmp_path, "exit 75"))
    assert (closed.cause, closed.action) == ("stopped", "requeue")
    assert scheduler.requests == ["requeue 25"]
    assert not was_trained(run)


def test_a_preemption_meanwhile_is_one(run: RunDir, tmp_path: Path) -> None:
    scheduler = FakeScheduler([RUNNING, JobState("RUNNING", preempting=True), JobState("PENDING", restarts=1)])
    closed = attempt(run, scheduler, preflight=True, runtime=python_that(tmp_path, "exit 143"))
    assert (closed.cause, closed.action) == ("preempted", "requeue")
    assert not was_trained(run)


def test_the_next_attempt_of_a_run_that_passed_is_not_looked_at_again(run: RunDir) -> None:
    line = {"event": "opened", "number": 1, "job_id": "25", "nodes": "vm", "opened": 1.0}
    passed = {"event": "closed", "number": 1, "cause": "preempted", "action": "requeue", "preflight_s": 2.0}
    run.attempt_logs(1).mkdir(parents=True)
    run.ledger.write_text("".join(json.dumps(one) + "\n" for one in (line, passed)))
    assert attempt(run, FakeScheduler([RUNNING]), preflight=True).preflight_s is None
    assert was_trained(run, 2)
