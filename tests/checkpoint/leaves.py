"""A script that ends while a save is being written behind it: ``leaves.py HOW``. No byte is written before it has ended."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch

import hpc_ds
from hpc_ds.checkpoint import background, blocks


def late(descriptor: int, data: memoryview, offset: int) -> int:
    threading.main_thread().join()
    return write(descriptor, data, offset)


class Workers(torch.utils.data.Dataset):
    """Says in which process each sample was made."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def main(how: str) -> None:
    engine = hpc_ds.initialize(model=torch.nn.Linear(64, 3))[0]
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 64)).mean())
        engine.step()
    Path(f"{os.environ['HPCDS_RUN_DIR']}/state-{engine.global_rank}").write_text(engine._checkpoints._background.poll())
    if how == "workers":
        makers = {int(pid) for batch in torch.utils.data.DataLoader(Workers(), 4, num_workers=2) for pid in batch}
        if os.getpid() in makers or len(makers) != 2:
            raise RuntimeError(f"samples were made by {makers}")
    if engine.global_rank == 1 and how == "raises":
        raise RuntimeError("a fault of the script")
    if engine.global_rank == 1 and how == "is killed":
        os.kill(os.getpid(), 9)
    if how in {"raises", "is killed"}:
        engine.backward(engine(torch.ones(1, 64)).mean())
        engine.step()


write, blocks.os.pwrite = blocks.os.pwrite, late
if sys.argv[1] == "is killed":
    background.Background.__init__.__defaults__ = (600.0, 1.0)  # type: ignore[attr-defined] # patience is a minute
main(sys.argv[1])
