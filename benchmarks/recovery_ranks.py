"""What the ranks of benchmarks/recovery.py run: the same small training, three ways.

    ours        under hpc_ds, as a user would write it
    deepspeed   under DeepSpeed, with a save every so many steps: the usual practice
    bare        the least that a resume can do: torch, a process group, one file read, one step

A GPT of 5 M parameters in fp32 under Adam, so 58 MB of state; a step takes about a tenth of a second on one core a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "gpt"))

from model import GPT

CONTEXT, SAMPLES, RATE = 64, 4, 1e-3
PROBE_AT = 8  # steps after a start, then one synchronous save is timed
PROBE = "probe"


def model() -> GPT:
    torch.manual_seed(1)
    return GPT(context=CONTEXT, width=256, layers=6, heads=8)


def data() -> TensorDataset:
    text = torch.randint(256, (50_000, CONTEXT + 1), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return TensorDataset(text)


def config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }


class Log:
    """Lines of rank 0: every step, with the time at its end."""

    def __init__(self, path: str) -> None:
        self._path = path if os.environ.get("RANK", "0") == "0" else ""

    def step(self, number: int) -> None:
        """Add one."""
        if self._path:
            with open(self._path, "a", encoding="utf-8") as file:  # noqa: PTH123 - as scripts do it
                line = {"event": "step", "step": number, "time": time.time(), "cpu_s": time.process_time()}
                file.write(json.dumps(line) + "\n")


def ours(given: argparse.Namespace) -> None:
    """The engine tells the run of its steps, and saves when it is told to stop."""
    import hpc_ds

    engine, _, loader, _ = hpc_ds.initialize(model=model(), training_data=data(), config=config())
    engine.load_checkpoint()
    probe_at, log = engine.global_steps + PROBE_AT, Log(given.log)
    while True:
        for (text,) in loader:
            loss = engine(text)
            engine.backward(loss)
            engine.step()
            log.step(engine.global_steps)
            if given.folder and engine.global_steps == probe_at:
                engine.save_checkpoint(given.folder, tag=PROBE, save_latest=False)


def deepspeed(given: argparse.Namespace) -> None:
    """The usual script: load the last checkpoint, train, save now and then."""
    import deepspeed as library

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile itself
    library.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=world_size,
        verbose=False,
    )  # fmt: skip
    net = model()
    engine = library.initialize(
        model=net, model_parameters=list(net.parameters()), config={**config(), "zero_allow_untested_optimizer": True}
    )[0]
    if Path(given.folder, "latest").exists():
        engine.load_checkpoint(given.folder)
    log, dataset = Log(given.log), data()
    loader: DataLoader[Any] = DataLoader(dataset, SAMPLES, sampler=DistributedSampler(dataset, world_size, rank))
    while True:
        for (text,) in loader:
            loss = engine(text)
            engine.backward(loss)
            engine.step()
            log.step(engine.global_steps)
            if engine.global_steps % given.every == 0:
                engine.save_checkpoint(given.folder)
            if given.steps and engine.global_steps >= given.steps:
                return


def bare(given: argparse.Namespace) -> None:
    """A resume with nothing around it: the whole state from one file, gradients summed in one collective."""
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=world_size)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, fused=True)
    path = Path(given.folder, "state.pt")
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    (text,) = data()[:SAMPLES]
    net(text).backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape) / world_size)
    optimizer.step()
    Log(given.log).step(1)
    if not path.exists() and rank == 0:
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=["ours", "deepspeed", "bare"])
    parser.add_argument("--folder", default="", help="of checkpoints; ours: of the synchronous save that is timed")
    parser.add_argument("--log", default="")
    parser.add_argument("--every", type=int, default=20, help="steps between DeepSpeed's saves")
    parser.add_argument("--steps", type=int, default=0, help="after which DeepSpeed's training ends")
    given = parser.parse_args()
    torch.set_num_threads(1)
    {"ours": ours, "deepspeed": deepspeed, "bare": bare}[given.who](given)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort now and then while the interpreter is taken down (pytorch #190489)


if __name__ == "__main__":
    main()
