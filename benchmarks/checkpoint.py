"""How fast a checkpoint is written and read, beside torch.distributed.checkpoint, DeepSpeed and the disk itself.

A GPT of about 100 M parameters with Adam's state, 1.2 GB in fp32, on two gloo ranks. In each round, in turn: a raw
O_DIRECT write of the same bytes (the limit), our synchronous save, our asynchronous one, DCP's save with files flushed,
and DeepSpeed's save_checkpoint (stage 2), whose ranks are processes of their own that wait meanwhile; then all loads, with
nothing of the files in the page cache. All that we write is durable and checksummed; what DeepSpeed writes is not.

The stall is measured twice: for how long the call holds the training, and by how much longer the same training steps take
with a save around them, which also counts the copies and writes that go on behind them. A step here is made of
multiplications on every core and a small all-reduce; they last as long as the save does.

Rates count the bytes of the training state, also where more is written. Prints JSON lines, one a round, then the medians
with their ratios, and the tables of docs/benchmarks.md. DeepSpeed must have been installed for the tests
(``python tests/install_deepspeed_peer.py``); without it, its lines are left out, and it says so.

    python benchmarks/checkpoint.py [--rounds 5] [--folder .] [--layers 11] [--deepspeed FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
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

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from hpc_ds.checkpoint import reader, shards, writer  # noqa: E402 - of this checkout
from hpc_ds.checkpoint.background import Background  # noqa: E402
from hpc_ds.checkpoint.blocks import LANES, Aligned, write_all  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD_SIZE = 2
RAW_BYTES = 8 << 20  # of one raw write
STEP = (192, 1024, 12)  # of a training step: rows, columns, multiplications
ANSWER = "ANSWER "  # DeepSpeed prints to the same place
ROWS = [
    ("raw", "raw O_DIRECT write of the same bytes"),
    ("sync", "our save, synchronous"),
    ("async", "our save, asynchronous, from start to durable"),
    ("dcp", "DCP's save, files flushed"),
    ("deepspeed", "DeepSpeed's save, not durable"),
    ("deepspeed_durable", "DeepSpeed's save, and a sync of the disk after it"),
    ("load", "our load, verified, nothing in the page cache"),
    ("dcp_load", "DCP's load, likewise"),
    ("deepspeed_load", "DeepSpeed's load, likewise"),
]
RATIOS = [
    ("sync_to_raw_limit", "synchronous save / raw write", "at least 0.75"),
    ("sync_to_dcp", "synchronous save / DCP's", "at least 2.5"),
    ("sync_to_deepspeed", "synchronous save / DeepSpeed's, which is not durable", ""),
    ("load_to_dcp_load", "load / DCP's", "at least 1"),
    ("load_to_deepspeed_load", "load / DeepSpeed's", ""),
    ("stall_to_dcp_save", "time that an asynchronous save holds the training / DCP's save", "at most 0.10"),
    ("stolen_to_dcp_save", "time that the steps around it take longer, in all / DCP's save", ""),
    ("sync_extra_memory_to_shard", "extra memory of a synchronous save, of the rank's shard", "at most 1"),
    ("async_extra_memory_to_shard", "of an asynchronous one", "at most 1"),
]


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


def content(found: list[shards.Shard], step: int) -> writer.Content:
    return writer.Content(found, {"rank": dist.get_rank()}, {"step": step}, {}, step)


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


def ours_loads(found: list[shards.Shard], folder: Path) -> None:
    loaded = reader.load(folder, "sync", lambda _stored: found)
    if loaded is None:
        raise SystemExit("nothing was loaded")


class Training:
    """Steps of a training that knows nothing of the state that is saved. Collective."""

    def __init__(self) -> None:
        rows, columns, self._times = STEP
        self._batch = torch.randn(rows, columns)
        self._weight = torch.randn(columns, columns) / columns**0.5
        self._norm = torch.zeros(1)

    def steps(self, count: int) -> None:
        """Take some."""
        for _ in range(count):
            for _ in range(self._times):
                torch.mm(self._batch, self._weight)
            dist.all_reduce(self._norm)

    def count_for(self, seconds: float) -> int:
        """How many steps last that long, by rank 0's clock; the same on every rank."""
        self.steps(2)
        count = torch.tensor([max(1, round(4 * seconds / timed(lambda: self.steps(4))))])
        dist.broadcast(count, 0)
        return int(count)


