"""How long until a launcher knows what to start: hostfiles, filters and plans, next to DeepSpeed's own parser.

    python benchmarks/launch_plan.py [--rounds 5] [--deepspeed FOLDER]

Prints one JSON line a measurement, both tools in turn in every round, then one line a case with the median, its goal and
the ratio of the medians. FOLDER is where `pip install --target` has put DeepSpeed, by default where the tests have it;
without it ours is measured alone. Times are of this process's work (CPU time), so that a busy machine counts less.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.launch.hostfile import hosts_from_slurm, parse, render
from hpc_ds.launch.plan import LaunchPlan
from hpc_ds.launch.resources import Wish, choose

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parent.parent
NODES = 10_000
HOSTS, SLOTS = 12_500, 8  # 100,000 slots
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": f"node[00001-{NODES:05}]",
    "SLURM_JOB_NUM_NODES": str(NODES),
    "SLURM_TASKS_PER_NODE": f"8(x{NODES})",
}


def names() -> list[str]:
    return [f"node{number:05}" for number in range(HOSTS)]


FILTERS = {
    "all": ("", ""),
    "include half the slots of each host": ("@".join(f"{name}:0,1,2,3" for name in names()), ""),
    "exclude one slot of each host": ("", "@".join(f"{name}:7" for name in names())),
    "exclude one host": ("", "node00007"),
}


def filter_with_us(hostfile: str, include: str, exclude: str) -> int:
    """Read and filter."""
    return sum(host.ranks for host in choose(Wish(hostfile, include, exclude, launcher="ssh"), {}).hosts)


def plan_with_us(hostfile: str, include: str, exclude: str) -> int:
    """Read, filter, plan, and say of every rank what it runs and is told."""
    taken = choose(Wish(hostfile, include, exclude, launcher="ssh"), {})
    plan = LaunchPlan(taken.hosts, ("python", "-u", "train.py"), "/", taken.launcher, local_rank_at=3)
    for host in plan.hosts:
        for local_rank in range(host.ranks):
            plan.rank_environment(host, local_rank)
            plan.rank_command(local_rank)
    return plan.world_size


def filter_with_deepspeed(runner: Any, hostfile: str, include: str, exclude: str) -> int:
    """Read and filter: what its launcher hands to the hosts, which work the rest out."""
    resources = runner.parse_inclusion_exclusion(runner.fetch_hostfile(hostfile), include, exclude)
    runner.encode_world_info(resources)
    return sum(len(slots) for slots in resources.values())


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()  # as timeit does: what else this process has loaded is not what is measured
    start = time.process_time()
    work()
    taken = time.process_time() - start
    gc.enable()
    return taken


def compare(case: str, goal_s: float, rounds: int, tools: dict[str, Callable[[], object]]) -> None:
    taken: dict[str, list[float]] = {tool: [] for tool in tools}
    for number in range(1, rounds + 1):
        for tool, work in tools.items():
            taken[tool].append(seconds(work))
            print(
                json.dumps({"case": case, "tool": tool, "round": number, "seconds": round(taken[tool][-1], 5)}),
                flush=True,
            )
    medians = {tool: statistics.median(times) for tool, times in taken.items()}
    line: dict[str, object] = {"case": case, "median_s": round(medians["hpc_ds"], 4), "goal_s": goal_s}
    if "deepspeed" in medians:
        line["deepspeed / hpc_ds"] = round(medians["deepspeed"] / medians["hpc_ds"], 2)
    print(json.dumps(line), flush=True)


def deepspeed_runner(folder: str) -> Any:
    """DeepSpeed's launcher as a module; None where there is none."""
    if not Path(folder).is_dir():
        print(json.dumps({"deepspeed": None, "reason": f"{folder}: not there"}))
        return None
    sys.path.insert(0, folder)
    from deepspeed.launcher import runner

    return runner


def main() -> None:
    version = f"0.19.8-python{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deepspeed", default=str(REPOSITORY / ".deepspeed" / version))
    args = parser.parse_args()
    runner = deepspeed_runner(args.deepspeed)
    text = render(hosts_from_slurm(SLURM))
    compare(
        f"write the hostfile of {NODES} nodes", 0.05, args.rounds, {"hpc_ds": lambda: render(hosts_from_slurm(SLURM))}
    )
    tools: dict[str, Callable[[], object]] = {"hpc_ds": partial(parse, text)}
    if runner is not None:
        tools["deepspeed"] = partial(runner._parse_hostfile, text.splitlines())  # noqa: SLF001 - the part that reads no file
    compare(f"read a hostfile of {NODES} nodes", 0.05, args.rounds, tools)
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder, "hostfile")
        hostfile.write_text("".join(f"{name} slots={SLOTS}\n" for name in names()), encoding="utf-8")
        for case, filters in FILTERS.items():
            ours = {"hpc_ds": partial(plan_with_us, str(hostfile), *filters)}
            compare(f"filter and plan {HOSTS * SLOTS} slots: {case}", 1.0, args.rounds, ours)
            tools = {"hpc_ds": partial(filter_with_us, str(hostfile), *filters)}
            if runner is not None:
                tools["deepspeed"] = partial(filter_with_deepspeed, runner, str(hostfile), *filters)
                if tools["hpc_ds"]() != tools["deepspeed"]():
                    sys.exit(f"{case}: the two do not agree")
            compare(f"filter {HOSTS * SLOTS} slots: {case}", 1.0, args.rounds, tools)


if __name__ == "__main__":
    main()
