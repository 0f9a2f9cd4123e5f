"""Python functions as jobs on a real Slurm: what they return, raise, and go on with after a signal or a preemption.

All of them run beside each other, on nodes of their own where that matters, and are looked at afterwards.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from hpc_ds.errors import UnfinishedError
from hpc_ds.script.functions import submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from slurm_cluster import SlurmCluster

    from hpc_ds.cluster.function_job import FunctionJob

pytestmark = pytest.mark.slurm

PATIENCE_S = 240.0


def who(base: int) -> tuple[int, str, str | None, str]:
    names = ("SLURM_JOB_NUM_NODES", "TOKEN", "SLURMD_NODENAME")
    number, token, node = (os.environ.get(name, "none") for name in names)
    return base + int(os.environ["SLURM_PROCID"]), number, token, node


def fails_on_rank_1() -> None:
    if os.environ["SLURM_PROCID"] == "1":
        raise ValueError("no such shard")
    time.sleep(600)


def waits(ready: Path) -> None:
    ready.touch()
    time.sleep(600)


class Counts:
    """Counts its starts; returns from the second one on."""

    def __init__(self, ready: Path) -> None:
        self.ready = ready
        self.starts = 1

    def __call__(self) -> tuple[int, int]:
        end = time.monotonic() + 600
        while self.starts == 1 and time.monotonic() < end:
            self.ready.touch()
            time.sleep(0.1)
        return self.starts, int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def checkpoint(self) -> Any:
        import submitit

        self.starts += 1
        return submitit.helpers.DelayedSubmission(self)


def asks(ready: Path) -> str:
    """Saves when it is asked to, on both ranks, and goes on from there."""
    from hpc_ds import preemption

    state = ready.with_name(f"saved-{os.environ['SLURM_PROCID']}")
    if state.exists():
        return state.read_text()
    while not preemption.requested():
        ready.with_name(f"{ready.name}-{os.environ['SLURM_PROCID']}").touch()
        time.sleep(0.1)
    state.write_text("went on")
    raise preemption.Preempted


class Stories:
    """Functions on a cluster, and the files by which they say that they are there."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder

    def start(self, function: Callable[..., Any], *args: Any, node: str | None = None, **resources: Any) -> FunctionJob:
        place = {"sbatch": {"nodelist": node}} if node else {}
        asked = {"time": "15", "partition": "main", **place, **resources}
        return submit(function, *args, site="slurm", resources=asked, folder=self.folder / "functions")

    def ready(self, name: str) -> Path:
        return self.folder / name

    def wait_for(self, job: FunctionJob, *files: Path) -> None:
        end = time.monotonic() + PATIENCE_S
        while not all(file.exists() for file in files):
            if time.monotonic() > end or job.done():
                raise AssertionError(f"no {files}\n{self.told_of(job)}")
            time.sleep(0.1)

    def wait_until_done(self, job: FunctionJob) -> None:
        try:
            job.wait(PATIENCE_S)
        except UnfinishedError as error:
            raise AssertionError(f"{error}\n{self.told_of(job)}") from None

    def told_of(self, job: FunctionJob) -> str:
        logs = [
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(job.folder.rglob("*log*"))
            if path.is_file()
        ]
        queue = self.cluster.run("scontrol", "show", "job", job.job_id, check=False).stdout
        return "\n".join([repr(job), queue, *logs])


@pytest.fixture(scope="module")
def told(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FunctionJob]]:
    """Each story's job, over."""
    stories = Stories(slurm_cluster, tmp_path_factory.mktemp("functions"))
    ready = stories.ready
    module = sys.modules[__name__]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, slurm_cluster.env[name])
        patch.setenv("TOKEN", "s3cret")
        patch.setenv("SLURM_NTASKS", "7")  # of a job that this one is submitted from
        cloudpickle.register_pickle_by_value(module)
        jobs = {
            "preempted": stories.start(Counts(ready("preempted")), node="n5"),
            "preempted while it asks": stories.start(asks, ready("asks"), node="n5", tasks_per_node=2),
            "warned": stories.start(Counts(ready("warned")), node="n4"),
            "cancelled": stories.start(waits, ready("cancelled"), node="n4"),
            "raised": stories.start(fails_on_rank_1, node="n4", tasks_per_node=2),
            "returned": submit(
                who,
                10,
                site="slurm",
                resources={"nodes": 2, "tasks_per_node": 2, "time": "15", "exclude": ["n4", "n5"]},
                job={"env_from": ["TOKEN"]},
                folder=stories.folder / "functions",
            ),
        }
        stories.wait_for(jobs["preempted"], ready("preempted"))
        stories.wait_for(jobs["preempted while it asks"], ready("asks-0"), ready("asks-1"))
        slurm_cluster.submit("#!/bin/bash\nsleep 1\n", "-p", "urgent", "--exclusive", "-wn5", "--time=1")
        stories.wait_for(jobs["warned"], ready("warned"))
        slurm_cluster.run("scancel", "-s", "USR2", jobs["warned"].job_id)  # as Slurm does before the time limit
        stories.wait_for(jobs["cancelled"], ready("cancelled"))
        jobs["cancelled"].cancel()
        for job in jobs.values():
            stories.wait_until_done(job)
        yield jobs
        cloudpickle.unregister_pickle_by_value(module)


def test_a_function_returns_from_every_rank(told: dict[str, FunctionJob]) -> None:
    job = told["returned"]
    found = job.results()
    assert [one[:3] for one in found] == [(10 + rank, "2", "s3cret") for rank in range(4)]
    assert len({one[3] for one in found}) == 2
    assert job.warnings == []
    assert b"s3cret" not in (job.folder / "script.sbatch").read_bytes()


def test_the_rank_that_raised_is_named_and_the_others_are_ended(told: dict[str, FunctionJob]) -> None:
    error = told["raised"].exception()
    assert error is not None
    assert str(error).startswith(
        f"function 'fails_on_rank_1', job {told['raised'].job_id}, rank 1: ValueError: no such shard;"
    )
    assert error.trace.rstrip().endswith("ValueError: no such shard")


def test_a_cancelled_function_has_no_result(told: dict[str, FunctionJob]) -> None:
    assert "ended as CANCELLED without a result" in str(told["cancelled"].exception())


@pytest.mark.parametrize("story", ["preempted", "warned"])
def test_a_function_with_a_checkpoint_goes_on(story: str, told: dict[str, FunctionJob]) -> None:
    starts, restarts = told[story].result()
    assert (starts, restarts) == (2, 1), told[story].stderr()


def test_a_function_that_asks_is_queued_again_after_it_has_saved(told: dict[str, FunctionJob]) -> None:
    assert told["preempted while it asks"].results() == ["went on", "went on"]