class DeepSpeed:
    """The ranks of the peer, in processes of their own; for rank 0."""

    def __init__(self, home: Path, folder: Path, layers: int) -> None:
        from deepspeed_peer import FOR_EVERY_RANK, FOREIGN_PREFIXES

        inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
        self._folder = folder
        self._ranks = []
        for rank in range(WORLD_SIZE):
            environment = {
                **inherited, **FOR_EVERY_RANK, "PYTHONPATH": f"{home}{os.pathsep}{REPOSITORY}", "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_SIZE": str(WORLD_SIZE),
                "STORE": str(folder / "deepspeed-store"),
            }  # fmt: skip
            command = [
                sys.executable,
                __file__,
                "--worker",
                str(folder / "round" / "deepspeed"),
                "--layers",
                str(layers),
            ]
            with (folder / f"deepspeed-{rank}.log").open("wb") as log:
                self._ranks.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                    )
                )
        self.ask("ready")

    def ask(self, what: str) -> None:
        """Let all ranks do it, and wait for the last."""
        for rank in self._ranks:
            rank.stdin.write(f"{what}\n")  # type: ignore[union-attr]
            rank.stdin.flush()  # type: ignore[union-attr]
        for number, rank in enumerate(self._ranks):
            if not any(line.startswith(ANSWER) for line in iter(rank.stdout.readline, "")):  # type: ignore[union-attr]
                log = self._folder / f"deepspeed-{number}.log"
                raise SystemExit(f"DeepSpeed's rank {number} ended:\n{log.read_text(errors='replace')[-4000:]}")

    def end(self) -> None:
        """Let them end."""
        for rank in self._ranks:
            rank.communicate("")


def be_deepspeed(folder: str, layers: int) -> None:
    """One rank of the peer: the same parameters under DeepSpeed's engine."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile itself
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.environ["STORE"], WORLD_SIZE),
        rank=int(os.environ["RANK"]),
        world_size=WORLD_SIZE,
    )
    engine = deepspeed.initialize(
        model=Parameters(layers),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )[0]
    engine.backward(engine())
    engine.step()  # now there is optimizer state
    do = {
        "save": lambda: engine.save_checkpoint(folder, tag="it"),
        "load": lambda: engine.load_checkpoint(folder, tag="it"),
    }
    for line in sys.stdin:
        do.get(line.strip(), lambda: None)()
        print(ANSWER, flush=True)
    os._exit(0)


class Parameters(torch.nn.Module):
    """The parameters of the GPT, and a loss that all of them have a part in."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.ParameterList(torch.randn(shape) for shape in gpt(layers).values())

    def forward(self) -> torch.Tensor:
        """The loss."""
        return torch.stack([parameter.square().mean() for parameter in self.all]).sum()


def deepspeed_saves(peer: DeepSpeed | None, folder: Path) -> dict[str, float]:
    """Its save, and how long it takes until that is on the disk too. Collective; for rank 0 to do."""
    seconds = {"deepspeed_s": timed(lambda: peer.ask("save") if peer else None)}
    seconds["deepspeed_durable_s"] = seconds["deepspeed_s"] + timed(lambda: os.sync() if peer else None)
    forget(folder)
    seconds["deepspeed_load_s"] = timed(lambda: peer.ask("load") if peer else None)
    return seconds


def stolen(training: Training, found: list[shards.Shard], folder: Path, saves: Background, save_s: float) -> float:
    """By how many seconds training steps take longer with an asynchronous save among them. Collective."""
    count = training.count_for(2 * save_s)
    alone = timed(lambda: training.steps(count))

    def with_save() -> None:
        saves.start(folder / "ours", "stolen", content(found, 0))
        training.steps(count)

    together = timed(with_save)
    saves.wait()
    alone = (alone + timed(lambda: training.steps(count))) / 2
    return together - alone


def one_round(
    found: list[shards.Shard], state: dict[str, DTensor], folder: Path, saves: Background, number: int
) -> dict[str, float]:
    """Everything of ours and of DCP's once. Collective."""
    size = sum(shard.data.nbytes for shard in found)
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
        memory[0] = extra_memory(lambda: writer.save(folder / "ours", "sync", content(found, number)))

    seconds["sync_s"] = timed(save_sync)
    began = time.perf_counter()
    memory[1] = extra_memory(
        lambda: seconds.update(stall_s=timed(lambda: saves.start(folder / "ours", "async", content(found, number))))
    )
    saves.wait()
    seconds["async_s"] = time.perf_counter() - began
    seconds["stolen_s"] = stolen(Training(), found, folder, saves, seconds["async_s"])
    plan = FileSystemWriter(folder / "dcp", sync_files=True)
    seconds["dcp_s"] = timed(lambda: dcp.save(dict(state), storage_writer=plan))
    forget(folder)
    seconds["load_s"] = timed(lambda: ours_loads(found, folder / "ours"))
    forget(folder)
    seconds["dcp_load_s"] = timed(lambda: dcp.load(dict(state), checkpoint_id=folder / "dcp"))
    return {**seconds, "sync_extra": memory[0] / size, "async_extra": memory[1] / size}


