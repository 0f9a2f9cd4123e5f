"""What a preemption costs: until the next step, until the save is durable, over a whole run; and what the supervisor takes.

    python benchmarks/recovery.py [--quick] [--only start signal goodput supervisor] [--rounds N] [--period S] ...

Two ranks over gloo, one thread each, on site `local`; ranks run benchmarks/recovery_ranks.py. All parts take turns in one run.

start       From the start of an attempt (that of the job script, so the supervisor's own start is counted) to the end of its
            first new step. Beside it the bare minimum (import torch, a process group, the same state from one file, one
            step) and a DeepSpeed script that loads its own checkpoint, by the `deepspeed` launcher, the counterpart of our
            supervisor, and by hand, without any. CPU: what rank 0 has used by then, and our supervisor; other work on the
            machine disturbs it less.
signal      From the preemption to the end of the last rank, with everything durable; beside it one step, and one
            synchronous save of the same state by the same ranks.
goodput     A run that is preempted every S seconds. Beside it the usual practice: an sbatch file that starts its ranks again
            (a shell loop here, which requeues faster than any cluster), DeepSpeed, a save every 20 steps. It is preempted
            at the same instants: SIGTERM to the ranks, SIGKILL at the end of the grace time. What counts is the newest
            checkpoint at the end. Share: steps that counted x the median step / allocated time; rate: steps that counted
            / allocated time, which also counts that the engine is faster.
supervisor  Resident memory and CPU share of the supervisor over a minute of training.

Prints JSON lines, then ratios with their goals and the table of docs/benchmarks.md. DeepSpeed must have been installed for
the tests (``python tests/install_deepspeed_peer.py``); without it, its lines are left out, and it says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from deepspeed_peer import FOLDER, FOR_EVERY_RANK, FOREIGN_PREFIXES  # noqa: E402 - beside the tests

from hpc_ds.checkpoint.layout import newest_step  # noqa: E402
from hpc_ds.cluster import process  # noqa: E402
from hpc_ds.cluster.local import Local  # noqa: E402
from hpc_ds.run_dir import RunDir, read_lines, read_object  # noqa: E402
from hpc_ds.supervise.ledger import read_ledger  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = REPOSITORY / "benchmarks" / "recovery_ranks.py"
WORLD_SIZE = 2
PARTS = ("start", "signal", "goodput", "supervisor")
PATIENCE_S = 180.0
GRACE_S = 20.0
PROBE = "probe"
# what, in words, unit, goal
ROWS = [
    ("start_s", "start of an attempt to its first new step", "s", ""),
    ("start_bare_s", "the bare minimum, likewise", "s", ""),
    ("start_deepspeed_s", "DeepSpeed's resume by its launcher, likewise", "s", ""),
    ("start_by_hand_s", "DeepSpeed's ranks started by hand, likewise", "s", ""),
    ("start_to_bare", "ours / the bare minimum", "", "at most 1.3"),
    ("start_to_deepspeed", "ours / DeepSpeed's by its launcher", "", "at most 0.6"),
    ("start_to_by_hand", "ours / DeepSpeed's by hand", "", ""),
    ("cpu_to_bare", "the same in CPU time: ours / the bare minimum", "", "at most 1.3"),
    ("cpu_to_by_hand", "the same in CPU time: ours / DeepSpeed's by hand", "", ""),
    ("signal_s", "preemption to durable checkpoint and end of the ranks", "s", ""),
    ("signal_saved_s", "of that, until the checkpoint is durable", "s", ""),
    ("step_s", "one step", "s", ""),
    ("save_s", "one synchronous save", "s", ""),
    ("signal_to_goal", "preemption to end / (one step + 1.2 x one save)", "", "at most 1"),
    ("share", "goodput of a run preempted every {period:g} s", "", ""),
    ("share_deepspeed", "the usual practice's", "", ""),
    ("share_ratio", "goodput / the usual practice's", "", "at least 1.3"),
    ("rate_ratio", "steps that counted per second / the usual practice's", "", ""),
    ("lost", "steps lost", "", "0"),
    ("lost_deepspeed", "steps that the usual practice lost", "", ""),
    ("supervisor_rss_mb", "supervisor, resident memory", "MB", "below 40"),
    ("supervisor_pss_mb", "of that its share (PSS)", "MB", ""),
    ("supervisor_cpu", "of a core, in per cent", "%", "below 1"),
]


class Ours:
    """One run on site `local`; its folder is made by the first start."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._starts = folder / "starts"
        self.log = folder / "log"
        self._environment = environment(folder)
        (folder / "job.json").write_text(json.dumps(self._job()))
        self.run: RunDir | None = None

    def _job(self) -> dict[str, Any]:
        return {
            "name": "recovery",
            "script": str(RANKS),
            "args": ["ours", "--folder", str(self._folder / PROBE), "--log", str(self.log)],
            "resources": {"tasks_per_node": WORLD_SIZE},
            "setup": [f"date +%s.%N >> {self._starts}"],
            "env": {"OMP_NUM_THREADS": "1"},
        }

    def start(self) -> None:
        """Submit the run, or resume it."""
        if self.run is None:
            said = self._hpcds("submit", str(self._folder / "job.json"), "--site", "local", "--runs", str(self._folder))
            self.run = RunDir(Path(said["run_dir"]))
        else:
            self._hpcds("resume", str(self.run.root))

    def _hpcds(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "hpc_ds", *words, "--json"]
        done = subprocess.run(
            command, env=self._environment, cwd=self._folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr}")
        return dict(json.loads(done.stdout))

    @property
    def files(self) -> RunDir:
        """The run's."""
        if self.run is None:
            raise SystemExit("the run was not submitted")
        return self.run

    @property
    def job_id(self) -> str:
        """The scheduler's."""
        return str(read_object(self.files.job)["job_id"])

    def events(self, event: str, attempt: int = 0) -> list[dict[str, Any]]:
        """Of one attempt, or of all."""
        lines = read_lines(self.files.events)
        return [line for line in lines if line.get("event") == event and attempt in {0, line.get("attempt")}]

    def started(self) -> list[float]:
        """When the job script of each attempt began."""
        return [float(line) for line in self._starts.read_text().split()] if self._starts.exists() else []

    def wait_for_step(self, attempt: int, more: int = 0) -> float:
        """Wait until an attempt has taken its first step and so many more; seconds from its start to the first."""
        until(lambda: len(self.events("step", attempt)) > more, f"steps of attempt {attempt}", self.files.scheduler_log)
        return float(self.events("step", attempt)[0]["time"]) - self.started()[attempt - 1]

    def cpu_s(self, attempt: int) -> float:
        """What rank 0 had used after its first step of an attempt."""
        first = self.events("step", attempt)[0]["step"]
        until(lambda: any(line["step"] == first for line in read_lines(self.log)), "a line of rank 0", self.log)
        return float(next(line["cpu_s"] for line in read_lines(self.log) if line["step"] == first))

    def ranks(self) -> list[int]:
        """Their process ids."""
        return [pid for pid, _ in read_object(self.files.local / "step.json").get("ranks", [])]

    def preempt(self) -> tuple[float, float]:
        """Preempt; when that was, and when the last rank had ended."""
        ends = [os.pidfd_open(pid) for pid in self.ranks()]
        began = time.time()
        Local(self.files).preempt(self.job_id)
        for end in ends:
            if not select.select([end], [], [], PATIENCE_S)[0]:
                raise SystemExit("a rank did not end")
        ended = time.time()
        for end in ends:
            os.close(end)
        return began, ended

    def end(self) -> None:
        """Cancel, and wait until nothing is left."""
        keeper = read_object(self.files.local / "state.json")
        Local(self.files).cancel(self.job_id)
        until(lambda: not process.is_alive(keeper["pid"], keeper["started"]), "the end", self.files.scheduler_log)

    def supervisor(self) -> int:
        """Its process id."""
        keeper = int(read_object(self.files.local / "state.json")["pid"])
        ranks = set(self.ranks())
        return next(pid for pid in process.descendants(keeper) if pid not in ranks)


