"""What Slurm prints, as it was printed: scontrol, sbatch and srun of Slurm 22.05 and 23.11."""

from __future__ import annotations

import time

import pytest

from hpc_ds.cluster.parse import parse_due_to, parse_fields, parse_job, parse_job_id, parse_task_end, parse_time
from hpc_ds.cluster.scheduler import ACTIVE, JobState
from hpc_ds.errors import ParseError

RUNNING = (
    "JobId=25 JobName=gpt UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A Priority=4294901736 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:07 TimeLimit=00:10:00 TimeMin=N/A SubmitTime=2026-01-31T13:45:00 EligibleTime=2026-01-31T13:45:01 "
    "AccrueTime=2026-01-31T13:45:00 StartTime=2026-01-31T13:45:09 EndTime=2026-01-31T13:55:09 Deadline=N/A "
    "PreemptEligibleTime=2026-01-31T13:45:09 PreemptTime=None SuspendTime=None SecsPreSuspend=0 "
    "LastSchedEval=2026-01-31T13:45:09 Scheduler=Backfill Partition=main AllocNode:Sid=vm:812 ReqNodeList=(null) "
    "ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 NumNodes=2 NumCPUs=4 NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=4,mem=400M,node=2,billing=4 Socks/Node=* NtasksPerN:B:S:C=2:0:*:* CoreSpec=* MinCPUsNode=2 "
    "MinMemoryCPU=100M MinTmpDiskNode=0 Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 Licenses=(null) "
    "Network=(null) Command=/home/ada/runs/gpt-1/script.sbatch WorkDir=/home/ada StdErr=/home/ada/runs/gpt-1/logs/s.log "
    "StdIn=/dev/null StdOut=/home/ada/runs/gpt-1/logs/s.log Power= TresPerNode=gres:gpu:2"
)


def changed(**fields: str) -> str:
    """The line above, with other values."""
    found = parse_fields(RUNNING)
    assert set(fields) <= set(found)
    return " ".join(f"{name}={value}" for name, value in {**found, **fields}.items())


def seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def test_every_field_of_a_line_is_found() -> None:
    fields = parse_fields(RUNNING)
    assert len(fields) == RUNNING.count("=") - 4  # TRES has four of its own
    assert fields["TRES"] == "cpu=4,mem=400M,node=2,billing=4"
    assert fields["ReqB:S:C:T"] == "0:0:*:*"
    assert fields["AllocNode:Sid"] == "vm:812"
    assert fields["Power"] == ""


def test_a_line_without_fields_has_none() -> None:
    assert parse_fields("") == {}
    assert parse_fields("welcome to the cluster") == {}


def test_a_running_job() -> None:
    assert parse_job(RUNNING) == JobState(
        state="RUNNING",
        reason="None",
        restarts=2,
        preempting=False,
        end_time=seconds("2026-01-31T13:55:09"),
        nodes="n[1-2]",
        held=False,
        start_time=seconds("2026-01-31T13:45:09"),
    )


# What differs from the running job -> what is made of it.
STATES: list[tuple[dict[str, str], dict[str, object]]] = [
    ({"PreemptTime": "2026-01-31T13:46:00"}, {"preempting": True}),
    ({"PreemptTime": "Unknown"}, {"preempting": False}),
    (
        {"JobState": "PENDING", "EndTime": "Unknown", "NodeList": ""},
        {"state": "PENDING", "end_time": None, "nodes": ""},
    ),
    ({"JobState": "PENDING", "NodeList": "(null)", "Reason": "BeginTime"}, {"nodes": "", "reason": "BeginTime"}),
    ({"JobState": "PENDING", "Priority": "0", "Reason": "JobHeldUser"}, {"held": True, "reason": "JobHeldUser"}),
    ({"JobState": "PENDING", "Priority": "1"}, {"held": False}),
    ({"JobState": "SPECIAL_EXIT", "Priority": "0"}, {"state": "SPECIAL_EXIT", "held": True}),
    ({"JobState": "REQUEUE_HOLD", "Priority": "0"}, {"state": "REQUEUE_HOLD", "held": True}),
    ({"JobState": "RUNNING", "Priority": "0"}, {"held": False}),
    ({"JobState": "COMPLETING", "Restarts": "3"}, {"state": "COMPLETING", "restarts": 3}),
    ({"JobState": "RUNNING,COMPLETING"}, {"state": "RUNNING"}),
    ({"JobState": "RUNNING+COMPLETING"}, {"state": "RUNNING"}),
    ({"JobState": "CANCELLED", "Reason": "None"}, {"state": "CANCELLED"}),
    ({"JobState": "TIMEOUT", "Reason": "TimeLimit"}, {"state": "TIMEOUT", "reason": "TimeLimit"}),
    ({"JobState": "NODE_FAIL", "Reason": "NodeDown"}, {"state": "NODE_FAIL", "reason": "NodeDown"}),
    ({"EndTime": "N/A"}, {"end_time": None}),
    ({"Restarts": ""}, {"restarts": 0}),
    ({"JobName": "a b=c"}, {"state": "RUNNING"}),
    ({"JobName": "x JobState=COMPLETED"}, {"state": "RUNNING"}),
    ({"JobName": "x Priority=0 JobState=PENDING Restarts=99"}, {"state": "RUNNING", "restarts": 2, "held": False}),
    ({"JobName": "x PreemptTime=2026-01-31T13:46:00"}, {"preempting": False}),
    ({"Account": "x JobState=FAILED"}, {"state": "RUNNING"}),
    # What comes after the fields that count: folders, which may have any name.
    ({"WorkDir": "/home/ada/a JobState=COMPLETED"}, {"state": "RUNNING"}),
    ({"Command": "/home/ada/a Restarts=99/x"}, {"restarts": 2}),
    ({"StdOut": "/x NodeList=n7 EndTime=Unknown PreemptTime=now"}, {"nodes": "n[1-2]", "preempting": False}),
]


