"""Writing a file that ``torch.load`` reads, without torch: a zip of stored records, tensor by tensor.

The pickle in it names three things: OrderedDict, a tensor's rebuild function and the types of storages; ``torch.load``
admits them with ``weights_only=True``. A tensor that stands under several names is stored once.

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html; Python's pickletools
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from hpc_ds.checkpoint.export import Weight

_ALIGNMENT = 64  # torch's, so that a file can be mapped into memory
_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage",
    "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage", "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
}  # fmt: skip
_ROOT = "weights"


def write_torch_file(
    file: BinaryIO, weights: Sequence[Weight], bytes_of: Callable[[Weight], Iterator[bytes | memoryview]]
) -> None:
    """Write a state_dict.

    Args:
        file: to write to.
        weights: what goes into it.
        bytes_of: the bytes of one of them.

    Raises:
        CheckpointError: a tensor is of a type that torch's old storages do not have.
    """
    keys: dict[str, str] = {}
    for weight in weights:
        if weight.dtype not in _STORAGES:
            raise CheckpointError(f"tensor {weight.name!r}: {weight.dtype} does not go into a .pt; use safetensors")
        keys.setdefault(weight.stored, str(len(keys)))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, file, "data.pkl", [_pickle(weights, keys)])
        _write(archive, file, "byteorder", [b"little"])
        for weight in {weight.stored: weight for weight in weights}.values():
            _write(archive, file, f"data/{keys[weight.stored]}", bytes_of(weight))
        _write(archive, file, "version", [b"3\n"])


def _write(archive: zipfile.ZipFile, file: BinaryIO, name: str, chunks: Any) -> None:
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
    # The local header has 30 bytes, the name, 20 bytes for sizes beyond 4 GB, and our own filling.
    begin = file.tell() + 30 + len(entry.filename) + 20 + 4
    entry.extra = b"FB" + (filling := -begin % _ALIGNMENT).to_bytes(2, "little") + b"Z" * filling
    with archive.open(entry, "w", force_zip64=True) as record:
        for chunk in chunks:
            record.write(chunk)


def _pickle(weights: Sequence[Weight], keys: dict[str, str]) -> bytes:
    """Protocol 2 by hand: a Pickler would have to import what it names."""
    out = io.BytesIO()
    out.write(
        pickle.PROTO + b"\x02" + pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    )
    out.write(pickle.MARK)
    for weight in weights:
        strides = [math.prod(weight.shape[dim + 1 :]) for dim in range(len(weight.shape))]
        out.write(_plain(weight.name))
        out.write(pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK)
        out.write(
            pickle.MARK + _plain("storage") + pickle.GLOBAL + b"torch\n" + _STORAGES[weight.dtype].encode() + b"\n"
        )
        out.write(_plain(keys[weight.stored]) + _plain("cpu") + _plain(math.prod(weight.shape)))
        out.write(pickle.TUPLE + pickle.BINPERSID)
        out.write(_plain(0) + _plain(weight.shape) + _plain(tuple(strides)) + pickle.NEWFALSE)
        out.write(pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE)
        out.write(pickle.TUPLE + pickle.REDUCE)
    out.write(pickle.SETITEMS + pickle.STOP)
    return out.getvalue()


def _plain(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes of a text, a number, or a tuple of numbers; nothing is remembered, so they can stand anywhere."""
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(_plain(item) for item in value) + pickle.TUPLE
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw
