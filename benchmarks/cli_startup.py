"""How long a verb takes that does next to nothing: ours and `deepspeed --help`, interleaved.

    python benchmarks/cli_startup.py [--rounds 10] [--deepspeed deepspeed]

One JSON line a command, then the ratio of `hpcds --help` to `deepspeed --help` (goal: at most 1/6), both medians.
DeepSpeed is measured where it is installed: `DS_BUILD_OPS=0 pip install deepspeed`, best in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env={**os.environ})
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--deepspeed", default="deepspeed", help="the peer's executable")
    args = parser.parse_args()
    commands = {
        "hpcds --help": [sys.executable, "-m", "hpc_ds", "--help"],
        "hpcds hostfile": [sys.executable, "-m", "hpc_ds", "hostfile", "gpu[001-128]", "--slots", "4"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    if shutil.which(args.deepspeed):
        commands["deepspeed --help"] = [args.deepspeed, "--help"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(json.dumps({"command": name, "median_s": round(median, 4), "rounds": args.rounds}))
    if "deepspeed --help" in medians:
        ratio = medians["hpcds --help"] / medians["deepspeed --help"]
        print(
            json.dumps({"ratio": "hpcds --help / deepspeed --help", "value": round(ratio, 4), "goal": round(1 / 6, 4)})
        )
    else:
        print(json.dumps({"ratio": None, "reason": f"{args.deepspeed}: not installed"}))


if __name__ == "__main__":
    main()
