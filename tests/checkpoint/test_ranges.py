"""Any range of a tensor comes back from whatever ranges were written, in whatever type is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toys import SHAPES, content, content_of, mount_small, names, said, save, save_as, unmount, values

from hpc_ds.checkpoint import blocks, fill, index, layout, reader, shards, verify, writer
from hpc_ds.checkpoint.shards import DTYPES, Shard, own_share

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL_BLOCK = 4096


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one page, so that small tensors have many."""
    for module in (index, shards, fill, blocks, reader):
        if hasattr(module, "BLOCK_BYTES"):
            monkeypatch.setattr(module, "BLOCK_BYTES", SMALL_BLOCK)
    monkeypatch.setattr("hpc_ds.checkpoint.blockwise.BLOCK_BYTES", SMALL_BLOCK)


def numbers(dtype: torch.dtype, count: int, seed: int = 0) -> torch.Tensor:
    """Random bits of a type, none of them a NaN."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, (count,), generator=generator).bool()
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(100, (count,), generator=generator).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_type_comes_back_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    tensors = {f"model.{name}": numbers(dtype, 101).reshape(101, 1) for name, dtype in DTYPES.items()}

    def of_rank(rank: int) -> writer.Content:
        return content_of(1, rank, world_size, shards=[own_share(n, t, rank, world_size) for n, t in tensors.items()])

    writer.save_in_turn(tmp_path, "one", map(of_rank, range(world_size)), world_size)
    found = {name: torch.zeros(101, dtype=tensor.dtype) for name, tensor in tensors.items()}
    reader.load(tmp_path, None, lambda _stored: [Shard(name, (101, 1), 0, data) for name, data in found.items()])
    for name, tensor in tensors.items():
        assert bits(found[name]) == bits(tensor), name


cuts = st.lists(st.integers(0, 3000), max_size=5)


@pytest.mark.usefixtures("_small_blocks")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=cuts,
    start=st.integers(0, 3000),
    stop=st.integers(0, 3000),
    dtype=st.sampled_from(["F32", "F64", "BF16", "I64"]),
    other=st.booleans(),
)
@example(cuts=[1024, 2048], start=1024, stop=2048, dtype="F32", other=True)
@example(cuts=[1024], start=0, stop=3000, dtype="F32", other=False)
def test_any_range_from_any_ranges(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    start: int,
    stop: int,
    dtype: str,
    other: bool,
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    whole, neighbour = numbers(DTYPES[dtype], 3000), numbers(torch.int16, 777)
    places = [0, *sorted(cuts), 3000]

    def of_rank(rank: int) -> writer.Content:
        first, last = places[rank], places[rank + 1]
        own = [Shard("model.x", (30, 100), first, whole[first:last])]
        beside = own_share("model.y", neighbour, rank, len(places) - 1)
        return content_of(1, rank, len(places) - 1, shards=[beside, *own])

    writer.save_in_turn(folder, "one", map(of_rank, range(len(places) - 1)), len(places) - 1)
    start, stop = min(start, stop), max(start, stop)
    wanted = torch.full((stop - start,), -1, dtype=torch.float32 if other else DTYPES[dtype])
    also = torch.zeros(777, dtype=torch.int16)
    asked = [Shard("model.x", (30, 100), start, wanted), Shard("model.y", (777,), 0, also)]
    assert reader.load(folder, None, lambda _stored: asked) is not None
    assert torch.equal(wanted, whole[start:stop].to(wanted.dtype))
    assert torch.equal(also, neighbour)


@pytest.mark.usefixtures("_small_blocks")
def test_blocks_are_read_straight_and_through_a_buffer(tmp_path: Path) -> None:
    """A tensor of many blocks, in place and converted, and one of every odd size beside it."""
    big = numbers(torch.float32, 50_001)
    small = {f"model.s{size}": numbers(torch.uint8, size, size) for size in range(1, 40)}
    tensors = {"model.big": big, **small}
    writer.save(tmp_path, "one", content(1, shards=[own_share(name, t, 0, 1) for name, t in tensors.items()]))
    for dtype in (torch.float32, torch.float64):
        found = {
            name: torch.zeros(t.numel(), dtype=dtype if name == "model.big" else t.dtype) for name, t in tensors.items()
        }
        reader.load(
            tmp_path, None, lambda _stored, found=found: [Shard(n, (d.numel(),), 0, d) for n, d in found.items()]
        )
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (length,) = SHAPES["model.long"]
    asked = {
        "it has no 'model.none'": Shard("model.none", (2,), 0, torch.zeros(2)),
        f"'model.long' has shape ({length},), wanted is (7,)": Shard("model.long", (7,), 0, torch.zeros(7)),
    }
    for text, shard in asked.items():
        assert text in said(lambda shard=shard: reader.load(tmp_path, None, lambda _stored: [shard]))


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    unfit = {
        "torch.complex128 cannot be stored": Shard("model.x", (2,), 0, torch.zeros(2, dtype=torch.complex128)),
        "is no range of (2,)": Shard("model.x", (2,), 1, torch.zeros(2)),
        "(1, 2) from 0 is no range of": Shard("model.x", (1, 2), 0, torch.zeros(1, 2)),
    }
    for text, shard in unfit.items():
        assert text in said(lambda shard=shard: writer.save(tmp_path, "two", content(2, shards=[shard])))
    assert names(tmp_path) == ["latest", "step1"]


@pytest.mark.parametrize("ranges", [[(0, 4), (5, 10)], [(0, 5), (4, 10)], [(0, 10), (0, 10)], [(0, 5), (5, 9)]])
def test_shards_that_do_not_cover_a_tensor_once_are_not_published(
    tmp_path: Path, ranges: list[tuple[int, int]]
) -> None:
    def of_rank(rank: int) -> writer.Content:
        start, stop = ranges[rank]
        return content_of(1, rank, 2, shards=[Shard("model.x", (10,), start, torch.zeros(stop - start))])

    text = said(lambda: writer.save_in_turn(tmp_path, "one", map(of_rank, range(2)), 2))
    assert "tensor 'model.x' is not covered once by what its ranks wrote" in text
    assert names(tmp_path) == []


def test_other_programs_can_read_the_tensors(tmp_path: Path) -> None:
    """The data files are what safetensors' own reader takes, the whole tensors under their names."""
    path = save(tmp_path, 1)
    found = safetensors.torch.load_file(path / "rank-0.safetensors")
    for name, shape in SHAPES.items():
        assert found[name].shape == shape
        assert torch.equal(found[name], values(name, 1))
    path = save_as(3, tmp_path, 2)
    pieces = [safetensors.torch.load_file(path / f"rank-{rank}.safetensors") for rank in range(3)]
    assert torch.equal(
        torch.cat([piece for of_rank in pieces for name, piece in of_rank.items() if name.startswith("model.long[")]),
        values("model.long", 2),
    )


