"""Slurm, through sbatch, scontrol and scancel. Tested against 22.05; nothing newer is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.cluster.parse import parse_job, parse_job_id
from hpc_ds.cluster.shell import Shell, run
from hpc_ds.errors import CommandError, NoAnswerError, SchedulerError, SubmitError

if TYPE_CHECKING:
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