class Peer:
    """A program of recovery_ranks.py in plain processes, as an sbatch file would start it."""

    def __init__(self, who: str, folder: Path, deepspeed: Path | None) -> None:
        folder.mkdir()
        self._who = who
        self._folder = folder
        self._count = 0
        self.log = folder / "log"
        self._deepspeed = deepspeed
        self._environment = environment(folder, *([deepspeed] if deepspeed else []))
        self._ranks: list[subprocess.Popen[bytes]] = []

    def command(self) -> list[str]:
        """Of one rank."""
        return [sys.executable, str(RANKS), self._who, "--folder", str(self._folder), "--log", str(self.log)]

    def start(self, *more: str) -> float:
        """Start all ranks; when that was."""
        self._count += 1
        began = time.time()
        for rank in range(WORLD_SIZE):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "STORE": str(self._folder / f"store-{self._count}")}
            with (self._folder / f"rank-{rank}.log").open("ab") as log:
                command = [*self.command(), *more]
                self._ranks.append(
                    subprocess.Popen(command, env={**self._environment, **of_rank}, stdout=log, stderr=log)
                )
        return began

    def launch(self) -> float:
        """Start all ranks by the `deepspeed` launcher; when that was."""
        self._count += 1
        words = ["--num_gpus", str(WORLD_SIZE), "--no_local_rank", "--master_addr", "127.0.0.1"]
        command = [sys.executable, f"{self._deepspeed}/bin/deepspeed", *words, *self.command()[1:]]
        environment = {**self._environment, "STORE": str(self._folder / f"store-{self._count}")}
        del environment["WORLD_SIZE"]
        began = time.time()
        with (self._folder / "rank-0.log").open("ab") as log:
            self._ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return began

    def loop(self) -> subprocess.Popen[bytes]:
        """The usual practice: a script that starts its ranks again whenever they have ended."""
        ranks = "\n".join(f'  RANK={rank} LOCAL_RANK={rank} "$@" &' for rank in range(WORLD_SIZE))
        text = f"n=0\nwhile true; do\n  n=$((n + 1)); export STORE={self._folder}/store-$n\n{ranks}\n  wait\ndone\n"
        with (self._folder / "loop.log").open("ab") as log:
            command = ["/bin/bash", "-c", text, "loop", *self.command()]
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def steps(self) -> list[dict[str, Any]]:
        """Those taken so far, with their times."""
        return read_lines(self.log)

    def until_step(self, count: int) -> dict[str, Any]:
        """Wait for so many steps in all; the last of them."""
        until(lambda: len(self.steps()) >= count, f"step {count} of {self._who}", self._folder / "rank-0.log")
        return self.steps()[count - 1]

    def wait(self) -> None:
        """Wait until all ranks have ended by themselves."""
        if any(rank.wait(PATIENCE_S) for rank in self._ranks):
            raise SystemExit((self._folder / "rank-0.log").read_text(errors="replace")[-3000:])
        self._ranks.clear()

    def kill(self) -> None:
        """End all ranks at once."""
        process.send(
            [pid for rank in self._ranks for pid in (rank.pid, *process.descendants(rank.pid))], signal.SIGKILL
        )
        for rank in self._ranks:
            rank.wait()
        self._ranks.clear()

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        latest = self._folder / "latest"
        return int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0


