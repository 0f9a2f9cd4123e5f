"""The doctor, as a step of its own before the ranks of an attempt: ``preflight`` of the job.

It is started as the ranks are: the same runner, allocation, container and environment, so that it meets what they would
meet. It has a run folder of its own, ``logs/attempt-N/preflight/``, so that its logs, signs of life and meeting point are not
taken for those of the training.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.process import node_name
from hpc_ds.config.job import Preflight as Options
from hpc_ds.config.job import python_of
from hpc_ds.config.site_rules import fitted, said
from hpc_ds.launch.failure import first_failure
from hpc_ds.run_dir import RunDir, read_object, write_json
from hpc_ds.runtime.verdict import PHASES, Asked, Finding, failed, findings_of, in_a_sentence, unfit_nodes
from hpc_ds.supervise.say import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.launch.failure import Failure
    from hpc_ds.launch.runner import Runner
    from hpc_ds.supervise.ledger import Attempt
    from hpc_ds.supervise.watch import Watch

ATTEMPT = 1
"""Of the preflight's own run folder, which has no other."""
_GRACE_S = 30.0  # after its own time limit it is ended from here
_LOOK_AGAIN_S = 60.0  # file servers may show a new file of another node late
_FAILED = {"preflight", "node_failure", "hang", "crashed", "lost"}
_MOST_WORDS = 20


def is_due(job: JobConfig, earlier: Sequence[Attempt], nodes: Sequence[str]) -> bool:
    """Whether the nodes are looked at before this attempt.

    Always if the job says so; else before the first attempt, after one that failed, and on a node that has not passed yet.
    """
    options = job.preflight_options
    if options is None or options.always:
        return options is not None
    passed = [attempt for attempt in earlier if attempt.preflight_s is not None and attempt.cause != "preflight"]
    if not passed or earlier[-1].cause in _FAILED:
        return True
    return not set(nodes) <= {node for attempt in passed for node in attempt.node_names}


def _that_is_there(folder: str) -> str:
    """A folder, or the one above it in which it will be made."""
    path = Path(folder)
    return str(next((place for place in (path, *path.parents) if place.is_dir()), path))


class Preflight:
    """One look at the nodes of an attempt.

    Attributes:
        files: its own run folder.
        job: the job with the doctor in the place of its program.
        limit_s: after so many seconds it is ended.
        findings: what was found.
        failure: the rank of it that failed first; None where none did.
        seconds: what it took.
    """

    def __init__(self, run: RunDir, job: JobConfig, site: SiteConfig, number: int) -> None:
        options = job.preflight_options or Options()
        limit_s = options.limit_minutes * 60
        self.files = RunDir(run.attempt_logs(number) / "preflight")
        self._records = self.files.root / "records"
        places = dict.fromkeys([str(run.root), _that_is_there(job.checkpoint.dir or str(run.root))])
        python = job.runtime.python if job.runtime.in_container else python_of(job)
        words = [python, "-u", "-m", "hpc_ds.runtime.doctor", f"--folder={self._records}", f"--limit={limit_s:g}"]
        words += [f"--look-at={place}" for place in places]
        self.job = job.model_copy(update={"command": words, "script": None, "args": [], "compat": None})
        self.limit_s = limit_s + _GRACE_S
        self._site = site
        self._slow = options.slow
        self._begin = time.monotonic()
        self.findings: list[Finding] = []
        self.failure: Failure | None = None
        self.seconds = 0.0

    def prepare(self) -> None:
        """Make its run folder.

        Raises:
            OSError: that cannot be done.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        write_json(self.files.site, self._site.model_dump(mode="json"))
        write_json(self.files.config, {"restart": {"signal": self.job.restart.signal}})

    def judge(self, runner: Runner, watch: Watch, nodes: Sequence[str], components: int) -> None:
        """Take up what the ranks found, once they have ended; it is written to ``report.json`` beside them.

        Args:
            runner: of the ranks.
            watch: over them.
            nodes: of the job; empty where there is only this machine.
            components: of a heterogeneous job, whose shape is not known.
        """
        size, uneven = self.job.resources.world_size, components > 1
        records = self._read(size, patient=runner.poll() == 0 and not uneven)
        if uneven:
            size = max((record["world_size"] for record in records), default=0)
        each = None if uneven else self.job.resources.ranks_per_node
        self.findings = findings_of(records, self._asked(size, dict.fromkeys(nodes or [node_name()], each)))
        self.failure = runner.failure or first_failure(
            runner.ends, self.files.failures(ATTEMPT), self.files.attempt_logs(ATTEMPT)
        )
        if watch.late and not failed(self.findings):
            words = f"the preflight did not end within {self.limit_s:.0f} s"
            self.findings.insert(0, Finding("", "time", "fail", words))
        self.seconds = round(time.monotonic() - self._begin, 3)
        self._tell(records)

    def _asked(self, size: int, nodes: dict[str, int | None]) -> Asked:
        resources = fitted(self.job, self._site)
        expected = said(self.job, self._site, "allreduce_gb_s")[1]
        return Asked(
            world_size=size,
            nodes=nodes,
            gpus_per_node=resources.gpus_per_node or None,
            cpus_per_task=resources.cpus_per_task,
            allreduce_gb_s=float(expected) if isinstance(expected, int | float) else None,
            slow=self._slow,
        )

    def _read(self, size: int, *, patient: bool) -> list[dict[str, Any]]:
        """The records of all ranks; where all ended well, those that do not show yet are waited for."""
        deadline = time.monotonic() + _LOOK_AGAIN_S
        while True:
            found = [read_object(self._records / f"rank-{rank}.json") for rank in range(size)]
            records = [record for record in found if record.get("phase") in PHASES]
            whole = len(records) == size and all(record["phase"] == "done" for record in records)
            if whole or not patient or time.monotonic() > deadline:
                return records
            time.sleep(1.0)

    def _tell(self, records: Sequence[dict[str, Any]]) -> None:
        for finding in self.findings[:_MOST_WORDS]:
            say(f"preflight: {finding.level}: {finding.node or 'all nodes'}: {finding.words}")
        say(f"preflight: {'failed' if self.failed else 'passed'} in {self.seconds:.1f} s")
        report = {"seconds": self.seconds, "findings": [one.as_data() for one in self.findings], "records": [*records]}
        try:
            write_json(self.files.root / "report.json", report, durable=False)
        except OSError as error:
            say(f"preflight: its report is not written: {error.strerror}")

    @property
    def failed(self) -> bool:
        """Whether the ranks should not be started here."""
        return failed(self.findings)

    @property
    def unfit(self) -> list[str]:
        """The nodes at which that lies."""
        return unfit_nodes(self.findings)

    @property
    def words(self) -> str:
        """Why, for a person."""
        return in_a_sentence(self.findings)
