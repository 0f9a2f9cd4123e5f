"""One attempt with real ranks and a scheduler that is a list of answers. Whole jobs: tests/cluster/test_local.py."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeScheduler

from hpc_ds.cluster.scheduler import JobState
from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.errors import CommandError, NoProgramError, RefusedError, RunError, SubmitError
from hpc_ds.run_dir import RunDir, append_line, read_object, write_json
from hpc_ds.supervise import supervisor, talk, watch
from hpc_ds.supervise.ledger import close_attempt, open_attempt, read_ledger
from hpc_ds.supervise.supervisor import Supervisor, supervise

if TYPE_CHECKING:
    from pathlib import Path

# Python 3.12 warns of a fork where torch has threads. The child only sets signals before it becomes another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

RUNNING = JobState("RUNNING", nodes="vm")
STEP_7 = (
    "import os; open(os.environ['HPCDS_RUN_DIR'] + '/events.jsonl', 'a').write("
    '\'{"event": "step", "attempt": 1, "step": 7, "loss": 1.0}\\n\')'
)
DOWN = CommandError(["scontrol"], 1, "Unable to contact slurm controller")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(talk, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(talk, "_LOOKS", 1)
    for name in ("_ANSWER_AT_START_S", "_ANSWER_AT_END_S", "_HELD_STILL_FOR_S"):
        monkeypatch.setattr(supervisor, name, 0.0)
    monkeypatch.setattr("time.sleep", lambda _seconds, sleep=supervisor.time.sleep: sleep(0.01))


def attempt(run: RunDir, scheduler: FakeScheduler, program: str, **data: Any) -> int:
    job: JobConfig = check(JobConfig, {"name": "a", "command": [sys.executable, "-c", program], **data}, "job.json")
    return Supervisor(run, job, load_site("local"), "25", scheduler).attempt()


def test_ranks_learn_their_run_and_nothing_of_another_launch(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "99")
    say = "import os; print({name: os.environ.get(name) for name in (%r)})"
    names = ("HPCDS_RUN_DIR", "HPCDS_ATTEMPT", "HPCDS_DEADLINE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    assert attempt(run, FakeScheduler([RUNNING]), say % (names,)) == 0
    expected = dict(zip(names, (str(run.root), "1", str(run.deadline), None, None, "0", "1"), strict=True))
    assert (run.attempt_logs(1) / "rank-0.log").read_text() == f"{expected}\n"


def test_a_variable_that_the_job_sets_itself_is_kept(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29501")
    attempt(run, FakeScheduler([RUNNING]), "import os; print(os.environ['MASTER_PORT'])", env={"MASTER_PORT": "29501"})
    assert (run.attempt_logs(1) / "rank-0.log").read_text() == "29501\n"


def test_the_deadline_is_the_end_of_the_job_less_the_lead(run: RunDir) -> None:
    limited = JobState("RUNNING", end_time=4_000_000_000.0)
    attempt(run, FakeScheduler([limited]), "raise SystemExit(75)", restart={"lead": 100})
    assert run.deadline.read_text() == "3999999900.0 4000000000.0 - 100\n"
    attempt(run, FakeScheduler([RUNNING]), "")
    assert not run.deadline.exists()


def test_a_run_that_finished_asks_for_nothing(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING])
    assert attempt(run, scheduler, "") == 0
    assert scheduler.requests == []
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action, closed.exit_code, closed.nodes) == ("finished", "finish", 0, "vm")


def test_a_run_that_saved_is_queued_again_and_says_when_that_was_seen(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("COMPLETING", restarts=1)])
    assert attempt(run, scheduler, "raise SystemExit(75)") == 75
    assert scheduler.requests == ["requeue 25"]
    assert "requeue: the scheduler took it" in capfd.readouterr().err
    assert read_ledger(run)[0].cause == "stopped"


def test_a_run_that_the_scheduler_has_queued_again_is_left_to_it(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING, JobState("COMPLETING", restarts=1)])
    assert attempt(run, scheduler, "raise SystemExit(75)", restart={"max_restarts": 0}) == 75
    assert scheduler.requests == []
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action, closed.detail) == (
        "requeued",
        "leave",
        "requeued: the scheduler starts it again",
    )


def test_a_run_that_finished_while_it_was_queued_again_is_finished(run: RunDir) -> None:
    assert attempt(run, FakeScheduler([RUNNING, JobState("COMPLETING", restarts=1)]), STEP_7) == 0
    assert read_ledger(run)[0].action == "finish"


def test_a_program_that_ends_with_0_when_it_is_told_to_has_not_finished(run: RunDir) -> None:
    """It does not know our exit codes; on Slurm before 24.05 its job would have ended for good."""
    preempted = JobState("RUNNING", preempting=True)
    scheduler = FakeScheduler([RUNNING, preempted, JobState("PENDING", restarts=1)])
    attempt(run, scheduler, "")
    assert scheduler.requests == ["requeue 25"]
    assert read_ledger(run)[0].cause == "preempted"


def test_a_supervisor_that_fails_closes_and_queues_its_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("of the test")

    monkeypatch.setattr(watch.Watch, "_learn", lambda self: broken() if self._due else None)
    monkeypatch.setattr(watch, "_LEARN_EVERY_S", 0.0)
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("PENDING", restarts=1)])
    attempt(run, scheduler, f"{STEP_7}; import time; time.sleep(60)")
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action) in {("crashed", "requeue"), ("crashed", "hold")}
    assert "the supervisor failed: ValueError: of the test" in closed.detail


def test_what_cannot_be_written_keeps_no_run_from_being_queued_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: neither ledger nor log nor job file."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpc_ds.supervise.ledger.append_line", full)
    monkeypatch.setattr("hpc_ds.script.job_file.write_json", full)
    monkeypatch.setattr("os.write", full)
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("PENDING", restarts=1)])
    assert attempt(run, scheduler, "raise SystemExit(75)") == 75
    assert scheduler.requests == ["requeue 25"]


def test_two_jobs_that_begin_in_the_same_moment_do_not_both_run_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_ds.supervise.ledger._CLAIM_S", 0.0)
    real = RunDir.attempt_logs

    def other_was_quicker(self: RunDir, number: int) -> Path:
        path = real(self, number)
        if not path.exists():
            path.mkdir(parents=True)
            append_line(self.ledger, {"event": "opened", "number": number, "job_id": "24", "opened": 1.0})
        return path

    monkeypatch.setattr(RunDir, "attempt_logs", other_was_quicker)
    with pytest.raises(RunError, match="another job began attempt 1 in the same moment; cancel one of them"):
        attempt(run, FakeScheduler([RUNNING]), "")


def test_an_attempt_that_never_got_into_the_ledger_is_passed_over(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_ds.supervise.ledger._CLAIM_S", 0.0)
    run.attempt_logs(1).mkdir(parents=True)
    attempt(run, FakeScheduler([RUNNING]), "")
    assert [one.number for one in read_ledger(run)] == [2]


def test_a_requeue_that_nobody_saw_is_not_said_to_have_happened(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    attempt(run, FakeScheduler([RUNNING]), "raise SystemExit(75)")
    said = capfd.readouterr().err
    assert "requeue: asked for, not yet seen" in said
    assert "took it" not in said


def test_a_crash_is_held_and_its_rank_named(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("SPECIAL_EXIT", held=True)])
    assert attempt(run, scheduler, "print('words'); raise SystemExit(3)", resources={"tasks_per_node": 1}) == 3
    assert scheduler.requests == ["hold 25"]
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action) == ("crashed", "hold")
    assert closed.detail.startswith(
        "held: it crashed before its first step (it has told of none), and would again (rank 0 on "
    )
    assert closed.detail.endswith(": exit code 3, words)")
    assert closed.failure is not None
    assert (closed.failure["rank"], closed.failure["last_lines"]) == (0, ["words"])


def test_a_crash_after_progress_is_queued_again(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("PENDING", restarts=1)])
    attempt(run, scheduler, f"{STEP_7}; raise SystemExit(3)")
    assert scheduler.requests == ["requeue 25"]
    assert read_ledger(run)[0].last_step == 7


def test_a_program_that_is_not_there_is_a_crash_that_is_held(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING])
    assert attempt(run, scheduler, "", command=["no-such-program"]) == 127
    assert scheduler.requests == ["hold 25"]
    assert "cannot be started: No such file or directory: no-such-program" in read_ledger(run)[0].detail


def test_a_scheduler_that_never_answers_does_not_stop_a_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert attempt(run, FakeScheduler([DOWN]), "") == 0
    assert read_ledger(run)[0].nodes == "n[1-2]"


def test_where_nobody_may_queue_it_again_a_job_of_its_own_goes_on(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler = FakeScheduler([JobState("RUNNING", nodes="vm", may_requeue=False)])
    assert attempt(run, scheduler, "raise SystemExit(75)") == 75
    assert scheduler.requests == ["submit run after 25"]
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action) == ("stopped", "successor")
    assert closed.detail.endswith("; as job 1")
    assert read_object(run.job)["job_id"] == "1"
    assert read_object(run.job)["earlier"] == ["25"]
    assert "successor: job 1 goes on when this one has ended" in capfd.readouterr().err


def test_a_requeue_that_is_refused_is_followed_by_a_successor(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING], requeue=RefusedError("Requested operation is presently disabled for job 25"))
    attempt(run, scheduler, "raise SystemExit(75)")
    assert scheduler.requests == ["requeue 25", "submit run after 25"]


def test_a_hold_that_is_refused_ends_the_job_and_stays_a_hold(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING], hold=RefusedError("Requested operation is presently disabled for job 25"))
    attempt(run, scheduler, "raise SystemExit(3)")
    assert scheduler.requests == ["hold 25"]
    assert read_ledger(run)[0].action == "hold"


def test_where_nothing_can_be_asked_the_run_says_who_has_to(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    absent = NoProgramError(["scontrol"], None, "", "scontrol: no such program on PATH")
    scheduler = FakeScheduler([absent], requeue=absent, submit=SubmitError("sbatch: no such program on PATH"))
    assert attempt(run, scheduler, "raise SystemExit(75)") == 75
    said = capfd.readouterr().err
    assert said.count("scontrol: no such program on PATH; the run goes on without the scheduler's word") == 1
    assert f"no successor either: sbatch: no such program on PATH; `hpcds resume {run.root}` continues the run" in said
    (closed,) = read_ledger(run)
    assert (closed.cause, closed.action) == ("stopped", "leave")


def test_a_scheduler_that_is_away_is_asked_again_until_it_answers(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(talk, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(supervisor, "_ANSWER_AT_END_S", 60.0)
    scheduler = FakeScheduler([RUNNING, DOWN, DOWN, RUNNING, JobState("PENDING", restarts=1)])
    attempt(run, scheduler, "raise SystemExit(75)")
    assert scheduler.requests == ["requeue 25"]
    said = capfd.readouterr().err
    assert said.count("the scheduler does not answer") == 1
    assert "the scheduler answers again" in said
    assert "requeue: the scheduler took it" in said


def test_a_run_that_finished_is_not_run_again(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempt(run, FakeScheduler([RUNNING]), "") == 0
    assert attempt(run, FakeScheduler([RUNNING]), "raise SystemExit(3)") == 0
    assert len(read_ledger(run)) == 1
    assert "the run finished in attempt 1; there is nothing left to do" in capfd.readouterr().err


def test_two_jobs_do_not_run_one_run(run: RunDir) -> None:
    open_attempt(run, "24", "n1", "n1")
    with pytest.raises(RunError, match="job 24 runs it already; cancel that job first, or this one"):
        attempt(run, FakeScheduler([RUNNING]), "")
    attempt(run, FakeScheduler([JobState("FAILED"), RUNNING]), "")
    assert [one.cause for one in read_ledger(run)] == ["lost", "finished"]


def test_a_node_that_failed_twice_is_not_asked_for_again(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        number = open_attempt(run, "25", "n1", "n1").number
        close_attempt(run, number, cause="node_failure", action="leave", node="n3")
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("PENDING", restarts=1)])
    attempt(run, scheduler, "raise SystemExit(75)", resources={"exclude": ["n9"]})
    assert scheduler.requests == ["requeue 25", "exclude 25 n9 n3"]
    assert "the next attempt avoids n3, which failed twice or more" in capfd.readouterr().err


def test_an_array_task_goes_by_array_and_number(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert supervisor._job_id(run, load_site("slurm")) == "8_3"


def test_a_requeue_that_failed_and_happened_all_the_same_is_not_asked_for_twice(run: RunDir) -> None:
    scheduler = FakeScheduler([RUNNING, RUNNING, JobState("COMPLETING", restarts=1)], requeue=DOWN)
    attempt(run, scheduler, "raise SystemExit(75)")
    assert scheduler.requests == ["requeue 25"]


def test_attempts_are_counted_over_jobs(run: RunDir) -> None:
    say = "import os; print(os.environ['HPCDS_ATTEMPT']); raise SystemExit(75)"
    for _ in range(2):
        attempt(run, FakeScheduler([RUNNING, RUNNING, JobState("PENDING", restarts=1)]), say)
    assert (run.attempt_logs(2) / "rank-0.log").read_text() == "2\n"


@pytest.mark.parametrize(("site", "name"), [("slurm", "SLURM_JOB_ID"), ("local", "HPCDS_LOCAL_JOB")])
def test_a_run_is_supervised_inside_its_job_only(
    site: str, name: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: None)
    write_json(run.config, {"command": ["true"]})
    write_json(run.site, load_site(site).model_dump(mode="json"))
    with pytest.raises(
        RunError, match=f"run .*: {name} is not set; supervise runs inside the job, start it with submit"
    ):
        supervise(run)
