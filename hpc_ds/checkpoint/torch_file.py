"""Reading a file that ``torch.save`` wrote, without torch and without running code.

Such a file is a zip of stored, uncompressed records: ``data.pkl``, a pickle whose tensors name storages, and
``data/<key>``, the bytes of each storage. The pickle goes through an unpickler that knows the few names below and
nothing else: each stands for a function or a class of ours that only keeps what it is given. Classes of DeepSpeed
become inert records. Tensors come out as ranges of the file, whose bytes are read when they are needed.

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.blocks import read_all
from hpc_ds.checkpoint.index import ITEM_BYTES
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHUNK_BYTES = 8 << 20
_LOCAL_HEADER_BYTES = 30
# torch's names -> safetensors' names
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}  # fmt: skip
_PICKLE_ERRORS = (
    pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, OverflowError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class InFile:
    """A tensor in a file, its bytes not yet read.

    Attributes:
        file: where it is.
        offset: bytes from the beginning of the file to its first element.
        dtype: safetensors' name of the type.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def length(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow one another in the file."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.length == 0
            expected *= size
        return True

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return self.length * ITEM_BYTES[self.dtype]

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill memory with bytes of the flattened elements, from byte ``start`` on.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        if not self.contiguous:
            view[:] = _gathered(self)[start : start + len(view)]
            return
        try:
            with self.file.open("rb", buffering=0) as file:
                got = read_all(file.fileno(), view, self.offset + start)
        except OSError as error:
            raise _refused(self.file, f"it cannot be read: {error.strerror}") from None
        if got < len(view):
            raise _refused(self.file, "it ends too early")

    def all_bytes(self) -> bytes:
        """The bytes of all elements, in order."""
        data = bytearray(self.size_bytes)
        self.read_into(memoryview(data), 0)
        return bytes(data)


@lru_cache(maxsize=2)
def _gathered(tensor: InFile) -> bytes:
    """All of a tensor that does not lie in order, in order."""
    import numpy as np

    item = ITEM_BYTES[tensor.dtype]
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    flat = np.memmap(tensor.file, dtype=f"V{item}", mode="r", offset=tensor.offset, shape=(reach,))
    strides = tuple(stride * item for stride in tensor.strides)
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)).tobytes()


class Record:
    """What stands for an object of DeepSpeed's: the class it was, what it was made of, its attributes. It does nothing."""

    made_of: tuple[Any, ...]
    attributes: dict[str, Any]

    def __new__(cls, *made_of: Any) -> Any:  # noqa: D102
        record = object.__new__(cls)
        record.made_of, record.attributes = made_of, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class _Storage:
    offset: int
    size_bytes: int
    dtype: str | None


def load(path: Path) -> Any:
    """What ``torch.save`` put into a file, tensors as ``InFile``; the checksums of all records are verified.

    Raises:
        CheckpointError: it is no such file, it is damaged, or it holds anything but plain data.
    """
    try:
        with path.open("rb") as file, _as_zip(path, file) as archive:
            root = _root(path, archive)
            records = {entry.filename: entry for entry in archive.infolist()}
            if f"{root}/byteorder" in records and archive.read(f"{root}/byteorder") != b"little":
                raise _refused(path, "its bytes are in the order of another kind of machine")
            offsets = {name: _verified_offset(path, file, entry) for name, entry in records.items()}
            sizes = {name: entry.file_size for name, entry in records.items()}
            with archive.open(f"{root}/data.pkl") as data:
                return _Unpickler(data, path, f"{root}/data/", offsets, sizes).load()
    except FileNotFoundError:
        raise CheckpointError(f"file {str(path)!r}: no such file; is the checkpoint complete?", str(path)) from None
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror}") from None
    except zipfile.BadZipFile as error:
        raise _refused(path, f"it is damaged: {error}") from None
    except _PICKLE_ERRORS as error:
        raise _refused(path, str(error) or type(error).__name__, "save it again with plain data in it") from None


def _as_zip(path: Path, file: Any) -> zipfile.ZipFile:
    if file.read(4)[:2] != b"PK":
        raise _refused(path, "it is not a zip file, as torch writes since 1.6", "load it with torch and save it again")
    return zipfile.ZipFile(file)


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _refused(path, "it holds no data.pkl of torch's")
    return roots[0]


