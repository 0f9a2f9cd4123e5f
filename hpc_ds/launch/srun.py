"""Ranks as one step of a Slurm job.

srun's own ``--kill-on-bad-exit`` would take 75 for a failure and kill ranks that are about to end well, so the runner
reads srun's messages and ends the step itself.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from hpc_ds.cluster import process
from hpc_ds.cluster.parse import parse_due_to, parse_lost_node, parse_task_end
from hpc_ds.config.site_rules import fitted, gpus_per_rank, takes_full_nodes
from hpc_ds.errors import NodeListError
from hpc_ds.launch.allocation import components_of
from hpc_ds.launch.container import container_options, rank_command
from hpc_ds.launch.failure import Failure, TaskEnd, in_words, last_lines
from hpc_ds.launch.node_list import expand
from hpc_ds.launch.runner import CHECKPOINTED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hpc_ds.config.job import JobConfig, Resources
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir

_PATIENCE_S = 10.0
_KILL_PATIENCE_S = 20.0
_LAUNCH_FAILED = re.compile(r"^srun: error: .*[Ll]aunch.* failed")


# The shell that starts a rank opens its log: srun's own --output reads "%" and "\\" in paths, and when it cannot open
# one it reports a failed launch and exits with 0.
_WITH_LOG = 'exec "$@" >>"$HPCDS_RUN_DIR/logs/attempt-$HPCDS_ATTEMPT/rank-$SLURM_PROCID.log" 2>&1'


def srun_command(argv: list[str], resources: Resources, options: list[str], components: int = 1) -> list[str]:
    """The srun command line of a step over the whole allocation.

    Args:
        argv: what every rank runs.
        resources: of the job.
        options: of the site.
        components: of a heterogeneous job, whose shape only its allocation knows.
    """
    words = ["srun", *step_options(resources, components), *options]
    return [*words, "/bin/sh", "-c", _WITH_LOG, "hpcds-rank", *argv]


def step_options(resources: Resources, components: int = 1, *, end_with_the_first: bool = False) -> list[str]:
    """The options of a step over the whole allocation; ``end_with_the_first`` rank that fails, or see to that oneself."""
    if components > 1:
        options = [f"--het-group={','.join(map(str, range(components)))}"]
    else:
        options = [
            f"--nodes={resources.nodes}",
            f"--ntasks={resources.world_size}",
            f"--ntasks-per-node={resources.ranks_per_node}",
        ]
    # --wait=0: else ranks that still work when the first has finished would be killed.
    options += ["--export=ALL", f"--kill-on-bad-exit={int(end_with_the_first)}", "--wait=0"]
    if resources.cpus_per_task is not None and components == 1:
        # Slurm 22.05 to 23.02 do not pass the job's value on to steps.
        options.append(f"--cpus-per-task={resources.cpus_per_task}")
    return options


def site_options(job: JobConfig, site: SiteConfig) -> list[str]:
    """The options of srun that a site wants, for this job."""
    options = list(site.srun)
    if site.gpu_request == "gpus_per_task" and job.resources.gpus_per_node:
        options.append(f"--gpus-per-task={gpus_per_rank(job.resources)}")
    if takes_full_nodes(job, site):
        options += site.srun_full_node
    return options


def step_command(job: JobConfig, site: SiteConfig, run: RunDir, components: int = 1) -> list[str]:
    """The whole srun command line of the ranks of a run: as job, site and container want it."""
    options = [*site_options(job, site), *container_options(job, site, run)]
    return srun_command(rank_command(job, site, run), fitted(job, site), options, components)


def first_ranks(environ: Mapping[str, str]) -> dict[str, int]:
    """Node -> the rank that srun calls task 0 there: in a heterogeneous job each component counts its tasks anew."""
    first: dict[str, int] = {}
    before = 0
    for group in range(components_of(environ)):
        nodes = environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", "")
        with contextlib.suppress(NodeListError):  # then ranks are numbered within their component
            first |= dict.fromkeys(expand(nodes) if nodes else (), before)
        before += int(environ.get(f"SLURM_NTASKS_HET_GROUP_{group}", "0"))
    return first


class SrunRunner:
    """One srun and what it says about its tasks."""

    def __init__(self, command: list[str], environ: Mapping[str, str], logs: Path) -> None:
        self._command = command
        self._environ = dict(environ)
        self._logs = logs
        self._messages = logs / "launcher.log"
        self._read = 0
        self._srun: subprocess.Popen[bytes] | None = None
        self._end_at: float | None = None
        self._kill_at: float | None = None
        self._first_rank = first_ranks(environ)
        self.ends: list[TaskEnd] = []
        self.failure: Failure | None = None
        self.due_to: str | None = None
        self.lost_node = ""
        self.reported: set[str] = set()

    def start(self) -> None:
        """Start the step."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._messages.open("ab") as messages:
            self._read = messages.tell()
            self._srun = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                env=self._environ,
                preexec_fn=process.child_setup(die_with_parent=signal.SIGKILL),  # noqa: PLW1509 - see there
            )

    def poll(self) -> int | None:
        """The exit code of all ranks together, once all have ended."""
        if self._srun is None:
            return None
        code = self._srun.poll()
        self._read_messages()
        if code is None:
            self._end_if_due()
            return None
        code = 128 - code if code < 0 else code
        if self.ends:
            return self.ends[0].exit_code
        if code == 0 and (self._kill_at is not None or self.lost_node):
            return 128 + signal.SIGTERM  # srun does not always say that it was ended
        if self.failure is None and code not in {0, CHECKPOINTED}:
            words = last_lines(self._messages)
            self.failure = Failure(None, "", code, f"srun ended with {in_words(code)}", words)
        return code if self.failure is None else self.failure.exit_code

    def _read_messages(self) -> None:
        try:
            with self._messages.open("rb") as messages:
                messages.seek(self._read)
                text = messages.read()
        except OSError:  # a file server that does not answer as it should: what srun returns still counts
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self.due_to = self.due_to or parse_due_to(line)
            self.lost_node = self.lost_node or parse_lost_node(line) or ""
            self._look_for_failure(line)

    def _look_for_failure(self, line: str) -> None:
        if self._kill_at is not None:
            return  # what ends now was ended by us
        if _LAUNCH_FAILED.search(line) and self.failure is None:
            self.failure = Failure(None, "", 1, line.removeprefix("srun: error: "), [line])
            self._end_at = time.monotonic()
            return
        end = parse_task_end(line)
        if end is None:
            return
        host, task, how = end
        self.reported.add(host)
        code = exit_code_of(how)
        if code not in {0, CHECKPOINTED}:
            self.ends.append(TaskEnd(self._first_rank.get(host, 0) + task, host, code, time.time()))
            # The others get time to say what they saw; then the step is ended.
            self._end_at = self._end_at or time.monotonic() + _PATIENCE_S

    def _end_if_due(self) -> None:
        now = time.monotonic()
        if self._end_at is not None and now > self._end_at:
            self._end_at = None
            self.terminate()
        elif self._kill_at is not None and now > self._kill_at and self._srun is not None:
            self._srun.kill()

    def be_patient(self) -> None:
        """Do not end the others yet, though one has failed: it is not known why."""
        if self._end_at is not None:
            self._end_at = time.monotonic() + _PATIENCE_S

    def terminate(self) -> None:
        """End the step: srun passes SIGTERM to itself on to its tasks as SIGKILL."""
        if self._srun is not None and self._srun.poll() is None:
            self._srun.terminate()
            self._kill_at = self._kill_at or time.monotonic() + _KILL_PATIENCE_S


_BY_WORDS = {signal.strsignal(number): int(number) for number in signal.Signals}


def exit_code_of(how: str) -> int:
    """The exit code that srun's words stand for: ``Exited with exit code 3``, ``Killed``, ``Out Of Memory`` ..."""
    match = re.search(r"exit code (\d+)", how)
    if match:
        return int(match.group(1))
    if "Out Of Memory" in how:
        return 128 + signal.SIGKILL
    words = how.replace("(core dumped)", "").strip()
    return 128 + _BY_WORDS.get(words, 0) if words in _BY_WORDS else 1
