"""How fast a checkpoint is written and read, beside torch.distributed.checkpoint and the disk itself.

A GPT of about 100 M parameters with Adam's state, 1.2 GB in fp32, on two gloo ranks. In each round, in turn: a raw
O_DIRECT write of the same bytes (the limit), our synchronous save, our asynchronous one, and DCP's save with files
flushed; then both loads, with nothing of the files in the page cache. All that we write is durable and checksummed.
Prints JSON lines: one a round, then the medians with their ratios.

    python benchmarks/checkpoint.py [--rounds 5] [--folder .] [--layers 11]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hpc_ds.checkpoint import reader, shards, writer
from hpc_ds.checkpoint.background import Background
from hpc_ds.checkpoint.blocks import LANES, Aligned, write_all

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD_SIZE = 2
RAW_BYTES = 8 << 20  # of one raw write


def gpt(layers: int, width: int = 768, vocabulary: int = 32768) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of a GPT."""
    shapes: dict[str, tuple[int, ...]] = {"tokens": (vocabulary, width), "positions": (1024, width)}
    for layer in range(layers):
        block = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
        for name, (rows, columns) in block.items():
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        shapes |= {f"{layer}.{name}.{key}": (width,) for name in ("norm1", "norm2") for key in ("weight", "bias")}
    return shapes


def training_state(layers: int) -> dict[str, DTensor]:
    """Parameters and Adam's two moments of them, sharded over the ranks."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    made = {}
    for name, shape in gpt(layers).items():
        for prefix in ("model", "exp_avg", "exp_avg_sq"):
            made[f"{prefix}.{name}"] = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
    return made


def as_shards(state: dict[str, DTensor]) -> list[shards.Shard]:
    found = []
    for name, tensor in state.items():
        row = tensor.numel() // tensor.shape[0]
        start = min(tensor.shape[0], dist.get_rank() * -(-tensor.shape[0] // WORLD_SIZE))
        found.append(shards.Shard(name, tuple(tensor.shape), start * row, tensor.to_local().view(-1)))
    return found


def content(state: dict[str, DTensor], step: int) -> writer.Content:
    return writer.Content(as_shards(state), {"rank": dist.get_rank()}, {"step": step}, {}, step)


def raw_write(path: Path, size: int, buffers: list[Aligned]) -> None:
    """As many bytes as a rank has, from memory that is ready, in as many threads as we use."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    count = size // RAW_BYTES

    def lane(number: int) -> None:
        for block in range(number, count, LANES):
            write_all(descriptor, buffers[number].view, block * RAW_BYTES)

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(descriptor)
    os.close(descriptor)


def timed(do: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    do()
    dist.barrier()
    return time.perf_counter() - began


def extra_memory(do: Callable[[], Any]) -> int:
    """How many bytes the peak of this process was above what it had before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _memory("VmRSS")
    do()
    return max(0, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget(folder: Path) -> None:
    """Take files out of the page cache, so that a load reads the disk."""
    if dist.get_rank() == 0:
        os.sync()
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
    dist.barrier()


def ours_loads(state: dict[str, DTensor], folder: Path) -> None:
    loaded = reader.load(folder, "sync", lambda _stored: as_shards(state))
    if loaded is None:
        raise SystemExit("nothing was loaded")


def one_round(state: dict[str, DTensor], folder: Path, saves: Background, number: int) -> dict[str, float]:
    """Everything once. Collective."""
    size = sum(shard.data.nbytes for shard in as_shards(state))
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    buffers = [Aligned(RAW_BYTES) for _ in range(LANES)]
    for buffer in buffers:
        buffer.view[:] = os.urandom(4096) * (RAW_BYTES // 4096)
    raw_s = timed(lambda: raw_write(folder / f"raw-{dist.get_rank()}", size, buffers))
    memory = [0, 0]
    seconds = {"raw_s": raw_s}

    def save_sync() -> None:
        memory[0] = extra_memory(lambda: writer.save(folder / "ours", "sync", content(state, number)))

    seconds["sync_s"] = timed(save_sync)
    began = time.perf_counter()
    memory[1] = extra_memory(
        lambda: seconds.update(stall_s=timed(lambda: saves.start(folder / "ours", "async", content(state, number))))
    )
    saves.wait()
    seconds["async_s"] = time.perf_counter() - began
    plan = FileSystemWriter(folder / "dcp", sync_files=True)
    seconds["dcp_s"] = timed(lambda: dcp.save(dict(state), storage_writer=plan))
    forget(folder)
    seconds["load_s"] = timed(lambda: ours_loads(state, folder / "ours"))
    forget(folder)
    seconds["dcp_load_s"] = timed(lambda: dcp.load(dict(state), checkpoint_id=folder / "dcp"))
    return {**seconds, "sync_extra": memory[0] / size, "async_extra": memory[1] / size}


def be_rank(rank: int, store: str, folder: str, rounds: int, layers: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD_SIZE), rank=rank, world_size=WORLD_SIZE)
    state, saves = training_state(layers), Background()
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = sum(shard.data.nbytes for shard in as_shards(state))
    saves.reserve(as_shards(state))
    found = []
    for number in range(rounds):
        found.append(one_round(state, Path(folder) / "round", saves, number))
        found[-1]["async_extra"] += saves.held_bytes / size
        if rank == 0:
            print(
                json.dumps({"round": number, "bytes": total, **{key: round(v, 4) for key, v in found[-1].items()}}),
                flush=True,
            )
    if rank == 0:
        print(json.dumps(summary(found, total)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def summary(found: list[dict[str, float]], total: int) -> dict[str, Any]:
    """Medians; ratios are medians of the ratios of each round, whose parts ran one after another."""
    rates = {
        key: statistics.median(total / 1e6 / each[key] for each in found) for key in found[0] if key.endswith("_s")
    }

    def ratio(of: str, to: str) -> float:
        return round(statistics.median(each[of] / each[to] for each in found), 3)

    return {
        "mb_per_s": {key.removesuffix("_s"): round(rate) for key, rate in rates.items() if key != "stall_s"},
        "stall_s": round(statistics.median(each["stall_s"] for each in found), 3),
        "sync_to_raw_limit": ratio("raw_s", "sync_s"),
        "sync_to_dcp": ratio("dcp_s", "sync_s"),
        "async_to_dcp": ratio("dcp_s", "async_s"),
        "stall_to_dcp_save": ratio("stall_s", "dcp_s"),
        "load_to_dcp_load": ratio("dcp_load_s", "load_s"),
        "sync_extra_memory_to_shard": round(max(each["sync_extra"] for each in found), 3),
        "async_extra_memory_to_shard": round(max(each["async_extra"] for each in found), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--layers", type=int, default=11)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="checkpoint-benchmark-") as folder:
        context = multiprocessing.get_context("spawn")
        args = (f"{folder}/store", folder, given.rounds, given.layers)
        ranks = [context.Process(target=be_rank, args=(rank, *args)) for rank in range(WORLD_SIZE)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
