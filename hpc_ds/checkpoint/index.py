"""The index of one rank's tensors: what stands where in ``rank-R.safetensors``, and the checksum of each block of it.

The data file is a valid safetensors file: 8 bytes (length of the header, little endian), a JSON header, the data. The
header is padded with blanks so that the data begins at a multiple of the alignment that O_DIRECT asks for. The data
is cut into blocks; each has an XXH3-128 checksum in the index, and the bytes before the data have one of their own.
A tensor stands there under its name when the rank wrote all of it, else as ``name[start:stop]``, a flat range.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.layout import damaged, data_file, index_file
from hpc_ds.run_dir import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from hpc_ds.checkpoint.layout import Saved

ALIGNMENT = 4096  # bytes; what O_DIRECT needs on every disk we know
BLOCK_BYTES = 8 << 20
# safetensors' names of types -> bytes of an element
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A range of one tensor in the data file of a rank.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        dtype: safetensors' name of the type.
        start, length: elements, within the flattened whole; a rank may name a tensor of which it has none.
        offset: bytes, from the beginning of the data.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    length: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the range."""
        return self.length * ITEM_BYTES[self.dtype]

    @property
    def whole(self) -> bool:
        """Whether this is all of the tensor."""
        return self.length == math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Index:
    """What one rank wrote.

    Attributes:
        save: the id of the save.
        data_start: bytes before the data.
        data_bytes: of the data.
        header: checksum of the bytes before the data.
        blocks: checksums of the data's blocks.
        entries: by offset.
        state: of the rank, encoded (hpc_ds/checkpoint/plain.py).
    """

    save: str
    rank: int
    data_start: int
    data_bytes: int
    header: str
    blocks: list[str]
    entries: list[Entry]
    state: Any

    @property
    def file_bytes(self) -> int:
        """Size of the data file."""
        return self.data_start + self.data_bytes


_FIELDS = tuple(field.name for field in fields(Index))
_ENTRY_FIELDS = tuple(field.name for field in fields(Entry))


def header_of(entries: Iterable[Entry]) -> bytes:
    """The bytes before the data of a safetensors file."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        if entry.length or entry.whole:
            key = entry.name if entry.whole else f"{entry.name}[{entry.start}:{entry.start + entry.length}]"
            shape = list(entry.shape) if entry.whole else [entry.length]
            offsets = [entry.offset, entry.offset + entry.size_bytes]
            table[key] = {"dtype": entry.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    size = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def blocks_of(size: int) -> list[tuple[int, int]]:
    """Begin and end of each block of ``size`` bytes of data."""
    return [(start, min(start + BLOCK_BYTES, size)) for start in range(0, size, BLOCK_BYTES)]


def write_index(folder: Path, index: Index) -> dict[str, dict[str, Any]]:
    """Write the index of a rank, whole and durable; returns what the manifest says of it and of the data file."""
    table = {name: getattr(index, name) for name in _FIELDS} | {"entries": [_row(entry) for entry in index.entries]}
    text = json.dumps(table, separators=(",", ":"))
    write_atomic(folder / index_file(index.rank), text)
    return described(index.rank, text.encode(), index.file_bytes)


def _row(entry: Entry) -> dict[str, Any]:
    # By hand: dataclasses.asdict copies deeply, and takes longer than all the files' flushes.
    return {name: getattr(entry, name) for name in _ENTRY_FIELDS}


def described(rank: int, text: bytes, file_bytes: int) -> dict[str, dict[str, Any]]:
    """What the manifest says of the two files of a rank."""
    return {
        data_file(rank): {"size": file_bytes},
        index_file(rank): {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()},
    }


def read_index(saved: Saved, rank: int) -> Index:
    """The index of a rank, when it and the size of its data file are what the manifest says.

    Raises:
        DamagedError: they are not.
    """
    name = index_file(rank)
    try:
        text = (saved.path / name).read_bytes()
        index = parse_index(text)
        size = (saved.path / data_file(rank)).stat().st_size
    except FileNotFoundError as error:
        raise damaged(saved.path, f"{error.filename.rpartition('/')[2]} cannot be read: {error.strerror}") from None
    except OSError as error:
        raise damaged(saved.path, f"{name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(saved.path, f"{name} is no index: {error!r}") from None
    if described(rank, text, size) != {key: saved.files[key] for key in (data_file(rank), name)}:
        wrong = name if len(text) != saved.files[name]["size"] else data_file(rank)
        found, wanted = (len(text) if wrong == name else size), saved.files[wrong]["size"]
        if found != wanted:
            raise damaged(saved.path, f"{wrong} has {found} bytes instead of {wanted}")
        raise damaged(saved.path, f"{name} does not have the bytes that were written")
    if (index.save, index.rank) != (saved.id, rank) or index.file_bytes != size:
        raise damaged(saved.path, f"{name} is the index of another save or rank")
    return index


def parse_index(text: bytes) -> Index:
    """The index in a file's bytes; ValueError, KeyError or TypeError where it is none."""
    data = json.loads(text)
    if data.keys() != set(_FIELDS):
        raise ValueError("its fields are not those of an index")
    entries = [Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in data.pop("entries")]
    index = Index(**data, entries=entries)
    if len(index.blocks) != len(blocks_of(index.data_bytes)):
        raise ValueError(f"{len(index.blocks)} checksums for {index.data_bytes} bytes")
    for entry in entries:
        inside = entry.offset >= 0 and entry.offset + entry.size_bytes <= index.data_bytes
        if not inside or not 0 <= entry.start <= entry.start + entry.length <= math.prod(entry.shape):
            raise ValueError(f"{entry.name!r} stands outside of its file or tensor")
    return index