def environment(folder: Path, *first: Path) -> dict[str, str]:
    """Of every process: nothing of an outer job, one thread, lists of runs in the folder."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    path = [str(entry) for entry in (*first, REPOSITORY)]
    known = {**FOR_EVERY_RANK, "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_SIZE": str(WORLD_SIZE)} if first else {}
    return {
        **inherited, **known, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(WORLD_SIZE),
        "XDG_STATE_HOME": str(folder), "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def until(done: Callable[[], bool], what: str, log: Path) -> None:
    """Wait for something; where it does not come, say what the log says."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise SystemExit(f"{what}: not seen within {PATIENCE_S:g} s\n{said}")
        time.sleep(0.02)


def tell(part: str, **found: Any) -> None:
    """One JSON line."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


def starts_and_signals(given: argparse.Namespace, folder: Path, deepspeed: Path | None) -> dict[str, float]:
    """Both in turns: each preemption of ours makes the next start."""
    ours, bare = Ours(folder / "ours"), Peer("bare", folder / "bare", None)
    peer = Peer("deepspeed", folder / "deepspeed", deepspeed) if deepspeed else None
    bare.start()
    bare.wait()  # makes the state
    if peer:
        peer.start("--steps", "20")
        peer.wait()  # makes the checkpoint
    ours.start()
    ours.wait_for_step(1, more=given.probe_after)
    ours.end()
    rounds: list[dict[str, float]] = []
    for number in range(given.rounds):
        found = one_start("bare", bare, bare.start)
        bare.wait()
        if peer:
            found |= one_start("by_hand", peer, peer.start)
            peer.kill()
            found |= one_start("deepspeed", peer, peer.launch)
            peer.kill()
        rounds.append({**found, **one_preemption(ours, given.probe_after)})
        tell("start and signal", round=number, **rounds[-1])
    return compared(rounds)


def one_start(name: str, peer: Peer, start: Callable[[], float]) -> dict[str, float]:
    """Start a peer and wait for its next step."""
    taken = len(peer.steps())
    began = start()
    step = peer.until_step(taken + 1)
    return {f"start_{name}_s": float(step["time"]) - began, f"cpu_{name}_s": float(step["cpu_s"])}


def one_preemption(ours: Ours, probe_after: int) -> dict[str, float]:
    """Resume, train, preempt, wait for the next attempt's step, end."""
    attempt = len(ours.started()) + 1
    ours.start()
    first = ours.wait_for_step(attempt)
    cpu_s = on_cpu_s(ours.supervisor()) + ours.cpu_s(attempt)
    ours.wait_for_step(attempt, more=probe_after)
    saves = [event for event in ours.events("saved", attempt) if event["tag"] == PROBE]
    began, ended = ours.preempt()
    second = ours.wait_for_step(attempt + 1, more=2)
    ours.end()
    steps, saved = ours.events("step", attempt), ours.events("saved", attempt)[-1]
    if saved["step"] != steps[-1]["step"] or ours.events("step", attempt + 1)[0]["step"] != saved["step"] + 1:
        raise SystemExit("a step was lost")
    return {
        "start_s": (first + second) / 2,
        "cpu_s": cpu_s,
        "signal_s": ended - began,
        "signal_saved_s": float(saved["time"]) - began,
        "step_s": statistics.median(float(step["seconds"]) for step in steps[1:]),
        "save_s": float(saves[-1]["seconds"]),
    }


