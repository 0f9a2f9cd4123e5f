"""Runs a script under the real DeepSpeed, on gloo processes of this machine: the peer that laws are compared with.

DeepSpeed stands in a folder of its own (``install_deepspeed_peer.py``) that only these processes see. A script is a file
with a function ``answer(payload)``, which every rank calls with the same JSON value and whose own answer is JSON; the
group is there when it is called, and `import deepspeed` works. Since a start costs seconds, a file asks for everything
that it wants to know in one payload, and the ranks are forks of one process that has imported it and used none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

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
        codes = _run(script, world_size, folder, timeout_s)
        if any(codes):
            told = [
                f"rank {rank}, exit code {code}:\n{(folder / f'rank-{rank}.log').read_text(errors='replace')[-6000:]}"
                for rank, code in enumerate(codes)
            ]
            raise AssertionError("the peer failed\n" + "\n".join(told))
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def _run(script: Path, world_size: int, folder: Path, timeout_s: float) -> list[int]:
    """Start the process that imports DeepSpeed and forks the ranks; their exit codes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    environment |= FOR_EVERY_RANK | {
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(REPOSITORY), str(REPOSITORY / "tests")]),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
    }
    with contextlib.ExitStack() as logs:
        # What is said before there are ranks stands in the log of the first.
        first, *_ = [logs.enter_context((folder / f"rank-{rank}.log").open("wb")) for rank in range(world_size)]
        command = [sys.executable, str(Path(__file__)), str(script), str(folder)]
        mother = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=first, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        mother.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(mother.pid, signal.SIGKILL)
        mother.wait()
    codes = folder / "codes.json"
    return json.loads(codes.read_text()) if codes.exists() else [mother.returncode or 1] * world_size


def _be_all(script: str, folder: Path) -> None:
    """Import what takes seconds, once, and fork the ranks; once one has failed, the others are stopped."""
    import deepspeed  # noqa: F401
    import torch

    torch.set_num_threads(1)
    ranks: dict[int, int] = {}
    for rank in range(int(os.environ["WORLD_SIZE"])):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            _be_rank(script, folder)
        ranks[pid] = rank
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[pid]]:
            for other, its_rank in ranks.items():
                if its_rank not in codes:
                    os.kill(other, signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps([codes[rank] for rank in sorted(codes)]))


def _be_rank(script: str, folder: Path) -> NoReturn:
    """One rank of the peer, in a process of its own."""
    import deepspeed
    import torch.distributed as dist

    try:
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
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, it is shown
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort now and then while the interpreter is taken down (pytorch #190489), and all is said.
    os._exit(code)


if __name__ == "__main__":
    _be_all(sys.argv[1], Path(sys.argv[2]))
