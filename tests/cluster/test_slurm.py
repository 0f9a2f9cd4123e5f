"""Slurm through a shell that only records: which commands are run, and what is made of every kind of answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import FakeShell, refusal

from hpc_ds.cluster.parse import parse_fields, parse_time
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.cluster.slurm import Slurm, nodes_needed
from hpc_ds.errors import CommandError, NoProgramError, ParseError, RefusedError, SchedulerError, SubmitError
from hpc_ds.run_dir import RunDir

if TYPE_CHECKING:
    from fakes import Answer

RUN = RunDir(Path("/runs/a b"))
MISSING = CommandError(["sbatch"], None, "", "sbatch: no such program on PATH; is this a machine of the cluster?")
SLOW = CommandError(["sbatch"], None, "", "sbatch: no answer in 60 s; is the scheduler up?")


def test_the_script_of_a_run_is_submitted() -> None:
    shell = FakeShell({"sbatch": "4711;cluster\n"})
    assert Slurm(shell).submit(RUN) == "4711"
    assert shell.commands == [["sbatch", "--parsable", "/runs/a b/script.sbatch"]]


REFUSALS: dict[str, tuple[Answer, str]] = {
    "one line": (
        refusal("sbatch: error: Batch job submission failed: Invalid account\n"),
        "sbatch: refused the job: Batch job submission failed: Invalid account; change the job or ask with --set",
    ),
    "several lines": (
        refusal("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: No\n"),
        "sbatch: refused the job: invalid partition specified: x Batch job submission failed: No; change the job or ask with --set",
    ),
    "nothing": (refusal("", 255), "sbatch: refused the job: it said nothing; change the job or ask with --set"),
    "no program": (MISSING, "sbatch: no such program on PATH; is this a machine of the cluster?"),
    "no answer": (SLOW, "sbatch: no answer in 60 s; is the scheduler up?"),
}


@pytest.mark.parametrize(("answer", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refused_job_is_an_error_with_slurms_words(answer: Answer, message: str) -> None:
    with pytest.raises(SubmitError) as caught:
        Slurm(FakeShell({"sbatch": answer})).submit(RUN)
    assert str(caught.value) == message
    assert caught.value.exit_code == 3
    assert isinstance(caught.value.__cause__, CommandError)


@pytest.mark.parametrize("answer", ["", "welcome\n", "Submitted batch job 3\n"])
def test_an_answer_without_a_job_id_is_an_error(answer: str) -> None:
    with pytest.raises(ParseError, match="no job id in it"):
        Slurm(FakeShell({"sbatch": answer})).submit(RUN)


def test_a_job_is_shown() -> None:
    shell = FakeShell({"scontrol show job": "JobId=25 JobName=a JobState=RUNNING Restarts=1 NodeList=n1\n"})
    assert Slurm(shell).show("25") == JobState("RUNNING", restarts=1, nodes="n1")
    assert shell.commands == [["scontrol", "show", "job", "-o", "25"]]


def test_a_job_that_slurm_has_forgotten_is_none() -> None:
    shell = FakeShell({"scontrol": refusal("slurm_load_jobs error: Invalid job id specified\n")})
    assert Slurm(shell).show("25") is None


TROUBLES: dict[str, Answer] = {
    "down": refusal("slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
    "missing": CommandError(["scontrol"], None, "", "scontrol: no such program on PATH"),
    "junk": "welcome to the cluster\n",
    "nothing": "",
    "blank": "\n\n",
}


@pytest.mark.parametrize("answer", TROUBLES.values(), ids=TROUBLES)
def test_a_slurm_in_trouble_is_an_error_and_no_state(answer: Answer) -> None:
    with pytest.raises(SchedulerError):
        Slurm(FakeShell({"scontrol": answer})).show("25")


def test_words_of_a_slurm_that_is_down_are_shown() -> None:
    shell = FakeShell({"scontrol": TROUBLES["down"]})
    with pytest.raises(CommandError, match=r"exit status 1: .*Unable to contact slurm controller"):
        Slurm(shell).show("25")


VERBS = {
    "cancel": ["scancel", "25"],
    "preempt": ["scancel", "--signal=TERM", "25"],
    "requeue": ["scontrol", "requeue", "25"],
    "hold": ["scontrol", "requeuehold", "State=SpecialExit", "25"],
    "release": ["scontrol", "release", "25"],
}


@pytest.mark.parametrize(("verb", "command"), VERBS.items())
def test_every_verb_is_one_command(verb: str, command: list[str]) -> None:
    shell = FakeShell({"sc": ""})
    getattr(Slurm(shell), verb)("25")
    assert shell.commands == [command]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_slurm_refuses_is_an_error_with_its_words(verb: str) -> None:
    shell = FakeShell({"sc": refusal("Job/step already completing or completed for job 25")})
    with pytest.raises(SchedulerError, match="already completing or completed"):
        getattr(Slurm(shell), verb)("25")


# What Slurm 22.05 says to a requeue -> whether asking again would help.
ANSWERS = {
    "Requested operation is presently disabled for job 11": RefusedError,
    "Job is no longer pending execution for job 4": RefusedError,
    "Invalid job id specified": RefusedError,
    "slurm_requeue error: Unable to contact slurm controller (connect failure)": CommandError,
    "Socket timed out on send/recv operation": CommandError,
    "Slurm backup controller in standby mode": CommandError,
    "Zero Bytes were transmitted or received": CommandError,
}


@pytest.mark.parametrize(("words", "error"), ANSWERS.items())
def test_a_decision_is_told_from_an_absence(words: str, error: type[Exception]) -> None:
    slurm = Slurm(FakeShell({"scontrol requeue": refusal(words)}))
    with pytest.raises(error, match=words.split(" ", maxsplit=1)[0]) as caught:
        slurm.requeue("11")
    assert isinstance(caught.value, RefusedError) == (error is RefusedError)


def test_a_machine_without_scontrol_is_told_from_both() -> None:
    absent = NoProgramError(["scontrol"], None, "", "scontrol: no such program on PATH")
    with pytest.raises(NoProgramError):
        Slurm(FakeShell({"scontrol requeue": absent})).requeue("11")


def test_nodes_are_excluded_where_enough_are_left() -> None:
    job = "JobId=11 JobState=PENDING Partition=main NumNodes=2-2 Command=/x"
    shell = FakeShell(
        {
            "scontrol show job": job,
            "sinfo --noheader --Node": "n1 idle\nn2 mixed\nn3 down*\nn4 idle*\nn5 drained\nn6 allocated\n",
            "scontrol update": "",
        }
    )
    Slurm(shell).exclude("11", ["n1"])
    assert shell.commands[-1] == ["scontrol", "update", "JobId=11", "ExcNodeList=n1"]
    with pytest.raises(RefusedError, match="job 11: of its partition only 1 nodes would be left, and it needs 2"):
        Slurm(shell).exclude("11", ["n1", "n2"])


@pytest.mark.parametrize(
    ("shown", "needed"),
    [
        ("NumNodes=3-3 NumCPUs=3 NumTasks=3 NtasksPerN:B:S:C=1:0:*:*", 3),
        ("NumNodes=1 NumCPUs=1 NumTasks=4 NtasksPerN:B:S:C=2:0:*:*", 2),  # of two nodes one is still ending
        ("NumNodes=1 NumCPUs=1 NumTasks=5 NtasksPerN:B:S:C=2:0:*:*", 3),
        ("NumNodes=2 NumTasks=2 NtasksPerN:B:S:C=0:0:*:*", 2),
        ("NumTasks= NtasksPerN:B:S:C=*:0:*:*", 1),
        ("", 1),
    ],
)
def test_nodes_that_a_job_needs(shown: str, needed: int) -> None:
    assert nodes_needed(parse_fields(shown)) == needed


def test_a_successor_starts_when_the_job_has_ended(tmp_path: Path) -> None:
    shell = FakeShell({"sbatch": "26\n"})
    run = RunDir(tmp_path)
    assert Slurm(shell).submit(run, after="44_1", exclude=["n3", "n4"]) == "26"
    assert shell.commands == [
        ["sbatch", "--parsable", "--dependency=afterany:44_1", "--exclude=n3,n4", str(run.script)]
    ]


@pytest.mark.parametrize(
    ("config", "seconds"),
    [("KillOnBadExit = 0\nKillWait                = 8 sec\n", 8.0), ("", 30.0), (refusal("no controller"), 30.0)],
)
def test_how_long_slurm_waits_before_it_kills(config: Answer, seconds: float) -> None:
    assert Slurm(FakeShell({"scontrol show config": config})).kill_wait_s() == seconds


@pytest.mark.parametrize(
    ("state", "down"), [("idle", False), ("mixed", False), ("mixed*", True), ("down", True), ("draining", False)]
)
def test_a_node_that_does_not_answer_is_down(state: str, down: bool) -> None:
    """One that is drained takes no new jobs, but its ranks work on."""
    shell = FakeShell({"sinfo": f"n1 {state}\nn1 {state}\nn2 idle\n"})
    assert Slurm(shell).down(["n1", "n2"]) == (["n1"] if down else [])
    assert shell.commands == [["sinfo", "--noheader", "--Node", "--nodes", "n1,n2", "--format=%N %T"]]


def test_nobody_knows_of_a_node_when_slurm_is_away() -> None:
    assert Slurm(FakeShell({"sinfo": refusal("Unable to contact slurm controller")})).down(["n1"]) == []


def test_a_task_that_is_not_there_is_no_job() -> None:
    assert Slurm(FakeShell({"scontrol show job": refusal("Job 8_9 not found")})).show("8_9") is None


# As Slurm 22.05 printed them for two nodes of a job, held ones, tasks of an array, and one that ended.
SQUEUE = """\
10|10|COMPLETED|4294901752|2026-11-26T15:25:14|2026-11-26T15:25:14|n1|None
9_2|9|PENDING|4294901753|N/A|N/A||JobArrayTaskLimit
9_1|12|RUNNING|4294901753|2026-11-26T15:25:14|2026-11-26T15:30:14|n1|None
13|13|PENDING|4294901750|2026-11-26T15:30:14|2026-11-26T15:35:14||Resources
8|8|PENDING|0|N/A|N/A||JobHeldUser
7|7|RUNNING|4294901754|2026-11-26T15:25:13|2026-11-26T15:30:13|n[1-2]|None
11|11|SPECIAL_EXIT|0|N/A|N/A||job requeued in held state
"""


def test_several_jobs_are_shown_by_one_squeue() -> None:
    shell = FakeShell({"squeue": SQUEUE})
    found = Slurm(shell).show_many(["7", "8", "13", "9_2", "12", "10", "11", "999"])
    (command,) = shell.commands
    assert command[:7] == ["squeue", "-h", "-r", "-t", "all", "-j", "7,8,13,9_2,12,10,11,999"]
    assert list(found) == ["7", "8", "13", "9_2", "12", "10", "11"]
    assert found["7"] == JobState(
        "RUNNING",
        nodes="n[1-2]",
        start_time=parse_time("2026-11-26T15:25:13"),
        end_time=parse_time("2026-11-26T15:30:13"),
    )
    assert (found["8"].held, found["8"].reason) == (True, "JobHeldUser")
    assert (found["11"].held, found["11"].reason) == (True, "job requeued in held state")
    assert (found["13"].held, found["13"].start_time) == (False, parse_time("2026-11-26T15:30:14"))
    assert (found["9_2"].state, found["12"].state) == ("PENDING", "RUNNING")
    assert not found["10"].active


def test_no_job_is_no_question() -> None:
    shell = FakeShell({})
    assert Slurm(shell).show_many([]) == {}
    assert Slurm(shell).accounts([]) == []


def test_one_forgotten_job_is_absent() -> None:
    shell = FakeShell({"squeue": refusal("slurm_load_jobs error: Invalid job id specified\n")})
    assert Slurm(shell).show_many(["999"]) == {}


@pytest.mark.parametrize("name", ["down", "missing", "junk"])
def test_a_slurm_in_trouble_says_nothing_of_several_jobs(name: str) -> None:
    with pytest.raises(SchedulerError):
        Slurm(FakeShell({"squeue": TROUBLES[name]})).show_many(["25", "26"])


SACCT = """\
25|PREEMPTED|61|2026-01-31T13:45:00|n[1-2]
25|CANCELLED by 0|7|2026-01-31T13:50:00|n3
26_1|NODE_FAIL|5|2026-01-31T13:40:00|n1
"""


def test_every_start_of_a_job_is_in_the_accounts() -> None:
    shell = FakeShell({"sacct": SACCT})
    found = Slurm(shell).accounts(["25", "26_1"])
    assert [(one.job_id, one.state, one.elapsed_s, one.nodes) for one in found] == [
        ("26_1", "NODE_FAIL", 5, "n1"),
        ("25", "PREEMPTED", 61, "n[1-2]"),
        ("25", "CANCELLED", 7, "n3"),
    ]
    assert shell.commands[0][:5] == ["sacct", "-D", "-X", "-P", "-n"]


@pytest.mark.parametrize("answer", [refusal("Slurm accounting storage is disabled"), MISSING, "junk\n", ""])
def test_where_there_is_no_accounting_there_are_no_accounts(answer: Answer) -> None:
    assert Slurm(FakeShell({"sacct": answer})).accounts(["25"]) == []
