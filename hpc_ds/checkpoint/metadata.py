"""Reading torch.distributed.checkpoint's metadata without letting it run code.

Its ``.metadata`` file is a pickle. Only the plain classes below may come out of it, and only tensors may stand in it:
bytes entries would be unpickled freely by the planner.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from hpc_ds.errors import CheckpointError

_MODULE = "torch.distributed.checkpoint."
_ALLOWED = {
    *((_MODULE + "metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )),
    (_MODULE + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in (
        "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
    )),
}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in checkpoint metadata")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """A FileSystemReader whose metadata cannot run code."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The metadata of the checkpoint.

        Raises:
            CheckpointError: it holds anything but descriptions of tensors.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _PlainUnpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint file {str(path)!r}: refused: {error}; use another checkpoint", str(path)
            ) from None
        entries = getattr(metadata, "state_dict_metadata", None)
        if not isinstance(metadata, Metadata) or not isinstance(entries, dict):
            raise CheckpointError(f"checkpoint file {str(path)!r}: not metadata; use another checkpoint", str(path))
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(
                    f"checkpoint file {str(path)!r}: {name} is no tensor; use another checkpoint", str(path)
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def tensors_in(path: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> shape and type of every tensor in a checkpoint folder."""
    entries = PlainReader(path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
