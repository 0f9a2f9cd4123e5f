"""Files of torch.save are read as torch reads them, without torch and without running anything."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_ds.checkpoint.torch_file import InFile, load
from hpc_ds.errors import CheckpointError

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 7, generator=generator)
    found = {str(dtype): (base * 3).abs().to(dtype) for dtype in TYPES}
    pinned = base.clone()
    pinned.ds_id = 3  # type: ignore[attr-defined] - an attribute makes torch describe it in another way
    return found | {
        "a view": base[1:4, 2],
        "transposed": base.t(),
        "every other": torch.arange(20.0)[3::2],
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base),
        "pinned": pinned,
    }


def as_torch(tensor: InFile, like: torch.Tensor) -> torch.Tensor:
    data = bytearray(tensor.all_bytes())
    flat = torch.frombuffer(data, dtype=like.dtype) if data else torch.empty(0, dtype=like.dtype)
    return flat.reshape(tensor.shape)


def saved(folder: Path, value: Any) -> Path:
    path = folder / "file.pt"
    torch.save(value, path)
    return path


def test_every_tensor_has_the_bits_that_torch_saved(tmp_path: Path) -> None:
    wanted = tensors()
    found = load(saved(tmp_path, wanted))
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape), name
        if tensor.numel():
            bits = tensor.detach().contiguous().flatten().view(torch.uint8)
            assert torch.equal(as_torch(found[name], tensor).flatten().view(torch.uint8), bits), name


def test_part_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    for tensor in (torch.arange(12.0).reshape(3, 4), torch.arange(12.0).reshape(4, 3).t()):
        found = load(saved(tmp_path, tensor))
        part = bytearray(12)
        found.read_into(memoryview(part), 16)
        assert torch.equal(torch.frombuffer(part, dtype=torch.float32), tensor.flatten()[4:7])


def test_plain_data_comes_back_as_it_was(tmp_path: Path) -> None:
    data = {
        "numbers": [1, -2, 2**70, 1.5, float("inf"), True, None, 1 + 2j],
        "text": "größe",
        "bytes": b"\x00\xff",
        "nested": OrderedDict(a=(1, [2, {"b": {3}}])),
        "shape": torch.Size([2, 3]),
    }
    found = load(saved(tmp_path, data))
    assert found == {**data, "shape": (2, 3)}
    assert type(found["nested"]) is OrderedDict


def test_one_storage_of_two_tensors_is_one_place(tmp_path: Path) -> None:
    weight = torch.ones(3)
    found = load(saved(tmp_path, {"a": weight, "b": weight, "c": torch.ones(3)}))
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]


class Malicious:
    """Would write a file when it is loaded with pickle."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


class Spy:
    """A class that is not plain data."""


def test_code_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "it ran"
    path = saved(tmp_path, {"fine": 1, "evil": Malicious(target)})
    with pytest.raises(CheckpointError, match=r"refused: .*getattr is not among the types that are read"):
        load(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it would have run


def test_a_class_of_ones_own_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{Spy.__module__}.Spy is not among the types that are read"):
        load(saved(tmp_path, [Spy()]))


NASTY = {
    "os.system": b"cos\nsystem\n(S'touch {target}'\ntR.",
    "builtins.eval": b'cbuiltins\neval\n(S\'open("{target}", "w")\'\ntR.',
    "collections.OrderedDict.__init__": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    "torch.load": b"ctorch\nload\n(S'x'\ntR.",
    "a storage that is not there": b"(S'storage'\nctorch\nFloatStorage\nS'9'\nS'cpu'\nI3\ntQ.",
    "": b"\x80\x02",
}


@pytest.mark.parametrize("what", NASTY)
def test_pickles_made_by_hand_are_refused(tmp_path: Path, what: str) -> None:
    target = tmp_path / "it ran"
    path = with_pickle(tmp_path, NASTY[what].replace(b"{target}", str(target).encode()))
    with pytest.raises(CheckpointError, match="refused: ") as error:
        load(path)
    assert what in str(error.value)
    assert not target.exists()


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    for offset, shape, stride in ((0, 5, 1), (1, 4, 1), (0, 2, 4), (-1, 2, 1), (0, 2, -1)):
        pickled = (
            b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
            + f"I{offset}\n(I{shape}\nt(I{stride}\nt".encode()
            + b"I00\nNtR."
        )
        with pytest.raises(CheckpointError, match=r"refused: a tensor (reaches beyond|is not described)"):
            load(with_pickle(tmp_path, pickled))


def with_pickle(folder: Path, pickled: bytes) -> Path:
    """A file of torch's with another pickle in it, and a storage of 16 bytes."""
    path = folder / "made.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made/data.pkl", pickled)
        archive.writestr("made/data/0", bytes(16))
    return path


def test_other_files_are_refused(tmp_path: Path) -> None:
    legacy = tmp_path / "legacy.pt"
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"not a zip file, as torch writes since 1\.6; load it with torch and save"
    ):
        load(legacy)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="it cannot be read: Is a directory"):
        load(tmp_path)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match=r"it holds no data\.pkl"):
        load(other)
    compressed = tmp_path / "compressed.pt"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps(1, 2))
    with pytest.raises(CheckpointError, match="is compressed"):
        load(compressed)


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    """A bit of the data, or the end of the file; what zip does not protect (its own padding) may differ."""
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        places = [whole.find(archive.read(entry)[:16] or b"?") for entry in archive.infolist() if entry.file_size > 16]
    assert len(places) >= 2
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="does not have the bytes that were written"):
            load(path)
    for size in (3, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="refused: "):
            load(path)
