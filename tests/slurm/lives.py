"""What becomes of runs on a cluster, several at a time: each life has nodes of its own and is told by one function.

Most of a run's life on a cluster is waiting: for the queue, for signals, for KillWait. Lives on different nodes wait
together, so those of all modules happen first (`told` in conftest.py), and then each test looks at its own.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_facts import attempts, processes_of, samples
from whole_runs import Run, Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from slurm_cluster import SlurmCluster

PACED = Path(__file__).resolve().parent.parent / "paced.py"
STEPS = 40
SLOW_FROM = 10
PACE = ("--steps", str(STEPS), "--slow-from", str(SLOW_FROM), "--slow-s", "1")
PATIENCE_S = 240.0
"""Of a loaded machine; nothing that goes well takes a quarter of it."""


@dataclass(frozen=True)
class Life:
    """A cluster, some nodes of it, and a folder: what one story plays on."""

    cluster: SlurmCluster
    runs: Runs
    nodes: tuple[str, ...]

    def submit(self, *options: str, target: Path = PACED, args: tuple[str, ...] = (), ranks: int = 2) -> Run:
        """A run on one or two of the nodes, as many as it has ranks if possible; slow from step 10 in its first attempt."""
        nodes = self.nodes[:ranks]
        shape = ("--nodes", str(len(nodes)), "--tasks-per-node", str(ranks // len(nodes)))
        where = ("--set", f"resources.sbatch.nodelist={','.join(nodes)}", *shape)
        pace = PACE if target == PACED else ()
        return self.runs.submit(target, "--site", "slurm", *where, "--time", "10", *options, args=(*pace, *args))

    def on_any_two(self) -> tuple[str, ...]:
        """Options that leave it to Slurm which two of the nodes a run gets."""
        others = [node for node in self.cluster.node_names if node not in self.nodes]
        return "--set", "resources.sbatch.nodelist=false", "--set", f"resources.exclude={json.dumps(others)}"

    def preempt(self) -> str:
        """Let a job that goes first take the nodes for a moment."""
        nodes = ",".join(self.nodes)
        return self.cluster.submit(
            "#!/bin/bash\nsleep 1\n", "-p", "urgent", "--exclusive", f"-N{len(self.nodes)}", f"-w{nodes}", "--time=1"
        )

    def wait_for(self, condition: Callable[[], Any], run: Run, what: str) -> None:
        """Wait until it is so.

        Raises:
            AssertionError: it is not in time; the story of the run is in the message.

        """
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                queue = self.cluster.run("squeue", "-o", "%i %P %T %r %N", check=False).stdout
                raise AssertionError(f"{what}: not in {PATIENCE_S:g} s\n{queue}{run.story()}")
            time.sleep(0.25)

    def wait_for_step(self, run: Run, step: int = SLOW_FROM, attempt: int = 1) -> None:
        """Wait until an attempt has taken a step."""
        self.wait_for(
            lambda: any(event["step"] >= step and event["attempt"] >= attempt for event in run.steps()),
            run,
            f"step {step} of attempt {attempt}",
        )

    def wait_for_attempt(self, run: Run, number: int, *, closed: bool = False) -> None:
        """Wait until an attempt has begun, or has ended."""

        def there() -> bool:
            found = [attempt for attempt in attempts(run) if attempt.number == number]
            return bool(found) and (found[0].cause is not None or not closed)

        self.wait_for(there, run, f"attempt {number}")

    def wait_until_over(self, run: Run) -> Run:
        """Wait until nothing more happens with the run, and none of its processes is left."""

        def over() -> bool:
            ledger = attempts(run)
            last = ledger[-1] if ledger else None
            return last is not None and (last.action in {"finish", "hold"} or last.cause == "cancelled")

        self.wait_for(over, run, "the end of the run")
        self.wait_for(lambda: not processes_of(run), run, "the end of all its processes")
        return run


Lane = tuple[str, list["Callable[[Life], Any]"]]
"""Nodes, and the stories that happen on them one after the other."""


def live(cluster: SlurmCluster, folder: Path, lanes: list[Lane], at_once: int) -> Told:
    """Let the stories of so many lanes happen at the same time, and those of one lane one after the other."""
    told: dict[str, Future[Any]] = {}

    def lane(nodes: str, those: list[Callable[[Life], Any]]) -> None:
        for story in those:
            place = folder / story.__name__
            place.mkdir()
            future = told[story.__name__] = Future()
            try:
                future.set_result(story(Life(cluster, Runs(place, cluster.env), tuple(nodes.split(",")))))
            except BaseException as error:  # noqa: BLE001 - it is raised in the story's own test
                future.set_exception(error)

    with ThreadPoolExecutor(at_once) as threads:
        for nodes, those in lanes:
            threads.submit(lane, nodes, those)
    return Told(told)


@dataclass(frozen=True)
class Told:
    """How the stories went."""

    futures: Mapping[str, Future[Any]]

    def __call__(self, story: Callable[[Life], Any]) -> Any:
        """What a story returned; what it raised is raised here, in its own test."""
        return self.futures[story.__name__].result()

    def __add__(self, later: Told) -> Told:
        """Both."""
        return Told({**self.futures, **later.futures})


def assert_undisturbed(run: Run, undisturbed: Run) -> None:
    """The finished run is, to the bit, the one that was left alone, and each of its samples counted once."""
    assert run.losses() == undisturbed.losses(), run.story()
    assert samples(run) == samples(undisturbed)