def compared(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians; ratios are medians of those of each round, whose parts ran one after another."""
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    for name in ("bare", "deepspeed", "by_hand"):
        for what in ("start", "cpu"):
            if f"{what}_{name}_s" in found and (what, name) != ("cpu", "deepspeed"):  # the launcher's is not known
                ratios = [each[f"{what}_s"] / each[f"{what}_{name}_s"] for each in rounds]
                found[f"{what}_to_{name}"] = statistics.median(ratios)
    goals = [each["step_s"] + 1.2 * each["save_s"] for each in rounds]
    ratios = [each["signal_s"] / goal for each, goal in zip(rounds, goals, strict=True)]
    return {**found, "signal_to_goal": statistics.median(ratios)}


def goodput(given: argparse.Namespace, folder: Path, deepspeed: Path | None) -> dict[str, float]:
    """Ours, then the usual practice, each alone on the machine."""
    found = our_goodput(given, folder / "preempted")
    tell("goodput", who="hpc_ds", **found)
    if deepspeed:
        peer = usual_goodput(given, Peer("deepspeed", folder / "usual", deepspeed))
        tell("goodput", who="the usual practice", **peer)
        if peer["kept"]:
            found["share_ratio"], found["rate_ratio"] = found["share"] / peer["share"], found["rate"] / peer["rate"]
        found |= {f"{key}_deepspeed": value for key, value in peer.items()}
    return found


def our_goodput(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    ours = Ours(folder)
    ours.start()
    until(lambda: bool(ours.started()), "the start", folder)
    began = ours.started()[0]
    for number in range(1, given.preemptions + 1):
        sleep_until(began + number * given.period)
        if number < given.preemptions:
            Local(ours.files).preempt(ours.job_id)
        else:
            ours.end()
    steps = ours.events("step")
    taken = [int(step["step"]) for step in steps]
    spent = [float(step["seconds"]) for step in steps]
    saved = newest_step(ours.files.checkpoints) or 0
    return {
        **kept(taken, saved, statistics.median(spent), given.preemptions * given.period),
        "attempts": len(read_ledger(ours.files)),
    }


def usual_goodput(given: argparse.Namespace, peer: Peer) -> dict[str, float]:
    began = time.time()
    loop = peer.loop()
    for number in range(1, given.preemptions + 1):
        sleep_until(began + number * given.period)
        ranks = process.descendants(loop.pid)
        if number == given.preemptions:
            loop.kill()
        process.send(ranks, signal.SIGTERM)
        grace_ends, doomed = time.time() + GRACE_S, [(pid, process.start_time(pid)) for pid in ranks]
        while time.time() < grace_ends and any(s is not None and process.is_alive(p, s) for p, s in doomed):
            time.sleep(0.02)
        process.send([pid for pid, s in doomed if s is not None and process.is_alive(pid, s)], signal.SIGKILL)
    loop.wait()
    steps = peer.steps()
    ends = [float(step["time"]) for step in steps]
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return kept(
        [int(step["step"]) for step in steps],
        peer.saved(),
        statistics.median(gaps or [0.0]),
        given.preemptions * given.period,
    )


def kept(taken: list[int], saved: int, step_s: float, allocated_s: float) -> dict[str, float]:
    """What of the steps taken counted."""
    return {
        "share": saved * step_s / allocated_s,
        "rate": saved / allocated_s,
        "taken": len(taken),
        "kept": saved,
        "lost": len(taken) - saved,
        "step_s": step_s,
    }


def sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.time()))


def supervisor(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Its memory and CPU over a while of training."""
    ours = Ours(folder / "watched")
    ours.start()
    ours.wait_for_step(1)
    pid = ours.supervisor()
    began, before = time.monotonic(), on_cpu_s(pid)
    memory: list[dict[str, int]] = []
    while time.monotonic() < began + given.watch:
        time.sleep(1.0)
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        memory.append({line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines})
    took, used = time.monotonic() - began, on_cpu_s(pid) - before
    ours.end()
    found = {
        "supervisor_rss_mb": max(each["Rss"] for each in memory) / 1e6,
        "supervisor_pss_mb": max(each["Pss"] for each in memory) / 1e6,
        "supervisor_cpu": 100 * used / took,
    }
    tell("supervisor", watched_s=took, **found)
    return found


def on_cpu_s(pid: int) -> float:
    """Seconds that all threads of a process were on a CPU, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def table(found: dict[str, float], given: argparse.Namespace) -> str:
    """What docs/benchmarks.md has of it."""
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for key, words, unit, goal in ROWS:
        if key in found:
            number = f"{found[key]:.3g}" if found[key] < 1000 else f"{found[key]:.0f}"
            lines.append(f"| {words.format(period=given.period)} | {number} {unit}".rstrip() + f" | {goal} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds, a preemption every 20 s, 15 s of watching")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="of starts and signals; default 5")
    parser.add_argument("--period", type=float, help="seconds between preemptions; default 60")
    parser.add_argument("--preemptions", type=int, help="default 5; the last one is the end")
    parser.add_argument("--watch", type=float, help="seconds for which the supervisor is watched; default 60")
    parser.add_argument(
        "--probe-after", type=int, default=12, help="steps before a preemption, with a timed save among them"
    )
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--deepspeed", type=Path, default=FOLDER, help="its folder; default: where the tests have it")
    given = parser.parse_args()
    usual = (2, 20.0, 3, 15.0) if given.quick else (5, 60.0, 5, 60.0)
    for name, value in zip(("rounds", "period", "preemptions", "watch"), usual, strict=True):
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def main() -> None:
    given = options()
    deepspeed = given.deepspeed if (given.deepspeed / "deepspeed").is_dir() else None
    if deepspeed is None:
        print(f"{given.deepspeed}: DeepSpeed is not installed for the tests; its lines are left out", file=sys.stderr)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="recovery-benchmark-") as name:
        folder = Path(name).resolve()
        if {"start", "signal"} & set(given.only):
            found |= starts_and_signals(given, folder, deepspeed)
        if "goodput" in given.only:
            found |= goodput(given, folder, deepspeed)
        if "supervisor" in given.only:
            found |= supervisor(given, folder)
    tell("summary", **found)
    print("\n" + table(found, given))


if __name__ == "__main__":
    main()
