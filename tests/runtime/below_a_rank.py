"""A rank of two that starts processes, as evaluations and launchers are started, and notes what they were.

``child`` in the first argument: what it starts. It says what it is, and leaves what a rank would leave.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import PartialState

import hpc_ds
from hpc_ds.runtime import preemption
from hpc_ds.runtime.run import CurrentRun


def note() -> dict[str, object]:
    """What this process is, once it has met whoever it meets."""
    before = PartialState().num_processes
    me = hpc_ds.init_distributed(verbose=False)
    if me.source == "child":
        dist.destroy_process_group()
        assert hpc_ds.init_distributed(verbose=False) == me
    preemption.attend(me.rank, me.world_size)
    hears = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    return {
        "accelerate": before,
        "world": [me.rank, me.world_size, me.source],
        "in_the_run": CurrentRun.from_environment() is not None,
        "hears": hears,
    }


def run(command: list[str], **environ: str) -> list[dict[str, object]]:
    """What the processes of a command have noted."""
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def be_a_rank() -> dict[str, object]:
    child = [sys.executable, __file__, "child"]
    PartialState()  # which leaves variables of its own
    assert dist.get_world_size() == 2
    found: dict[str, object] = {"own": CurrentRun.from_environment() is not None}
    first = os.environ["RANK"] == "0"
    found["evaluation"] = run(child if first else ["sh", "-c", '"$@"; true', "sh", *child])
    if first:
        inner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone", *child[1:]]
        found["torchrun"] = run(inner)
        launch = [sys.executable, "-m", "hpc_ds", "run", "-q", "--num_gpus=2", "--no_local_rank", *child[1:]]
        found["hpcds run"] = sorted(run(launch), key=str)
    found["forked"] = forked()
    dist.barrier()
    return found


def forked() -> int:
    """A loader's worker, say: what it attends is nothing."""
    pid = os.fork()
    if pid == 0:
        preemption.attend(7, 8)
        os._exit(0 if CurrentRun.from_environment() is None else 3)
    return os.waitpid(pid, 0)[1]


if sys.argv[1] == "child":
    print(json.dumps(note()), flush=True)
else:
    found = be_a_rank()
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps({**found, "pid": os.getpid()}))
