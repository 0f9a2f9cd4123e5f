"""How long is a training step, next to DeepSpeed, FSDP2 and DDP?

    python benchmarks/step_time.py [--ranks 2] [--dtype bf16|fp32] [--rounds 5] [--steps 4] [--only NAME ...]

A GPT of 26 M parameters, micro-batch 4 x 64 tokens a rank, AdamW, clipping at 1, gloo, one thread a rank. Every
contestant runs in processes of its own, which wait while the others have their turn. Prints one JSON line a contestant
(median ms of a step, the loss after the last) and one with the ratios that are our goals. DeepSpeed must have been
installed for the tests (``python tests/install_deepspeed_peer.py``); without it, its lines are left out, and it says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "gpt"), str(REPOSITORY / "tests")]

STAGES = (0, 1, 2, 3)
NAMES = [
    "forward and backward", "DDP", "FSDP2 kept", "FSDP2 resharded",
    *(f"DeepSpeed {stage}" for stage in STAGES), *(f"hpc_ds {stage}" for stage in STAGES),
]  # fmt: skip
# goal, ours, peer, largest ratio
GOALS = [
    ("stage 0 / DDP", "hpc_ds 0", "DDP", 1.0),
    ("stage 1 / DeepSpeed", "hpc_ds 1", "DeepSpeed 1", 0.62),
    ("stage 2 / DeepSpeed", "hpc_ds 2", "DeepSpeed 2", 0.62),
    ("stage 3 / DeepSpeed", "hpc_ds 3", "DeepSpeed 3", 0.70),
    ("stage 1 / FSDP2 kept", "hpc_ds 1", "FSDP2 kept", 0.78),
    ("stage 2 / FSDP2 kept", "hpc_ds 2", "FSDP2 kept", 0.78),
]
RATE, CLIP, SAMPLES, CONTEXT = 1e-3, 1.0, 4, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.dtype)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    names = [name for name in NAMES if name in arguments.only]
    if not deepspeed_folder().exists():
        print("DeepSpeed is not installed for the tests: its lines are left out", file=sys.stderr)
        names = [name for name in names if not name.startswith("DeepSpeed")]
    taken: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="hpc_ds-step-time-") as folder:
        teams = {name: start(name, arguments, Path(folder)) for name in names}
        for name in names:
            ask(teams[name], 3)  # warm-up
        for _ in range(arguments.rounds):
            for name in names:
                times, losses[name] = ask(teams[name], arguments.steps)
                taken[name] += times
        for team in teams.values():
            for process in team:
                process.communicate(b"")
    ms = {name: round(statistics.median(times) * 1000, 1) for name, times in taken.items()}
    for name in names:
        line = {"contestant": name, "ranks": arguments.ranks, "dtype": arguments.dtype}
        print(json.dumps({**line, "step_ms": ms[name], "loss": round(losses[name], 5)}))
    ratios = {
        goal: [round(ms[own] / ms[peer], 3), limit] for goal, own, peer, limit in GOALS if {own, peer} <= ms.keys()
    }
    print(json.dumps({"ratios [measured, goal]": ratios}))


def deepspeed_folder() -> Path:
    from deepspeed_peer import FOLDER

    return FOLDER


def start(name: str, arguments: argparse.Namespace, folder: Path) -> list[subprocess.Popen[bytes]]:
    from deepspeed_peer import FOR_EVERY_RANK

    team = []
    for rank in range(arguments.ranks):
        path = [str(REPOSITORY), str(REPOSITORY / "examples" / "gpt"), str(REPOSITORY / "tests")]
        if name.startswith("DeepSpeed"):
            path.insert(0, str(deepspeed_folder()))
        environment = {
            **os.environ, **FOR_EVERY_RANK, "PYTHONPATH": os.pathsep.join(path), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(arguments.ranks), "LOCAL_SIZE": str(arguments.ranks),
            "STORE": str(folder / name.replace(" ", "-")),
        }  # fmt: skip
        command = [sys.executable, __file__, "--worker", name, "--dtype", arguments.dtype]
        with (folder / f"{name}-{rank}.log").open("wb") as log:
            team.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            )
    return team


def ask(team: list[subprocess.Popen[bytes]], steps: int) -> tuple[list[float], float]:
    """Let a team take some steps; what rank 0 measured, in seconds, and the loss after the last."""
    for process in team:
        process.stdin.write(f"{steps}\n".encode())  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    answers = []
    for process in team:
        for line in process.stdout:  # type: ignore[union-attr]
            if line.startswith(b"TIMES "):  # DeepSpeed prints to the same place
                answers.append(json.loads(line[6:]))
                break
        else:
            sys.exit(f"a contestant ended: {process.args}; run it alone to see why")
    return answers[0]["times"], answers[0]["loss"]


def work(name: str, dtype: str) -> None:
    import torch
    import torch.distributed as dist
    from model import GPT

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(os.environ["STORE"], world_size), rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    step = make_step(name, GPT(context=CONTEXT, width=512, layers=8, heads=8), dtype)
    torch.manual_seed(rank + 1)
    batch = torch.randint(256, (SAMPLES, CONTEXT + 1))
    for line in sys.stdin:
        times, loss = [], 0.0
        for _ in range(int(line)):
            dist.barrier()
            began = time.perf_counter()
            loss = step(batch)
            times.append(time.perf_counter() - began)
        print("TIMES " + json.dumps({"times": times, "loss": float(loss)}), flush=True)
    os._exit(0)


def make_step(name: str, model: Any, dtype: str) -> Any:
    """A function that takes one step on a batch and returns the loss."""
    if name.startswith("DeepSpeed"):
        import deepspeed

        return engine_step(deepspeed, model, dtype, int(name[-1]), {"zero_allow_untested_optimizer": True})
    if name.startswith("hpc_ds"):
        import hpc_ds

        return engine_step(hpc_ds, model, dtype, int(name[-1]), {})
    return plain_step(name, model, dtype)


def engine_step(library: Any, model: Any, dtype: str, stage: int, more: dict[str, Any]) -> Any:
    adam = {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.1, "torch_adam": True}}
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES, "gradient_clipping": CLIP, "optimizer": adam,
        "zero_optimization": {"stage": stage}, "bf16": {"enabled": dtype == "bf16"}, **more,
    }  # fmt: skip
    engine, *_ = library.initialize(model=model, model_parameters=list(model.parameters()), config=config)

    def step(batch: Any) -> Any:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def plain_step(name: str, model: Any, dtype: str) -> Any:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16" and name == "DDP")
    wrapped = model
    if name == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif name.startswith("FSDP2"):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bf16" else MixedPrecisionPolicy()
        for block in (*model.blocks, model):
            fully_shard(block, mp_policy=policy, reshard_after_forward=name == "FSDP2 resharded")
    elif dtype == "bf16":
        wrapped = model.bfloat16()
    optimizer = None if name == "forward and backward" else torch.optim.AdamW(wrapped.parameters(), RATE, fused=True)

    def step(batch: Any) -> Any:
        with autocast:
            loss = wrapped(batch)
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        else:
            model.zero_grad()
        return loss.detach()

    return step


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is not installed; use the environment of the tests")
    main()
