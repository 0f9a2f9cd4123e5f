"""Slurm, through sbatch, scontrol, squeue, scancel and sacct, where there is one. Tested against 22.05."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hpc_ds.cluster.parse import (
    ACCOUNT_FORMAT,
    IS_DOWN,
    QUEUE_FORMAT,
    parse_accounts,
    parse_fields,
    parse_job,
    parse_job_id,
    parse_queue,
)
from hpc_ds.cluster.shell import Shell, run
from hpc_ds.errors import CommandError, NoAnswerError, NoProgramError, RefusedError, SchedulerError, SubmitError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hpc_ds.cluster.parse import Account
    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.run_dir import RunDir

# What Slurm's clients say when slurmctld is away or busy; any other answer is a decision.
_FOR_NOW = re.compile(
    r"unable to contact|timed out|connection refused|zero bytes|not connected|unexpected message|standby|try again"
    r"|temporarily|communication|transport|resolve|no route|network is",
    re.IGNORECASE,
)
_DEFAULT_KILL_WAIT_S = 30.0
_IS_GONE = re.compile(r"down|fail|.*\*")  # an asterisk: it does not answer


def is_for_now(stderr: str) -> bool:
    """Whether these words of a client say that slurmctld is away or busy, rather than that it has decided."""
    return _FOR_NOW.search(stderr) is not None


def nodes_needed(fields: Mapping[str, str]) -> int:
    """Nodes that a job asks for, from what scontrol shows of it.

    NumNodes alone is not it: while a job that is queued again ends, it counts down with the nodes that are still busy.
    """
    names = ("NumNodes", "NumTasks", "NtasksPerN:B:S:C")
    nodes, tasks, per_node = (_first_number(fields.get(name, "")) for name in names)
    return max(nodes, -(-tasks // per_node) if per_node else 0, 1)


def _first_number(text: str) -> int:
    digits = re.match(r"[0-9]+", text)
    return int(digits[0]) if digits else 0


class Slurm:
    """The Slurm that the clients on this machine talk to."""

    def __init__(self, shell: Shell = run) -> None:
        self._shell = shell

    def submit(self, run: RunDir, after: str | None = None, exclude: Sequence[str] = ()) -> str:
        """Queue the script of a run, on none of the nodes ``exclude``.

        ``after`` is a job that must have ended first, or a dependency in Slurm's words, such as ``afterok:12``.

        Raises:
            SubmitError: there is no sbatch, or it refused the job; its words are in the message.
        """
        options = [f"--dependency={after if ':' in after else f'afterany:{after}'}"] if after else []
        options += [f"--exclude={','.join(exclude)}"] if exclude else []
        return self.submit_script(run.script, options, patient=bool(after) and ":" not in str(after))

    def submit_script(self, script: Path, options: Sequence[str], *, patient: bool = False) -> str:
        """Queue a job script with options of sbatch; who is ``patient`` asks again while slurmctld is away.

        Raises:
            SubmitError: there is no sbatch, or it refused the job; its words are in the message.
        """
        try:
            answer = self._shell(["sbatch", "--parsable", *options, str(script)], timeout_s=60.0)
        except NoAnswerError as error:
            raise SchedulerError(f"{error}; the job may be queued all the same, look with squeue") from error
        except CommandError as error:
            if error.returncode is None:
                raise SubmitError(str(error)) from error
            if patient and _FOR_NOW.search(error.stderr):
                raise
            words = " ".join(error.stderr.replace("sbatch: error: ", "").split()) or "it said nothing"
            raise SubmitError(f"sbatch: refused the job: {words}; change the job or ask with --set") from error
        return parse_job_id(answer.stdout)

    def show(self, job_id: str) -> JobState | None:
        """What slurmctld knows of a job; it forgets ended ones after MinJobAge."""
        answer = self._shell(["scontrol", "show", "job", "-o", job_id], timeout_s=20.0, check=False)
        if answer.returncode != 0:
            if "Invalid job id" in answer.stderr or "not found" in answer.stderr:
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
        self._ask(["scontrol", "requeue", job_id])

    def hold(self, job_id: str) -> None:
        """Queue the running job again, held, marked as ended in a special way."""
        self._ask(["scontrol", "requeuehold", "State=SpecialExit", job_id])

    def exclude(self, job_id: str, nodes: Sequence[str]) -> None:
        """Let a waiting job start on none of these nodes, where enough others are left.

        Raises:
            RefusedError: too few would be left: Slurm would take it and let the job wait for ever.
        """
        said = self._shell(["scontrol", "show", "job", "-o", job_id], timeout_s=20.0).stdout.partition("\n")[0]
        fields = parse_fields(said.partition(" Command=")[0])
        left = self._working_nodes(fields.get("Partition", "")) - set(nodes)
        needed = nodes_needed(fields)
        if len(left) < needed:
            raise RefusedError(
                f"job {job_id}: of its partition only {len(left)} nodes would be left, and it needs {needed}"
            )
        self._ask(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}"])

    def depend(self, job_id: str, dependency: str) -> None:
        """Let a waiting job wait for this instead."""
        self._ask(["scontrol", "update", f"JobId={job_id}", f"Dependency={dependency}"])

    def _working_nodes(self, partition: str) -> set[str]:
        command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"]
        lines = [line.split() for line in self._shell(command, timeout_s=20.0).stdout.splitlines()]
        return {words[0] for words in lines if len(words) == 2 and not IS_DOWN.match(words[1])}

    def release(self, job_id: str) -> None:
        """Let a held job start."""
        self._shell(["scontrol", "release", job_id])

    def kill_wait_s(self) -> float:
        """Slurm's KillWait; 30 s, its default, where nobody tells."""
        try:
            said = self._shell(["scontrol", "show", "config"], timeout_s=20.0).stdout
        except SchedulerError:
            return _DEFAULT_KILL_WAIT_S
        match = re.search(r"^KillWait\s*=\s*(\d+)", said, re.MULTILINE)
        return float(match[1]) if match else _DEFAULT_KILL_WAIT_S

    def down(self, nodes: Sequence[str]) -> list[str]:
        """Those of some nodes that Slurm counts as down, or has no answer from; one that is drained works on."""
        command = ["sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format=%N %T"]
        try:
            lines = [line.split() for line in self._shell(command, timeout_s=20.0).stdout.splitlines()]
        except SchedulerError:
            return []
        gone = {words[0] for words in lines if len(words) == 2 and _IS_GONE.match(words[1])}
        return [node for node in nodes if node in gone]

    def _ask(self, command: list[str]) -> None:
        """Ask for something that Slurm may decline.

        Raises:
            RefusedError: it has decided against it.
            CommandError: slurmctld is away, or there is no such program.
        """
        try:
            self._shell(command)
        except (NoAnswerError, NoProgramError):
            raise
        except CommandError as error:
            if _FOR_NOW.search(error.stderr):
                raise
            raise RefusedError(str(error)) from error
