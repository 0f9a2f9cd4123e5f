"""Slurm, through sbatch, scontrol, squeue, scancel and sacct, where there is one. Tested against 22.05."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.cluster.parse import (
    ACCOUNT_FORMAT,
    QUEUE_FORMAT,
    parse_accounts,
    parse_job,
    parse_job_id,
    parse_queue,
)
from hpc_ds.cluster.shell import Shell, run
from hpc_ds.errors import CommandError, NoAnswerError, SchedulerError, SubmitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.cluster.parse import Account
    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.run_dir import RunDir


class Slurm:
    """The Slurm that the clients on this machine talk to."""

    def __init__(self, shell: Shell = run) -> None:
        self._shell = shell

    def submit(self, run: RunDir) -> str:
        """Queue the script of a run.

        Raises:
            SubmitError: there is no sbatch, or it refused the job; its words are in the message.
        """
        try:
            answer = self._shell(["sbatch", "--parsable", str(run.script)], timeout_s=60.0)
        except NoAnswerError as error:
            raise SchedulerError(f"{error}; the job may be queued all the same, look with squeue") from error
        except CommandError as error:
            if error.returncode is None:
                raise SubmitError(str(error)) from error
            words = " ".join(error.stderr.replace("sbatch: error: ", "").split()) or "it said nothing"
            raise SubmitError(f"sbatch: refused the job: {words}; change the job or ask with --set") from error
        return parse_job_id(answer.stdout)

    def show(self, job_id: str) -> JobState | None:
        """What slurmctld knows of a job; it forgets ended ones after MinJobAge."""
        answer = self._shell(["scontrol", "show", "job", "-o", job_id], timeout_s=20.0, check=False)
        if answer.returncode != 0:
            if "Invalid job id" in answer.stderr:
                return None
            raise CommandError(["scontrol", "show", "job"], answer.returncode, answer.stderr)
        return parse_job(answer.stdout.strip().partition("\n")[0])

    def show_many(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """What slurmctld knows of several jobs, by one squeue; those that it knows nothing of are absent."""
        if not job_ids:
            return {}
        wanted = ",".join(job_ids)
        command = ["squeue", "-h", "-r", "-t", "all", "-j", wanted, "-o", QUEUE_FORMAT]
        answer = self._shell(command, timeout_s=20.0, check=False)
        if answer.returncode != 0:
            if "Invalid job id" in answer.stderr:  # one unknown id is an error, several are not
                return {}
            raise CommandError(["squeue"], answer.returncode, answer.stderr)
        found = parse_queue(answer.stdout)
        return {job_id: found[job_id] for job_id in job_ids if job_id in found}

    def accounts(self, job_ids: Sequence[str]) -> list[Account]:
        """What slurmdbd keeps of every start of some jobs, oldest first; nothing where there is no accounting."""
        if not job_ids:
            return []
        command = ["sacct", "-D", "-X", "-P", "-n", "-j", ",".join(job_ids), f"--format={ACCOUNT_FORMAT}"]
        try:
            return parse_accounts(self._shell(command, timeout_s=20.0).stdout)
        except SchedulerError:  # absent, disabled, down: it is never needed
            return []

    def cancel(self, job_id: str) -> None:
        """End the job for good."""
        self._shell(["scancel", job_id])

    def preempt(self, job_id: str) -> None:
        """Send SIGTERM to the job's steps only: the first signal of a preemption with grace time."""
        self._shell(["scancel", "--signal=TERM", job_id])

    def requeue(self, job_id: str) -> None:
        """Queue the running job again."""
        self._shell(["scontrol", "requeue", job_id])

    def hold(self, job_id: str) -> None:
        """Queue the running job again, held, marked as ended in a special way."""
        self._shell(["scontrol", "requeuehold", "State=SpecialExit", job_id])

    def release(self, job_id: str) -> None:
        """Let a held job start."""
        self._shell(["scontrol", "release", job_id])
