"""Whether a run outlives whatever comes, in any order: seeded random events over one run, then its losses beside another's.

    python benchmarks/soak.py [--events 30] [--seed 1] [--site slurm|local] [--kinds kill_rank,hang,...] [--folder DIR]

Two ranks train the program of tests/paced.py. Each event waits until the run has gone a few steps further than ever before,
happens to it, and is over when the next attempt has begun to train. After the last one the run trains to its end, and so
does a second run to which nothing happens. Events, their order, the steps between them and the ranks they hit come from the
seed; how many steps are lost depends on the moment.

preempt            a job of higher priority takes a node, with 20 s of grace; on site local the same signals
preempt_no_grace   the same without grace (Slurm)
requeue            `hpcds requeue`, which an administrator does by `scontrol requeue`
term               SIGTERM to the ranks alone
kill_rank          SIGKILL to one rank
kill_all           SIGKILL to all ranks
hang               SIGSTOP to one rank
controller         slurmctld is ended and started again while the run trains (Slurm)

On Slurm, which is the default where it is installed, it starts the private cluster of tests/slurm_cluster.py. Prints a
JSON line for each event, with the cause in the ledger and whether it is the true one, and one for the whole; ends with 1
unless all causes are true, all losses equal, each sample trained as often as in the other run, and no process is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from run_facts import attempts, job_id_of, processes_of, ranks_of, samples, taken_again  # noqa: E402 - beside the tests
from slurm_cluster import PROGRAMS, SlurmCluster, missing_programs  # noqa: E402
from whole_runs import Run, Runs  # noqa: E402

from hpc_ds.launch.node_list import expand  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACED = REPOSITORY / "tests" / "paced.py"
PATIENCE_S = 300.0
STEPS_PER_EVENT = 40
STEPS_BETWEEN = (2, 8)
# Budgets are for runs of which nobody expects thirty failures.
OPTIONS = {
    "checkpoint.every_steps": 4,
    "restart.max_crashes": 1000,
    "restart.max_hangs": 1000,
    "restart.hang_minutes": 1,
}
CAUSES = {
    "preempt": "preempted",
    "preempt_no_grace": "preempted",
    "requeue": "requeued",
    "term": "stopped",
    "kill_rank": "crashed",
    "kill_all": "crashed",
    "hang": "hang",
    "controller": None,  # the attempt goes on
}
ONLY_ON_SLURM = {"preempt_no_grace", "controller"}


@dataclass(frozen=True)
class Event:
    """One thing that happens.

    Attributes:
        after: steps that the run goes further than ever before, until then.
        rank: whom it hits, where it hits one.
    """

    kind: str
    after: int
    rank: int


def plan(seed: int, count: int, kinds: list[str]) -> list[Event]:
    """The events: each kind at least once where there are enough, in an order of the seed's."""
    chance = random.Random(seed)
    chosen = [*kinds, *chance.choices(kinds, k=count)][:count] if count >= len(kinds) else chance.sample(kinds, count)
    chance.shuffle(chosen)
    return [Event(kind, chance.randint(*STEPS_BETWEEN), chance.randrange(2)) for kind in chosen]


