"""Runs a script under the real DeepSpeed, on gloo processes of this machine: the peer that laws are compared with.

DeepSpeed stands in a folder of its own (``install_deepspeed_peer.py``) that only these processes see. A script is a file
with a function ``answer(payload)``, which every rank calls with the same JSON value and whose own answer is JSON; the
group is there when it is called, and `import deepspeed` works. Since a start costs seconds, a file asks for everything
that it wants to know in one payload.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
VERSION = "0.19.8"
FOLDER = REPOSITORY / ".deepspeed" / f"{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"

# What an outer job or launcher says must not reach the peer, nor may it look for MPI or a GPU.
FOREIGN_PREFIXES = ("SLURM_", "SBATCH_", "PMI", "OMPI_", "HPCDS_", "DS_", "PYTHON")
FOR_EVERY_RANK = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",  # asked for, and not used: the processes meet in a file
    "TORCHDYNAMO_DISABLE": "1",  # some of its functions compile themselves
}


def run_deepspeed(script: Path, world_size: int, payload: Any, timeout_s: float = 400.0) -> list[Any]:
    """What ``answer(payload)`` of the script returns under DeepSpeed, by rank.

    A rank that fails, hangs or dies fails the caller, with what all of them have said.
    """
    assert FOLDER.exists(), f"{FOLDER}: the real DeepSpeed is not there; run python tests/install_deepspeed_peer.py"
    with tempfile.TemporaryDirectory(prefix="hpc_ds-deepspeed-") as name:
        folder = Path(name)
        (folder / "payload.json").write_text(json.dumps(payload), encoding="utf-8")
        ranks = [_start(script, rank, world_size, folder) for rank in range(world_size)]
        codes = _wait(ranks, timeout_s)
        if any(codes):
            said = [(folder / f"rank-{rank}.log").read_text(errors="replace")[-6000:] for rank in range(world_size)]
            told = [
                f"rank {rank}, exit code {code}:\n{text}"
                for rank, (code, text) in enumerate(zip(codes, said, strict=True))
            ]
            raise AssertionError("the peer failed\n" + "\n".join(told))
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def _start(script: Path, rank: int, world_size: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    environment |= FOR_EVERY_RANK | {
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(REPOSITORY), str(REPOSITORY / "tests")]),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
    }
    with (folder / f"rank-{rank}.log").open("wb") as log:
        command = [sys.executable, str(Path(__file__)), str(script), str(folder)]
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """The exit codes; once one has failed, the others are stopped."""
    deadline = time.monotonic() + timeout_s
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() > deadline or any(rank.returncode for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    return [rank.returncode for rank in ranks]


def _be_rank(script: str, folder: Path) -> None:
    """One rank of the peer, in a process of its own."""
    import runpy

    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Its CPU backend would compile an all-reduce over shared memory for itself, inside of init_distributed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        verbose=False,
    )
    payload = json.loads((folder / "payload.json").read_text(encoding="utf-8"))
    value = runpy.run_path(script)["answer"](payload)
    (folder / f"rank-{rank}.json").write_text(json.dumps(value), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort now and then while the interpreter is taken down (pytorch #190489), and all is said.
    os._exit(0)


if __name__ == "__main__":
    _be_rank(sys.argv[1], Path(sys.argv[2]))
