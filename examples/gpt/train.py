"""Train a byte-level GPT on the sources of Python's standard library.

There is nothing about clusters in here: the engine finds its ranks, its place in the data and its checkpoints, saves
when the job is told to stop, and goes on from there at the next start.

    hpcds submit examples/gpt/job.json --site local --follow
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
from pathlib import Path

import torch
from model import GPT

import hpc_ds


class Text(torch.utils.data.Dataset):
    """Windows of ``context + 1`` bytes of the standard library's sources."""

    def __init__(self, context: int, max_bytes: int) -> None:
        self.context = context
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:max_bytes]
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, number: int) -> torch.Tensor:
        start = number * self.context
        return self.bytes[start : start + self.context + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=4_000_000)
    hpc_ds.add_config_arguments(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(1)

    engine, _, loader, _ = hpc_ds.initialize(
        args=args,
        model=GPT(args.context, args.width, args.layers),
        training_data=Text(args.context, args.bytes),
    )
    engine.load_checkpoint()
    while engine.global_steps < args.steps:
        for text in loader:
            loss = engine(text.to(engine.device))
            engine.backward(loss)
            engine.step()
            if engine.global_steps >= args.steps:
                break
    engine.save_checkpoint()


if __name__ == "__main__":
    main()