def be_rank(rank: int, store: str, folder: str, rounds: int, layers: int, deepspeed: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD_SIZE), rank=rank, world_size=WORLD_SIZE)
    state, saves = training_state(layers), Background()
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    parts = as_shards(state)  # once, as an engine has them: taking a DTensor apart is no part of a save
    size = sum(shard.data.nbytes for shard in parts)
    saves.reserve(parts)
    peer = DeepSpeed(deepspeed, Path(folder), layers) if deepspeed and rank == 0 else None
    found: list[dict[str, float]] = []
    for number in range(rounds):
        found.append(one_round(parts, state, Path(folder) / "round", saves, number))
        found[-1]["async_extra"] += saves.held_bytes / size
        if deepspeed:
            found[-1] |= deepspeed_saves(peer, Path(folder) / "round")
        if rank == 0:
            print(
                json.dumps({"round": number, "bytes": total, **{key: round(v, 4) for key, v in found[-1].items()}}),
                flush=True,
            )
    if rank == 0:
        told = summary(found, total)
        print(json.dumps(told), flush=True)
        print(tables(told), flush=True)
    if peer:
        peer.end()
    dist.barrier()
    dist.destroy_process_group()


def summary(found: list[dict[str, float]], total: int) -> dict[str, Any]:
    """Medians; ratios are medians of the ratios of each round, whose parts ran one after another."""
    rates = {
        key: statistics.median(total / 1e6 / each[key] for each in found)
        for key in found[0]
        if key.endswith("_s") and key not in {"stall_s", "stolen_s"}
    }

    def ratio(of: str, to: str) -> float:
        return round(statistics.median(each[of] / each[to] for each in found), 3)

    deepspeed = (
        {
            "sync_to_deepspeed": ratio("deepspeed_s", "sync_s"),
            "load_to_deepspeed_load": ratio("deepspeed_load_s", "load_s"),
        }
        if "deepspeed_s" in found[0]
        else {}
    )
    return {
        "mb_per_s": {key.removesuffix("_s"): round(rate) for key, rate in rates.items()},
        "stall_s": round(statistics.median(each["stall_s"] for each in found), 3),
        "stolen_s": round(statistics.median(each["stolen_s"] for each in found), 3),
        "sync_to_raw_limit": ratio("raw_s", "sync_s"),
        "sync_to_dcp": ratio("dcp_s", "sync_s"),
        "async_to_dcp": ratio("dcp_s", "async_s"),
        "stall_to_dcp_save": ratio("stall_s", "dcp_s"),
        "stolen_to_dcp_save": ratio("stolen_s", "dcp_s"),
        **deepspeed,
        "load_to_dcp_load": ratio("dcp_load_s", "load_s"),
        "sync_extra_memory_to_shard": round(max(each["sync_extra"] for each in found), 3),
        "async_extra_memory_to_shard": round(max(each["async_extra"] for each in found), 3),
    }


def tables(told: dict[str, Any]) -> str:
    """What docs/benchmarks.md has of it."""
    lines = ["", "| what | MB/s |", "|---|---|"]
    lines += [f"| {words} | {told['mb_per_s'][key]} |" for key, words in ROWS if key in told["mb_per_s"]]
    lines += ["", "| ratio | measured | goal |", "|---|---|---|"]
    lines += [f"| {words} | {round(told[key], 2)} | {goal} |" for key, words, goal in RATIOS if key in told]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--deepspeed", type=Path, default=None, help="its folder; default: where the tests have it")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        be_deepspeed(given.worker, given.layers)
        return
    deepspeed = deepspeed_folder(given.deepspeed)
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="checkpoint-benchmark-") as folder:
        context = multiprocessing.get_context("spawn")
        args = (f"{folder}/store", folder, given.rounds, given.layers, deepspeed)
        ranks = [context.Process(target=be_rank, args=(rank, *args)) for rank in range(WORLD_SIZE)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")


def deepspeed_folder(given: Path | None) -> Path | None:
    """Where the peer stands; None where it was not installed."""
    from deepspeed_peer import FOLDER

    folder = given or FOLDER
    if not (folder / "deepspeed").is_dir():
        print(f"{folder}: DeepSpeed is not installed for the tests; its lines are left out", file=sys.stderr)
        return None
    return folder


if __name__ == "__main__":
    main()
