"""How long a verb takes that does next to nothing: ours, `deepspeed --help` and `import deepspeed`, interleaved.

    python benchmarks/cli_startup.py [--rounds 15] [--deepspeed deepspeed] [--peer FOLDER]

One JSON line a command, then ratios of medians: `hpcds --help` to `deepspeed --help` (goal: at most 1/6), and
`hpcds submit --dry-run` to `python -c "import deepspeed"` (goal: at most 1/4). DeepSpeed is measured where it is installed:
its executable, `DS_BUILD_OPS=0 pip install deepspeed`, best in an environment of its own; its package, in the folder that
`tests/install_deepspeed_peer.py` makes. The first round, in which Python writes its bytecode, does not count.
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
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
JOB = REPOSITORY / "examples" / "gpt" / "job.json"
sys.path.insert(0, str(REPOSITORY / "tests"))

from deepspeed_peer import FOLDER, FOR_EVERY_RANK  # noqa: E402 - stands in tests/


def seconds(command: list[str], extra: dict[str, str]) -> float:
    """Wall time of one run of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | extra
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env=environment)
    return time.perf_counter() - began


def ratio(medians: dict[str, float], ours: str, theirs: str, goal: float) -> dict[str, object]:
    """One line of the report."""
    if theirs not in medians:
        return {"ratio": f"{ours} / {theirs}", "value": None, "reason": "not installed"}
    return {"ratio": f"{ours} / {theirs}", "value": round(medians[ours] / medians[theirs], 4), "goal": round(goal, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deepspeed", default="deepspeed", help="the peer's executable")
    parser.add_argument("--peer", type=Path, default=FOLDER, help="the folder that the peer is installed in")
    args = parser.parse_args()
    hpcds = [sys.executable, "-m", "hpc_ds"]
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "hpcds --help": ([*hpcds, "--help"], {}),
        "hpcds hostfile": ([*hpcds, "hostfile", "gpu[001-128]", "--slots", "4"], {}),
        "hpcds submit --dry-run": ([*hpcds, "submit", str(JOB), "--dry-run", "--site", "slurm"], {}),
        "python -c pass": ([sys.executable, "-c", "pass"], {}),
    }
    if shutil.which(args.deepspeed):
        commands["deepspeed --help"] = ([args.deepspeed, "--help"], {})
    if args.peer.is_dir():
        peer = FOR_EVERY_RANK | {"PYTHONPATH": str(args.peer)}
        commands["import deepspeed"] = ([sys.executable, "-c", "import deepspeed"], peer)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(args.rounds + 1):
        for name, (command, extra) in commands.items():
            taken = seconds(command, extra)
            if number > 0:
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        least = round(min(times[name]), 4)
        print(json.dumps({"command": name, "median_s": round(median, 4), "min_s": least, "rounds": args.rounds}))
    print(json.dumps(ratio(medians, "hpcds --help", "deepspeed --help", 1 / 6)))
    print(json.dumps(ratio(medians, "hpcds submit --dry-run", "import deepspeed", 1 / 4)))


if __name__ == "__main__":
    main()