def _verified_offset(path: Path, file: Any, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin, once they have the checksum that they should have."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _refused(path, f"its record {entry.filename!r} is compressed")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\3\4":
        raise _refused(path, f"its record {entry.filename!r} is not where it should be")
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    offset = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    file.seek(offset)
    left, checksum = entry.file_size, 0
    while left:
        chunk = file.read(min(_CHUNK_BYTES, left))
        if not chunk:
            raise _refused(path, "it ends too early")
        left, checksum = left - len(chunk), zlib.crc32(chunk, checksum)
    if checksum != entry.CRC:
        raise _refused(path, f"its record {entry.filename!r} does not have the bytes that were written")
    return int(offset)


class _Unpickler(pickle.Unpickler):
    """Knows ``_plain_names`` and, as inert records, what is DeepSpeed's."""

    def __init__(self, data: Any, path: Path, prefix: str, offsets: dict[str, int], sizes: dict[str, int]) -> None:
        super().__init__(data, encoding="utf-8")
        self._path, self._prefix, self._offsets, self._sizes = path, prefix, offsets, sizes
        self._names = self._plain_names()

    def find_class(self, module: str, name: str) -> Any:
        known = self._names.get(f"{module}.{name}")
        if known is None and (module == "deepspeed" or module.startswith("deepspeed.")):
            known = self._names[f"{module}.{name}"] = type("Record", (Record,), {"of": f"{module}.{name}"})
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not among the types that are read from a file")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor names: ("storage", its type, key, device, elements)."""
        kind, dtype, key, *_ = pid
        name = f"{self._prefix}{key}"
        if kind != "storage" or not isinstance(dtype, str) or name not in self._offsets:
            raise pickle.UnpicklingError("a tensor names a storage that is not there")
        return _Storage(self._offsets[name], self._sizes[name], dtype.removeprefix("storage:") or None)

    def _plain_names(self) -> dict[str, Any]:
        """Full name -> what stands for it; made anew for each file, because a pickle may set attributes of what it names."""

        def keep(*given: Any) -> tuple[Any, ...]:
            return given

        def first(given: Any, *_: Any) -> Any:
            return given

        def as_tuple(items: Any = ()) -> tuple[Any, ...]:
            return tuple(items)

        def as_bytes(text: str, encoding: str) -> bytes:
            """How pickle's old protocols write bytes."""
            if encoding != "latin1":
                raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
            return text.encode("latin1")

        def with_attributes(make: Any, _type: Any, given: Any, _attributes: Any) -> Any:
            """A tensor to which Python attributes were pinned; they are let go."""
            if make not in {self._tensor, self._tensor_of_type, first}:
                raise pickle.UnpicklingError("a tensor is not described as torch does it")
            return make(*given)

        names: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch.Size": as_tuple,
            "torch.device": keep,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_type,
            "torch._utils._rebuild_parameter": first,
            "torch._utils._rebuild_parameter_with_state": first,
            "torch._tensor._rebuild_from_type_v2": with_attributes,
            "torch.Tensor": "torch.Tensor",
            "torch.nn.parameter.Parameter": "torch.nn.parameter.Parameter",
            "_codecs.encode": as_bytes,
        }
        names |= {
            f"{module}.{name}": kind for module in ("__builtin__", "builtins") for name, kind in _BUILTINS.items()
        }
        names |= {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}
        names |= {f"torch.{name}": f"storage:{dtype}" for name, dtype in _STORAGES.items()}
        return names | {"torch.storage.UntypedStorage": "storage:", "torch.UntypedStorage": "storage:"}

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> InFile:
        return self._tensor_of_type(storage, offset, shape, strides, None, None, getattr(storage, "dtype", None))

    def _tensor_of_type(self, storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> InFile:
        """See ``torch._utils._rebuild_tensor_v3``: what follows is requires_grad, hooks, dtype."""
        dtype, sizes, steps = more[2], tuple(shape), tuple(strides)
        plain = isinstance(storage, _Storage) and dtype in ITEM_BYTES and isinstance(offset, int)
        numbers = (offset, *sizes, *steps)
        if not plain or len(sizes) != len(steps) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor is not described as torch does it")
        reach = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1 if math.prod(sizes) else 0
        if (offset + reach) * ITEM_BYTES[dtype] > storage.size_bytes:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return InFile(self._path, storage.offset + offset * ITEM_BYTES[dtype], dtype, sizes, steps)


_BUILTINS: dict[str, Callable[..., Any]] = {"set": set, "frozenset": frozenset, "complex": complex}


def _refused(path: Path, problem: str, cure: str = "use another copy of it") -> CheckpointError:
    return CheckpointError(f"file {str(path)!r}: refused: {problem}; {cure}", str(path))
