"""A small training program whose pace a test sets: quick up to a step, then slow, so that what a test does finds it busy.

Only the first attempts are slow, until there is a file "hurry" in the run folder; pace changes no number. Each rank writes
which samples it trained in which step, so that a test can see that none was left out and none taken twice.

    hpcds submit tests/paced.py -- --steps 40 --slow-from 10
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

ATTEMPT = int(os.environ.get("HPCDS_ATTEMPT", "1"))
RUN_DIR = Path(os.environ.get("HPCDS_RUN_DIR", "."))
CONFIG = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--slow-from", type=int, default=10, help="step after which a slow attempt sleeps at each step")
    parser.add_argument("--slow-s", type=float, default=0.0)
    parser.add_argument("--slow-attempts", type=int, default=1, help="the first attempts, which are slow")
    parser.add_argument(
        "--slow-start", type=int, default=0, help="the attempt that sleeps for a minute before it begins"
    )
    parser.add_argument("--slow-disk-s", type=float, default=0.0, help="what each flush takes more, in a slow attempt")
    parser.add_argument("--crash-at", type=int, help="step at which rank 1 raises, in every attempt")
    parser.add_argument("--greedy-at", type=int, help="step at which rank 1 runs out of memory, in a slow attempt")
    return parser.parse_args()


def slow_disk(seconds: float) -> None:
    """From now on each flush of this process takes so much longer."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(seconds)
        flush(descriptor)

    os.fsync = fsync


def run_out_of_memory() -> None:
    """Ask for more than the limit that is set first: 64 MiB above what is in use."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20), resource.RLIM_INFINITY))
    bytearray(1 << 30)


class Pace:
    """What happens around each step, as the command line says."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self._args = args
        self._rank = rank
        self._slow = args.slow_attempts >= ATTEMPT
        self._trained = (RUN_DIR / f"samples-{rank}.jsonl").open("a")
        if self._slow and args.slow_disk_s:
            slow_disk(args.slow_disk_s)

    def before(self, step: int, numbers: list[int]) -> None:
        """Before the forward pass of a micro-batch."""
        if self._rank == 1 and step == self._args.crash_at:
            raise ValueError(f"step {step} is one too many")
        if self._rank == 1 and step == self._args.greedy_at and self._slow:
            run_out_of_memory()
        self._trained.write(json.dumps({"attempt": ATTEMPT, "step": step, "samples": numbers}) + "\n")
        self._trained.flush()

    def after(self, step: int) -> None:
        """After an optimizer step."""
        if self._slow and step >= self._args.slow_from and not (RUN_DIR / "hurry").exists():
            time.sleep(self._args.slow_s)


def main() -> None:
    args = arguments()
    if args.slow_start == ATTEMPT:
        time.sleep(60)  # before anything listens to signals
    import torch
    from paced_model import Model, Samples

    import hpc_ds

    torch.manual_seed(1)
    engine, _, loader, _ = hpc_ds.initialize(model=Model(), training_data=Samples(), config=CONFIG)
    rank = torch.distributed.get_rank()
    torch.manual_seed(100 + rank)
    engine.load_checkpoint()
    pace = Pace(args, rank)
    while engine.global_steps < args.steps:
        for numbers, vectors in loader:
            before = engine.global_steps
            pace.before(before + 1, numbers.tolist())
            engine.backward(engine(vectors))
            engine.step()
            if engine.global_steps > before:
                pace.after(engine.global_steps)
            if engine.global_steps >= args.steps:
                break
    engine.save_checkpoint()


if __name__ == "__main__":
    main()
