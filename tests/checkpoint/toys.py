"""What the tests of this room share: small checkpoints whose values tell the step, and looks at what came back."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.checkpoint import reader, writer
from hpc_ds.checkpoint.shards import Shard, own_share
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHAPES: dict[str, tuple[int, ...]] = {"model.long": (1237,), "model.wide": (2, 3), "model.one": ()}


def values(name: str, step: int) -> torch.Tensor:
    """The tensor of that name in the checkpoint of a step."""
    shape = SHAPES[name]
    count = int(torch.Size(shape).numel())
    return (torch.arange(count, dtype=torch.float32) + 1000 * step + len(name)).reshape(shape)


def content_of(step: int, rank: int, world_size: int, **overrides: Any) -> writer.Content:
    """What a rank writes at a step; all values follow from the step."""
    return writer.Content(
        **{
            "shards": [own_share(name, values(name, step), rank, world_size) for name in SHAPES],
            "rank_state": {"rank": rank, "step": step, "noise": torch.full((2,), step)},
            "client_state": {"step": step, "history": torch.full((3,), float(step))},
            "state": {"global_steps": step},
            "step": step,
            **overrides,
        }
    )


def content(step: int, **overrides: Any) -> writer.Content:
    """The same, for this rank."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return content_of(step, rank, world_size, **overrides)


def save(folder: Path, step: int, tag: str | None = None, **options: Any) -> Path:
    return writer.save(folder, tag or f"step{step}", content(step), **options)


def save_as(world_size: int, folder: Path, step: int, tag: str | None = None, **overrides: Any) -> Path:
    """A checkpoint of so many ranks, written by this process."""
    contents = (content_of(step, rank, world_size, **overrides) for rank in range(world_size))
    return writer.save_in_turn(folder, tag or f"step{step}", contents, world_size)


def load(folder: Path, tag: str | None = None) -> tuple[str, int] | None:
    """The tag and the step that come back, after a look at everything that was saved. Collective."""
    found = {name: torch.full((int(torch.Size(shape).numel()),), -1.0) for name, shape in SHAPES.items()}
    wanted = [Shard(name, SHAPES[name], 0, data) for name, data in found.items()]
    loaded = reader.load(folder, tag, lambda _stored: wanted)
    if loaded is None:
        return None
    step = loaded.stored.step
    for name, data in found.items():
        assert torch.equal(data.reshape(SHAPES[name]), values(name, step)), name
    assert loaded.client_state["step"] == step
    assert torch.equal(loaded.client_state["history"], torch.full((3,), float(step)))
    if loaded.rank_state is not None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        assert (loaded.rank_state["rank"], loaded.rank_state["step"]) == (rank, step)
        assert torch.equal(loaded.rank_state["noise"], torch.full((2,), step))
    assert loaded.stored.state == {"global_steps": step}
    return loaded.stored.tag, step


def said(do: Callable[[], Any]) -> str:
    """The message of the CheckpointError that ``do`` raises."""
    try:
        value = do()
    except CheckpointError as error:
        return str(error)
    raise AssertionError(f"no CheckpointError but {value!r}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def on_first(do: Callable[[], Any]) -> None:
    """Run on rank 0, between two barriers."""
    dist.barrier()
    if dist.get_rank() == 0:
        do()
    dist.barrier()


@contextlib.contextmanager
def warnings_said() -> Iterator[list[str]]:
    """What the hpc_ds logger says on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hpc_ds")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(data)


def mount_small(folder: Path, size: str) -> bool:
    """A real file system of that size; only root can make one."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


NO_MOUNT = "a small file system cannot be mounted here: that needs root"