@pytest.mark.parametrize(("fields", "expected"), STATES, ids=str)
def test_a_job_is_in_the_state_that_slurm_says(fields: dict[str, str], expected: dict[str, object]) -> None:
    job = parse_job(changed(**fields))
    assert {name: getattr(job, name) for name in expected} == expected


def test_fields_that_older_slurms_do_not_print_have_a_default() -> None:
    assert parse_job("JobId=1 JobState=PENDING") == JobState("PENDING")


@pytest.mark.parametrize("line", ["", "slurm_load_jobs error: Invalid job id specified", "JobId=1 State=RUNNING", "{}"])
def test_a_line_without_a_state_is_an_error(line: str) -> None:
    with pytest.raises(ParseError, match=r"scontrol answer .*: no JobState in it; is this Slurm?") as caught:
        parse_job(line)
    assert (caught.value.text, caught.value.exit_code) == (line, 3)


def test_a_number_that_is_none_is_an_error_of_ours() -> None:
    with pytest.raises(ParseError):
        parse_job(changed(Restarts="many"))


IDS = {
    "25\n": "25",
    "25;cluster\n": "25",
    "25;two words\n": "25",
    "sbatch: Warning: can't honour --x\n4711\n": "4711",
    "  7  \n\n": "7",
}


@pytest.mark.parametrize(("text", "job_id"), IDS.items())
def test_the_job_id_is_the_last_line(text: str, job_id: str) -> None:
    assert parse_job_id(text) == job_id


@pytest.mark.parametrize("text", ["", "\n", "Submitted batch job 25\n", "25 ok", "id", "-1", "25\nbye\n", "1.5"])
def test_an_answer_without_a_job_id_is_an_error(text: str) -> None:
    with pytest.raises(
        ParseError, match=r"sbatch answer .*: no job id in it; look whether the job is queued"
    ) as caught:
        parse_job_id(text)
    assert caught.value.text == text


TIMES = {"Unknown": None, "None": None, "N/A": None, "": None, "2026-13-01T00:00:00": None, "13:45:00": None}


@pytest.mark.parametrize(("text", "expected"), TIMES.items())
def test_times_that_are_none(text: str, expected: None) -> None:
    assert parse_time(text) is expected


def test_times_are_local() -> None:
    assert parse_time("2026-01-31T13:45:00") == seconds("2026-01-31T13:45:00")


TASK_ENDS = {
    "srun: error: n2: task 3: Exited with exit code 1": ("n2", 3, "Exited with exit code 1"),
    "srun: error: n2: task 0: Killed\n": ("n2", 0, "Killed"),
    "srun: error: n[1-2]: tasks 0-3: Exited with exit code 75": ("n[1-2]", 0, "Exited with exit code 75"),
    "srun: error: n1: tasks 4,7-8: Terminated": ("n1", 4, "Terminated"),
    "srun: error: n1: tasks [2,5]: Terminated": ("n1", 2, "Terminated"),
    "srun: error: gpu-07.cluster: task 12: Segmentation fault (core dumped)": (
        "gpu-07.cluster",
        12,
        "Segmentation fault (core dumped)",
    ),
    "srun: error: n1: task 1: Out Of Memory": ("n1", 1, "Out Of Memory"),
    "srun: error: Unable to allocate resources: Invalid partition name specified": None,
    "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.": None,
    "slurmstepd: error: *** STEP 25.0 ON n1 CANCELLED AT 2026-01-31T13:45:00 ***": None,
    "srun: launch/slurm: _task_finish: Received task exit notification for 1 task of StepId=25.0 (status=0x0009).": None,
    "srun: error: Task 0 reported exit for a second time.": None,
    "Traceback (most recent call last):": None,
    "a line that says srun: error: n1: task 1: Killed": None,
    "": None,
}


@pytest.mark.parametrize(("line", "expected"), TASK_ENDS.items())
def test_srun_says_which_task_ended_how(line: str, expected: tuple[str, int, str] | None) -> None:
    assert parse_task_end(line) == expected


STEP = "slurmstepd: error: *** STEP 25.0 ON n1 CANCELLED AT 2026-01-31T13:45:00"
WHYS = {
    f"{STEP} DUE TO PREEMPTION ***": "PREEMPTION",
    f"srun: error: {STEP} DUE TO TIME LIMIT ***": "TIME LIMIT",
    f"{STEP} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***": "NODE FAILURE",
    f"{STEP} DUE TO JOB REQUEUE ***": "JOB REQUEUE",
    f"{STEP} ***": None,
    "srun: error: n1: task 0: Killed": None,
    "": None,
}


@pytest.mark.parametrize(("line", "why"), WHYS.items())
def test_a_step_says_what_it_was_ended_by(line: str, why: str | None) -> None:
    found = parse_due_to(line)
    assert (found if found is None else found.strip()) == why


def test_the_states_in_which_something_will_still_happen() -> None:
    assert JobState("PENDING").active
    assert JobState("COMPLETING").active
    assert not any(JobState(state).active for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
    assert len(ACTIVE) == 12
