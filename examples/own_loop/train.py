"""A training loop of one's own, with torch alone, as a run of hpcds: told to stop, it saves, and goes on from there.

What it takes from hpc_ds: the process group, and once a step the question whether any rank was told to stop. Everything
else is plain torch: DistributedDataParallel, an optimizer, ``torch.save``.

    hpcds submit examples/own_loop/job.json --site local --follow
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import hpc_ds
from hpc_ds import preemption

SAMPLES, WIDTH = 32, 16  # of one rank's batch


def batch_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step, which is the same whenever it is asked for: a restart repeats none and leaves none out."""
    generator = torch.Generator().manual_seed(step * 10_007 + rank)
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
    return inputs, inputs.sin().sum(dim=1, keepdim=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint as a whole, so that being killed meanwhile leaves the old one. Rank 0 writes, all wait."""
    began = time.monotonic()
    if dist.get_rank() == 0:
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    dist.barrier()
    preemption.saved(state["step"], time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument(
        "--pause", type=float, default=0.05, help="seconds of sleep a step, so that there is time to look"
    )
    args = parser.parse_args()

    me = hpc_ds.init_distributed()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 1))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint = Path(os.environ.get("HPCDS_RUN_DIR", ".")) / "checkpoints" / "own_loop.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    while step < args.steps:
        inputs, wanted = batch_of(step, me.rank)
        loss = functional.mse_loss(parallel(inputs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        preemption.step(step, loss)  # status, plots, hang detection
        time.sleep(args.pause)
        stop = preemption.requested()  # on every rank: the answer is agreed
        if stop or step % args.save_every == 0 or step == args.steps:
            save(checkpoint, {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if stop and step < args.steps:
            raise hpc_ds.Preempted(f"saved step {step}")  # exit code 75: start me again


if __name__ == "__main__":
    main()
