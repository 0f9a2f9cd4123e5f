"""The real Slurm that the other tests rely on: it starts, schedules, preempts, requeues, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster as harness
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

# A job whose steps log their signals, each task in its own line, and whose batch shell would log its own.
LOGGING_JOB = """#!/bin/bash
trap 'echo batch TERM' TERM
srun --unbuffered bash -c '
    trap "echo task TERM" TERM
    echo task ready
    for second in {1..60}; do sleep 1; done' &
wait; wait
"""

RESTARTING_JOB = """#!/bin/bash
echo "start ${SLURM_RESTART_COUNT:-0}"
sleep 60
"""

STUBBORN_JOB = """#!/bin/bash
trap '' TERM
setsid sleep 600 &
env -i sleep 600 &
srun bash -c 'trap "" TERM; sleep 600' &
wait
"""


def test_every_node_is_idle_with_its_gpus(slurm_cluster: SlurmCluster) -> None:
    nodes = slurm_cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T %G").stdout.splitlines()
    assert nodes == [f"{node} idle gpu:2" for node in slurm_cluster.node_names]


def test_each_node_gives_its_gpus_to_the_tasks(slurm_cluster: SlurmCluster) -> None:
    command = "echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    done = slurm_cluster.run("srun", "-N2", "--ntasks-per-node=2", "--gres=gpu:2", "bash", "-c", command)
    assert sorted(done.stdout.splitlines()) == ["0 0 n1 0,1", "1 1 n1 0,1", "2 0 n2 0,1", "3 1 n2 0,1"]


def test_a_failing_command_is_an_error_with_its_message(slurm_cluster: SlurmCluster) -> None:
    with pytest.raises(RuntimeError, match="Invalid job id"):
        slurm_cluster.job("99999")


def test_values_with_spaces_and_equals_signs_are_kept(slurm_cluster: SlurmCluster) -> None:
    job_id = slurm_cluster.submit(RESTARTING_JOB, "--hold", "--job-name=two words", "--comment=a=b c=d")
    job = slurm_cluster.job(job_id)
    assert job["JobName"] == "two words"
    assert job["Comment"] == "a=b c=d"
    assert job["JobState"] == "PENDING"


def test_grace_sends_term_to_the_steps_while_the_job_runs(slurm_cluster: SlurmCluster) -> None:
    job_id = slurm_cluster.submit(LOGGING_JOB, "--nodes=4", "--ntasks-per-node=1", "--exclusive")
    slurm_cluster.wait_for(lambda: slurm_cluster.output(job_id).count("task ready") == 4, 30, "four tasks ready")
    slurm_cluster.submit(RESTARTING_JOB, "--partition=urgent", "--nodes=4", "--exclusive")
    slurm_cluster.wait_for(lambda: slurm_cluster.output(job_id).count("task TERM") == 4, 15, "SIGTERM in every task")
    job = slurm_cluster.job(job_id)
    assert job["JobState"] == "RUNNING"
    assert job["PreemptTime"] != "None"
    assert "batch TERM" not in slurm_cluster.output(job_id)


def test_a_requeued_job_runs_again_within_seconds(slurm_cluster: SlurmCluster) -> None:
    job_id = slurm_cluster.submit(RESTARTING_JOB, "--open-mode=append")
    slurm_cluster.wait_for(lambda: "start 0" in slurm_cluster.output(job_id), 30, "the first start")
    slurm_cluster.run("scontrol", "requeue", job_id)
    requeued = time.monotonic()
    slurm_cluster.wait_for(lambda: "start 1" in slurm_cluster.output(job_id), 30, "the second start")
    assert time.monotonic() - requeued < 15
    assert slurm_cluster.wait_for_state(job_id, "RUNNING")["Restarts"] == "1"


def test_a_dead_node_ends_its_job_and_can_return(slurm_cluster: SlurmCluster) -> None:
    job_id = slurm_cluster.submit(RESTARTING_JOB, "--nodes=1", "--nodelist=n4", "--no-requeue")
    slurm_cluster.wait_for_state(job_id, "RUNNING")
    slurm_cluster.kill_node("n4")
    slurm_cluster.run("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=test")
    assert slurm_cluster.wait_for_state(job_id, "NODE_FAIL")["Restarts"] == "0"
    slurm_cluster.restart_slurmd("n4")
    assert slurm_cluster.run("srun", "--nodelist=n4", "hostname").returncode == 0


def test_jobs_outlive_a_restart_of_the_controller(slurm_cluster: SlurmCluster) -> None:
    script = "#!/bin/bash\nsrun bash -c 'echo ready; until [[ -e go ]]; do sleep 0.2; done'\n"
    (slurm_cluster.jobs_folder / "go").unlink(missing_ok=True)
    job_id = slurm_cluster.submit(script, "--nodes=2")
    slurm_cluster.wait_for(lambda: slurm_cluster.output(job_id).count("ready") == 2, 30, "both tasks")
    slurm_cluster.stop_slurmctld()
    slurm_cluster.start_slurmctld()
    assert slurm_cluster.job(job_id)["JobState"] == "RUNNING"
    (slurm_cluster.jobs_folder / "go").touch()
    assert slurm_cluster.wait_for_state(job_id, "COMPLETED", 120)["Restarts"] == "0"


def test_without_accounting_sacct_says_so(slurm_cluster: SlurmCluster) -> None:
    done = slurm_cluster.run("sacct", check=False)
    assert "accounting storage is disabled" in done.stdout + done.stderr


def test_with_accounting_sacct_knows_the_jobs(accounting_cluster: SlurmCluster) -> None:
    job_id = accounting_cluster.submit("#!/bin/bash\nsrun true\n", "--account=lab")
    accounting_cluster.wait_for_state(job_id, "COMPLETED")

    def answer() -> list[str]:
        done = accounting_cluster.run("sacct", "-n", "-X", "-P", "-j", job_id, "-o", "Account,State,NNodes")
        return done.stdout.splitlines()

    accounting_cluster.wait_for(lambda: answer() == ["lab|COMPLETED|1"], 30, "the job in sacct")
    table = harness._process_table()
    names = {table[pid].name for pid in accounting_cluster.processes() if pid in table}
    assert {"mariadbd", "slurmdbd"} <= names, "else stop would not find them"


def test_stop_ends_every_process_even_of_stubborn_jobs(tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 20)  # sockets would not fit: the cluster moves itself to a short folder
    cluster = SlurmCluster(deep, nodes=1)
    with cluster:
        job_id = cluster.submit(STUBBORN_JOB)
        cluster.wait_for(lambda: len(harness.tasks_of(cluster.folder)) >= 6, 20, "the job's processes")
        assert cluster.job(job_id)["JobState"] == "RUNNING"
        seen = set(cluster.processes())
        assert len(seen) > 6
    assert cluster.processes() == []
    assert not [pid for pid in seen if pid in harness._process_table()]
    assert not cluster.folder.exists()
    cluster.stop()


def test_a_killed_test_run_leaves_no_process(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, sys
sys.path.insert(0, {str(Path(harness.__file__).parent)!r})
from slurm_cluster import SlurmCluster, tasks_of
cluster = SlurmCluster(pathlib.Path({str(tmp_path / ("deep" * 20))!r}), nodes=1)
cluster.start()
cluster.submit("#!/bin/bash\\nsleep 600")
cluster.wait_for(lambda: len(tasks_of(cluster.folder)) == 2, 20, "the script and its sleep")
print(cluster.folder, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    folder = Path(done.stdout.strip())
    end = time.monotonic() + 10
    while (harness.processes_of(folder) or folder.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert harness.processes_of(folder) == []
    assert not folder.exists()


def test_a_start_that_fails_shows_the_logs_and_leaves_nothing(tmp_path: Path) -> None:
    cluster = SlurmCluster(tmp_path / "c", nodes=1, settings={"SelectType": "select/none_such"})
    with pytest.raises(RuntimeError, match="none_such"):
        cluster.start()
    assert cluster.processes() == []


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_without_slurm_its_tests_skip_or_fail(tmp_path: Path, required: str, outcome: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "every_node_is_idle", __file__],
        env={**os.environ, "PATH": str(tmp_path), "HPCDS_REQUIRE_SLURM": required},
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome in done.stdout
    assert "srun" in done.stdout
    assert "install_system_packages.sh" in done.stdout