class Soak:
    """One run, and the events that come over it."""

    def __init__(self, runs: Runs, cluster: SlurmCluster | None, steps: int) -> None:
        self._cluster = cluster
        self._runs = runs
        self._steps = steps
        self.run = self._submit()

    def _submit(self) -> Run:
        where = (
            ("--site", "local", "--tasks-per-node", "2")
            if self._cluster is None
            else ("--site", "slurm", "--nodes", "2")
        )
        options = [word for key, value in OPTIONS.items() for word in ("--set", f"{key}={value}")]
        pace = ("--steps", str(self._steps), "--slow-from", "0", "--slow-s", "0.25", "--slow-attempts", "1000000")
        return self._runs.submit(PACED, *where, "--time", "10:00:00", *options, args=pace)

    def happens(self, event: Event) -> dict[str, Any]:
        """Wait for the moment, let it happen, wait until the run trains again; returns what the ledger says of it.

        Raises:
            AssertionError: the run did not come to it, or did not go on.

        """
        reached = self._reached()
        self._wait(lambda: self._trains(reached + event.after), f"step {reached + event.after}")
        number, reached, began = attempts(self.run)[-1].number, self._reached(), time.monotonic()
        getattr(self, f"_{event.kind}")(event)
        expected = CAUSES[event.kind]
        if expected is not None:
            self._wait(lambda: attempts(self.run)[-1].number > number, f"attempt {number + 1} after {event.kind}")
        self._wait(lambda: self._trains(reached + 1), "a new step")
        attempt = attempts(self.run)[number - 1]
        return {
            "kind": event.kind,
            "rank": event.rank,
            "step": reached,
            "attempt": number,
            "cause": attempt.cause,
            "true": attempt.cause == expected,
            "saved_step": attempt.saved_step,
            "down_s": round(time.monotonic() - began, 1),
            "detail": attempt.detail,
        }

    def finish(self, run: Run) -> None:
        """Let a run train to its end at full speed.

        Raises:
            AssertionError: it does not come to it, or a process of it is left.

        """
        (run.folder / "hurry").touch()
        self._wait(lambda: (ledger := attempts(run)) and ledger[-1].cause == "finished", "the end of the run", run)
        self._wait(lambda: not processes_of(run), "the end of all its processes", run)

    def undisturbed(self) -> Run:
        """The same run, left alone."""
        run = self._submit()
        self.finish(run)
        return run

    def _reached(self) -> int:
        return max((event["step"] for event in self.run.steps()), default=0)

    def _trains(self, step: int) -> bool:
        """Whether the last attempt has taken that step and lives."""
        last = attempts(self.run)[-1:]
        return any(
            attempt.cause is None and event["attempt"] == attempt.number and event["step"] >= step
            for attempt in last
            for event in self.run.steps()
        )

    def _wait(self, condition: Callable[[], Any], what: str, run: Run | None = None) -> None:
        run, end = run or self.run, time.monotonic() + PATIENCE_S
        while not condition():
            held = [attempt for attempt in attempts(run)[-1:] if attempt.action == "hold"]
            if held or time.monotonic() > end:
                why = held[0].detail if held else f"not in {PATIENCE_S:g} s"
                raise AssertionError(f"{what}: {why}\n{run.story()}")
            time.sleep(0.1)

    # what happens

    def _on_slurm(self) -> SlurmCluster:
        if self._cluster is None:
            raise AssertionError("this happens on Slurm only")
        return self._cluster

    def _preempt(self, _: Event) -> None:
        if self._cluster is None:
            self.run.hpcds("preempt", str(self.run.folder))
            return
        first = expand(attempts(self.run)[-1].nodes)[0]
        self._cluster.submit("#!/bin/bash\nsleep 1\n", "-p", "urgent", "--exclusive", f"-w{first}", "--time=1")

    def _preempt_no_grace(self, event: Event) -> None:
        cluster = self._on_slurm()
        number = attempts(self.run)[-1].number
        cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=0")
        self._preempt(event)
        self._wait(lambda: attempts(self.run)[number - 1].cause, "the end of the attempt")
        cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=20")

    def _requeue(self, _: Event) -> None:
        self.run.hpcds("requeue", str(self.run.folder))

    def _term(self, _: Event) -> None:
        if self._cluster is None:
            self._kill(list(ranks_of(self.run).values()), signal.SIGTERM)
        else:
            self._cluster.run("scancel", "--signal=TERM", job_id_of(self.run))

    def _kill_rank(self, event: Event) -> None:
        self._kill([ranks_of(self.run)[event.rank]], signal.SIGKILL)

    def _kill_all(self, _: Event) -> None:
        self._kill(list(ranks_of(self.run).values()), signal.SIGKILL)

    def _hang(self, event: Event) -> None:
        self._kill([ranks_of(self.run)[event.rank]], signal.SIGSTOP)

    def _controller(self, _: Event) -> None:
        cluster = self._on_slurm()
        cluster.stop_slurmctld()
        cluster.start_slurmctld()

    def _kill(self, pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def soak(runs: Runs, cluster: SlurmCluster | None, events: list[Event]) -> Iterator[dict[str, Any]]:
    """Let all events happen to one run; yields a line for each, and at last one for the whole."""
    begin = time.monotonic()
    life = Soak(runs, cluster, steps=STEPS_PER_EVENT * (len(events) + 1))
    true = True
    for number, event in enumerate(events, 1):
        line = life.happens(event)
        true = true and line["true"]
        yield {"event": number, **line}
    life.finish(life.run)
    disturbed_s = time.monotonic() - begin
    other = life.undisturbed()
    whole = {
        "causes_true": true,
        "losses_equal": life.run.losses() == other.losses(),
        "samples_equal": samples(life.run) == samples(other),
    }
    yield {
        "events": len(events),
        "attempts": len(attempts(life.run)),
        "steps": len(life.run.losses()),
        "steps_taken_again": len(taken_again(life.run)),
        "seconds": round(disturbed_s, 1),
        **whole,
        "ok": all(whole.values()),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "local" if missing_programs(*PROGRAMS) else "slurm"
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--site", choices=("slurm", "local"), default=default)
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), help="of the events; default: all that the site knows"
    )
    parser.add_argument("--folder", type=Path, help="where the runs go; default: a temporary folder")
    args = parser.parse_args()
    known = [kind for kind in CAUSES if args.site == "slurm" or kind not in ONLY_ON_SLURM]
    args.kinds = args.kinds or known
    if unknown := sorted(set(args.kinds) - set(known)):
        parser.error(f"--kinds {','.join(unknown)}: not known on site {args.site}; choose from {', '.join(known)}")
    return args


def main() -> int:
    args = arguments()
    events = plan(args.seed, args.events, args.kinds)
    print(json.dumps({"site": args.site, "seed": args.seed, "plan": [event.kind for event in events]}), flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        cluster = stack.enter_context(SlurmCluster(folder / "slurm")) if args.site == "slurm" else None
        environ = {**(cluster.env if cluster else os.environ), "PYTHONPATH": os.pathsep.join(sys.path[:1])}
        line: dict[str, Any] = {}
        for line in soak(Runs(folder, environ), cluster, events):
            print(json.dumps(line), flush=True)
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
