"""Full weights of a checkpoint as files that other programs load: safetensors, or a ``.pt`` of torch's. Needs no torch.

One tensor at a time, a few MB of it at a time: memory does not depend on the model's size. A parameter that a module uses
under several names is written under each, so that a strict ``load_state_dict`` finds them all. Everything is written and
flushed under a hidden name beside the place it belongs, which it then takes by one rename.

Source: https://huggingface.co/docs/safetensors/index#format; the index is that of Hugging Face's ``save_pretrained``
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.convert import converted, target_type
from hpc_ds.checkpoint.index import ITEM_BYTES
from hpc_ds.checkpoint.torch_zip import write_torch_file
from hpc_ds.checkpoint.whole import MODEL, WholeTensors, tied_names, weights_in
from hpc_ds.errors import CheckpointError, ConfigError
from hpc_ds.run_dir import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hpc_ds.checkpoint.stored import Stored

TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "keep": None}
INDEX = "model.safetensors.index.json"
_EXPORTED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def bytes_of(what: str, text: str) -> int:
    """'5GB' -> 5,000,000,000; 'GiB' and the like are powers of 1024.

    Args:
        what: whose size it is, for the message.
        text: the size.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", text, re.IGNORECASE)
    size = 0
    if match is not None:
        power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise ConfigError(f"{what} {text!r}: not a size; use for example 5GB, 500MB or 2GiB", value=text)
    return size


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor on its way out.

    Attributes:
        name: in the state_dict.
        stored: its name in the checkpoint.
        dtype: what it is converted to, as safetensors names it.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes when written."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def weights_to_export(stored: Stored, dtype: str | None) -> list[Weight]:
    """All weights of a checkpoint, with floats in the type asked for.

    Args:
        stored: the checkpoint.
        dtype: safetensors' name of a type; None: as they are.
    """
    tied = tied_names(stored)
    return [
        Weight(name, MODEL + tied.get(name, name), tensor.shape, tensor.dtype, target_type(tensor.dtype, dtype))
        for name, tensor in weights_in(stored).items()
    ]


def export_safetensors(
    stored: Stored,
    to: Path,
    dtype: str | None,
    max_shard_bytes: int,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a folder with ``model.safetensors``, or with several files and an index; returns the files.

    Args:
        stored: the checkpoint.
        to: the folder to make.
        dtype: of floats; None: as they are.
        max_shard_bytes: a file is not larger, unless one tensor is.
        force: replace an earlier export.
        progress: called with the number of bytes written.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written.
        ConfigError: there is something in that place already.
    """
    _check_place(to, force=force)
    files = _split(weights_to_export(stored, dtype), max_shard_bytes)
    with _hidden(to) as hidden, contextlib.closing(WholeTensors(stored)) as tensors:
        hidden.mkdir()
        for name, weights in files.items():
            _write_safetensors(hidden / name, weights, tensors, progress)
        if len(files) > 1:
            total = sum(weight.size_bytes for weights in files.values() for weight in weights)
            names = {weight.name: name for name, weights in files.items() for weight in weights}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            _write_durable(hidden / INDEX, [json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"])
        fsync_folder(hidden)
        _take_place(hidden, to)
    return sorted(to.iterdir())


def export_torch(
    stored: Stored, to: Path, dtype: str | None, *, force: bool = False, progress: Callable[[int], None] | None = None
) -> list[Path]:
    """Write one file that ``torch.load`` reads as a state_dict; see ``export_safetensors``."""
    if to.is_dir() or (to.exists() and not force):
        raise ConfigError(f"{str(to)!r}: already there; choose another name, or --force to replace a file")
    weights = weights_to_export(stored, dtype)
    with _hidden(to) as hidden, contextlib.closing(WholeTensors(stored)) as tensors:
        with hidden.open("xb") as file:
            write_torch_file(file, weights, lambda weight: _bytes_of(weight, tensors, progress))
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(to)
        fsync_folder(to.parent)
    return [to]


def _split(weights: list[Weight], max_bytes: int) -> dict[str, list[Weight]]:
    """Which file each weight goes to, in order of their names."""
    parts: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if parts[-1] and size + weight.size_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(weight)
        size += weight.size_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def _write_safetensors(
    path: Path, weights: Sequence[Weight], tensors: WholeTensors, progress: Callable[[int], None] | None
) -> None:
    # Larger elements first: then each tensor begins at a multiple of its element's size.
    ordered = sorted(weights, key=lambda weight: -ITEM_BYTES[weight.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in ordered:
        offsets = [offset, offset + weight.size_bytes]
        header[weight.name] = {"dtype": weight.dtype, "shape": list(weight.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    def content() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for weight in ordered:
            yield from _bytes_of(weight, tensors, progress)

    _write_durable(path, content())


def _bytes_of(
    weight: Weight, tensors: WholeTensors, progress: Callable[[int], None] | None
) -> Iterator[bytes | memoryview]:
    for chunk in tensors.chunks(weight.stored):
        data = converted(chunk, weight.source_dtype, weight.dtype)
        yield data
        if progress is not None:
            progress(len(data))


def _write_durable(path: Path, chunks: Any) -> None:
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _check_place(to: Path, *, force: bool) -> None:
    """Nothing, an empty folder, or with ``force`` a folder with an earlier export and nothing else."""
    if not to.exists():
        return
    if not to.is_dir():
        raise ConfigError(f"{str(to)!r}: a file is there; choose a folder that does not exist")
    inside = sorted(path.name for path in to.iterdir())
    other = [name for name in inside if not _EXPORTED.fullmatch(name)]
    if other:
        raise ConfigError(f"{str(to)!r}: it holds {other[0]!r}, which is no exported weights; choose another folder")
    if inside and not force:
        raise ConfigError(f"{str(to)!r}: it holds exported weights; choose another folder, or --force to replace them")


@contextlib.contextmanager
def _hidden(to: Path) -> Iterator[Path]:
    """A name beside a place, for what shall take that place; what is left under it is removed."""
    hidden = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
    except OSError as error:
        raise CheckpointError(f"export to {str(to)!r}: not written: {error.strerror}; choose another place") from None
    finally:
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                hidden.unlink()


def _take_place(hidden: Path, to: Path) -> None:
    old = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    if to.exists():
        to.rename(old)
    hidden.rename(to)
    fsync_folder(to.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)
