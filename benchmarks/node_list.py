"""How long do 100,000 names take to expand, and to fold, next to ClusterShell?

    python benchmarks/node_list.py [rounds]

Prints one JSON line a measurement, both tools in turn in every round, then one line a case with the ratio of the
medians. ClusterShell's NodeSet is a set: it sorts and drops duplicates, which these lists do not need and we do not do.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from ClusterShell.NodeSet import NodeSet  # type: ignore[import-untyped]

from hpc_ds.launch.node_list import expand, fold

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = 100_000
ROUNDS = 5

EXPAND = {
    "two padded ranges": "node[000001-050000,050001-100000]",
    "two plain ranges": "n[1-50000,50001-100000]",
    "every third number": f"n[{','.join(str(number) for number in range(0, 3 * NAMES, 3))}]",
    "100 racks of 1000, as Slurm prints them": ",".join(f"rack{rack}n[0001-1000]" for rack in range(100)),
    "100 racks of 1000, two brackets": "rack[1-100]n[1-1000]",
    "names one by one": ",".join(f"node{number:06}" for number in range(NAMES)),
}
FOLD = {
    "padded neighbours": [f"node{number:06}" for number in range(NAMES)],
    "100 racks of 1000": [f"rack{rack}n{number:04}" for rack in range(100) for number in range(1000)],
}


def expand_with_clustershell(text: str) -> list[str]:
    return list(NodeSet(text))


def fold_with_clustershell(names: list[str]) -> str:
    return str(NodeSet.fromlist(names))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(case: str, rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    tools = {"hpc_ds": ours, "ClusterShell": theirs}
    taken: dict[str, list[float]] = {tool: [] for tool in tools}
    for number in range(1, rounds + 1):
        for tool, work in tools.items():
            taken[tool].append(seconds(work))
            line = {"case": case, "names": NAMES, "tool": tool, "round": number, "seconds": round(taken[tool][-1], 5)}
            print(json.dumps(line), flush=True)
    ratio = statistics.median(taken["ClusterShell"]) / statistics.median(taken["hpc_ds"])
    print(json.dumps({"case": case, "ClusterShell / hpc_ds": round(ratio, 1)}), flush=True)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    for case, text in EXPAND.items():
        if sorted(expand(text)) != sorted(expand_with_clustershell(text)) or len(expand(text)) != NAMES:
            sys.exit(f"{case}: the two do not agree")
        compare(f"expand: {case}", rounds, partial(expand, text), partial(expand_with_clustershell, text))
    for case, names in FOLD.items():
        compare(f"fold: {case}", rounds, partial(fold, names), partial(fold_with_clustershell, names))


if __name__ == "__main__":
    main()
