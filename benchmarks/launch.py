"""How long it takes from the command until all ranks are in main() of a script that imports nothing: ours and its peers.

    python benchmarks/launch.py [--rounds 10] [--only local hosts]

local   Two ranks on this machine: `hpcds run`, `torchrun`, the real `deepspeed`.
hosts   One rank on each of two hosts, which are network namespaces with an sshd each (tests/hosts.py; needs root):
        `hpcds run` over ssh and over pdsh, `deepspeed` over pdsh, the one that it takes by itself.

All take turns in each round. Besides, the time until the command has ended, and the CPU time of it and of what it waits
for (not of what sshd starts), which other work on the machine disturbs less. Prints JSON lines: medians, then ratios with
their goals. DeepSpeed must have been installed for the tests (``python tests/install_deepspeed_peer.py``); without it, its
lines are left out, and it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from deepspeed_peer import FOLDER, FOREIGN_PREFIXES  # noqa: E402 - beside the tests
from hosts import Hosts, why_not  # noqa: E402 - beside the tests

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RANKS = 2
PATIENCE_S = 300.0
# os and time are there before any script begins, or built in.
SCRIPT = """\
import os, time
def main():
    now = time.time()
    with open(os.path.join(os.path.dirname(__file__), "in-main-" + os.environ["RANK"]), "w") as file:
        file.write(repr(now))
main()
"""
HPCDS = [sys.executable, "-m", "hpc_ds", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, f"{FOLDER}/bin/deepspeed"]
GOALS = {"deepspeed": 0.25, "torchrun": 0.5, "deepspeed, pdsh": 0.25}
OURS = {"deepspeed": "hpcds run", "torchrun": "hpcds run", "deepspeed, pdsh": "hpcds run, ssh"}


def environment(*first: Path) -> dict[str, str]:
    """Of every launcher: nothing of an outer job, one thread."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    known = {"DS_ACCELERATOR": "cpu"} if first else {}
    path = os.pathsep.join(str(entry) for entry in (*first, REPOSITORY))
    return {**inherited, **known, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def here(argv: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command on this machine."""
    return subprocess.Popen(
        argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def on_hosts(hosts: Hosts, folder: Path) -> Callable[[list[str], Mapping[str, str]], subprocess.Popen[bytes]]:
    """What starts a command on the first of the hosts; its folder is where DeepSpeed looks for variables to pass on."""

    def start(argv: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        words = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return hosts.start_on(0, argv, env, cwd=folder, **words)

    return start


def launch(start: Callable[..., subprocess.Popen[bytes]], argv: list[str], folder: Path) -> dict[str, float]:
    """Run a command; seconds until all its ranks were in main() and until its end, and CPU seconds."""
    script = folder / "script.py"
    for file in folder.glob("in-main-*"):
        file.unlink()
    env = environment(FOLDER) if argv[:2] == DEEPSPEED else environment()
    before, began = os.times(), time.time()
    command = start([*argv, str(script)], env)
    said, _ = command.communicate(timeout=PATIENCE_S)
    ended, after = time.time(), os.times()
    moments = [float(file.read_text()) for file in folder.glob("in-main-*")]
    if command.returncode or len(moments) != RANKS:
        raise SystemExit(f"{' '.join(argv)}: exit code {command.returncode}, {len(moments)} ranks\n{said.decode()}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"in_main_s": max(moments) - began, "end_s": ended - began, "cpu_s": cpu}


def local_commands() -> dict[str, list[str]]:
    """Two ranks on this machine."""
    deepspeed = {"deepspeed": [*DEEPSPEED, "--num_gpus", str(RANKS), "--master_addr", "127.0.0.1"]}
    return {
        "hpcds run": [*HPCDS, "--num_gpus", str(RANKS)],
        "torchrun": [*TORCHRUN, "--nproc-per-node", str(RANKS)],
        **(deepspeed if FOLDER.exists() else {}),
    }


def host_commands(hosts: Hosts, folder: Path) -> dict[str, list[str]]:
    """One rank on each of two hosts."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nCUDA_VISIBLE_DEVICES=\n")
    words = ["--hostfile", str(hostfile), "--master_addr", hosts.address(0)]
    deepspeed = {"deepspeed, pdsh": [*DEEPSPEED, *words, "--launcher", "pdsh"]}
    return {
        "hpcds run, ssh": [*HPCDS, *words, "--launcher", "ssh"],
        "hpcds run, pdsh": [*HPCDS, *words, "--launcher", "pdsh"],
        **(deepspeed if FOLDER.exists() else {}),
    }


def measure(commands: dict[str, list[str]], rounds: int, folder: Path, start: Callable[..., Any]) -> None:
    """Let the commands take turns, and print what came of it; the first round warms the disk and does not count."""
    (folder / "script.py").write_text(SCRIPT)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, argv in commands.items():
            seconds = launch(start, argv, folder)
            if number:
                found[name].append(seconds)
    medians = {
        name: {key: statistics.median(one[key] for one in those) for key in those[0]} for name, those in found.items()
    }
    for name, those in medians.items():
        print(json.dumps({"command": name, **{key: round(value, 3) for key, value in those.items()}, "rounds": rounds}))
    for peer, goal in GOALS.items():
        if peer in medians:
            ours = OURS[peer]
            ratios = {key: round(medians[ours][key] / value, 3) for key, value in medians[peer].items()}
            print(json.dumps({"ratio": f"{ours} / {peer}", **ratios, "goal_of_in_main_s": goal}))


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=("local", "hosts"), default=("local", "hosts"))
    given = parser.parse_args()
    if not FOLDER.exists():
        print(json.dumps({"deepspeed": None, "reason": f"{FOLDER}: not there; python tests/install_deepspeed_peer.py"}))
    with tempfile.TemporaryDirectory(prefix="hpc_ds-launch-") as name:
        folder = Path(name)
        if "local" in given.only:
            measure(local_commands(), given.rounds, folder, here)
        if "hosts" in given.only and (reason := why_not()):
            print(json.dumps({"hosts": None, "reason": reason}))
        elif "hosts" in given.only:
            (folder / "hosts").mkdir()
            with Hosts(folder / "hosts", RANKS) as hosts:
                measure(host_commands(hosts, folder), given.rounds, folder, on_hosts(hosts, folder))


if __name__ == "__main__":
    main()