def test_the_data_of_a_file_begins_where_a_page_does(tmp_path: Path) -> None:
    stored = verify.open_whole(save(tmp_path, 1))
    assert [index.data_start % 4096 for index in stored.files] == [0]


# filesystems


@pytest.fixture
def without_direct(tmp_path: Path) -> Iterator[Path]:
    """A folder on a filesystem where O_DIRECT may be refused."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = mount_small(folder, "64m")
    yield folder
    if mounted:
        unmount(folder)


def test_a_filesystem_in_memory_is_written_too(without_direct: Path) -> None:
    stored = verify.open_whole(save(without_direct, 1))
    assert verify.damages(stored) == []


@pytest.mark.parametrize("refusal", ["open", "write"])
def test_a_refusal_of_direct_writing_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    """As NFS and old tmpfs do it: when the file is opened, or at the first write."""
    refused = []

    def refuse(descriptor_or_flags: int, direct: bool) -> None:
        if direct:
            refused.append(descriptor_or_flags)
            raise OSError(22, "Invalid argument")

    original_open, original_write = blocks.os.open, blocks.os.pwrite

    def opening(path: Any, flags: int, mode: int = 0o777) -> int:
        refuse(flags, refusal == "open" and bool(flags & blocks.os.O_DIRECT))
        return original_open(path, flags, mode)

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        flags = blocks.fcntl.fcntl(descriptor, blocks.fcntl.F_GETFL)
        refuse(descriptor, refusal == "write" and bool(flags & blocks.os.O_DIRECT))
        return original_write(descriptor, data, offset)

    monkeypatch.setattr(blocks.os, "open", opening)
    monkeypatch.setattr(blocks.os, "pwrite", writing)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    assert len(refused) >= 1
    assert verify.damages(verify.open_whole(path)) == []


@pytest.mark.parametrize("refusals", [1, 2])
def test_both_lanes_may_be_refused_direct_writing_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """The other lane has left O_DIRECT between our refusal and our look at it; a second refusal is an error."""
    original = blocks.os.pwrite
    left = [OSError(22, "Invalid argument")] * refusals

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        if left:
            raise left.pop()
        return original(descriptor, data, offset)

    with (tmp_path / "file").open("wb") as file:
        monkeypatch.setattr(blocks.os, "pwrite", writing)
        if refusals == 1:
            blocks.write_all(file.fileno(), memoryview(b"data"), 0)
        else:
            with pytest.raises(OSError, match="Invalid argument"):
                blocks.write_all(file.fileno(), memoryview(b"data"), 0)
        monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == (b"data" if refusals == 1 else b"")


def test_writes_that_are_cut_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = blocks.os.pwrite
    monkeypatch.setattr(
        blocks.os, "pwrite", lambda fd, data, offset: original(fd, data[: max(1, len(data) // 3)], offset)
    )
    path = save(tmp_path, 1)
    monkeypatch.undo()
    assert verify.damages(verify.open_whole(path)) == []


def test_light_listing_and_verification_agree(tmp_path: Path) -> None:
    save_as(2, tmp_path, 1)
    save(tmp_path, 2)
    seen: list[int] = []
    for path, saved, damage in layout.listed(tmp_path):
        assert saved is not None
        assert damage is None
        assert verify.damages(verify.open_whole(path), seen.append) == []
    assert sum(seen) == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert np.prod([saved.world_size for _, saved, _ in layout.listed(tmp_path) if saved]) == 2
