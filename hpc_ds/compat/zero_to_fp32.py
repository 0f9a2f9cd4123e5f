"""``deepspeed.utils.zero_to_fp32``: whole weights of a checkpoint, of ours or of DeepSpeed's own (stages 0 to 3).

By the code of ``hpcds checkpoint export`` and ``import-deepspeed``: nothing in the files is run, and every byte of ours is
verified. Weights of a DeepSpeed checkpoint are put together in a temporary folder first, which takes their size in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.checkpoint import layout
from hpc_ds.checkpoint.convert import FLOATS
from hpc_ds.checkpoint.export import bytes_of, export_safetensors, export_torch
from hpc_ds.checkpoint.import_deepspeed import import_deepspeed
from hpc_ds.checkpoint.shards import DTYPES
from hpc_ds.checkpoint.verify import open_whole
from hpc_ds.checkpoint.whole import MODEL, WholeTensors, tied_names, weights_in
from hpc_ds.errors import CheckpointError, ConfigError, HpcdsError

if TYPE_CHECKING:
    from torch import nn

    from hpc_ds.checkpoint.stored import Stored

_OUTPUT = {
    "float32": "F32", "fp32": "F32", "float": "F32", "float16": "F16", "fp16": "F16", "half": "F16", "bfloat16": "BF16",
    "bf16": "BF16",
}  # fmt: skip
_LARGEST = 1 << 62  # of a file that may have any size


@dataclass(frozen=True)
class _Opened:
    """A checkpoint to read weights from."""

    stored: Stored


class LazyWeight:
    """A weight that is still in its checkpoint; ``contiguous()`` reads it.

    Attributes:
        shape: of the whole.
        dtype: float32 for floats.
    """

    def __init__(self, opened: _Opened, name: str) -> None:
        tensor = opened.stored.tensors[name]
        self._opened, self._name, self._saved = opened, name, DTYPES[tensor.dtype]
        self.shape = torch.Size(tensor.shape)
        self.dtype = torch.float32 if tensor.dtype in FLOATS else self._saved

    def contiguous(self) -> torch.Tensor:
        """The weight, in memory.

        Raises:
            DamagedError: a file does not hold what was written.
        """
        found = torch.empty(self.shape, dtype=self._saved)
        into: Any = found.view(-1).view(torch.uint8).numpy() if found.numel() else []
        position = 0
        with contextlib.closing(WholeTensors(self._opened.stored)) as tensors:
            for chunk in tensors.chunks(self._name):
                into[position : position + len(chunk)] = chunk
                position += len(chunk)
        return found.to(self.dtype)


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """All weights of a checkpoint, in host memory; floats in fp32, the names of a tied one sharing it.

    Args:
        checkpoint_dir: what ``save_checkpoint`` was given.
        tag: which one; default: the one that ``latest`` names.
        exclude_frozen_parameters: leave out parameters that were not trained.
        lazy_mode: leave weights in their files until ``contiguous()`` is called on them.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    opened = _open(Path(checkpoint_dir), tag)
    left_out = _frozen(opened.stored) if exclude_frozen_parameters else set()
    tied = tied_names(opened.stored)
    first: dict[str, Any] = {}
    found = {}
    for name in weights_in(opened.stored):
        stored = tied.get(name, name)
        if stored not in left_out:
            if stored not in first:
                lazy = LazyWeight(opened, MODEL + stored)
                first[stored] = lazy if lazy_mode else lazy.contiguous()
            found[name] = first[stored]
    return found


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write all weights of a checkpoint into a folder: ``pytorch_model.bin``, or ``model.safetensors``.

    Args:
        checkpoint_dir: what ``save_checkpoint`` was given.
        output_dir: made where it is not there.
        dtype: of floats.
        max_shard_size: with ``safe_serialization``, of one file; several have an index. A ``.bin`` is one file of any size.
        safe_serialization: write safetensors.
        tag: which one; default: the one that ``latest`` names.
        exclude_frozen_parameters: leave out parameters that were not trained.

    Raises:
        CheckpointError: there is none, or it cannot be read or written.
        ConfigError: no such dtype or size.
    """
    wanted = _OUTPUT.get(str(dtype).lower().removeprefix("torch."))
    if wanted is None:
        raise ConfigError(f"dtype {dtype!r}: not one to write; use {', '.join(sorted({*_OUTPUT}))}")
    largest = _LARGEST if max_shard_size is None else bytes_of("max_shard_size", str(max_shard_size))
    opened = _open(Path(checkpoint_dir), tag)
    stored = _without(opened.stored, _frozen(opened.stored)) if exclude_frozen_parameters else opened.stored
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not safe_serialization:
        export_torch(stored, folder / "pytorch_model.bin", wanted, force=True)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as beside:  # the folder may hold other files too
        for file in export_safetensors(stored, Path(beside, "weights"), wanted, largest):
            file.replace(folder / file.name)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """See ``convert_zero_checkpoint_to_state_dict``: in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Move a plain module to the CPU and load the fp32 weights of a checkpoint into it; returns it."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def _open(folder: Path, tag: str | None) -> _Opened:
    """Ours, or what DeepSpeed's becomes; one that is neither is refused as DeepSpeed's."""
    if tag is None and (folder / layout.MANIFEST).is_file():
        return _Opened(open_whole(folder))
    found = [folder / tag] if tag is not None else layout.candidates(folder)
    if found and (found[0] / layout.MANIFEST).is_file():
        return _Opened(open_whole(found[0]))
    made = tempfile.mkdtemp(prefix="hpc_ds-weights-")
    try:
        opened = _Opened(open_whole(import_deepspeed(folder, Path(made), tag, weights_only=True)))
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    weakref.finalize(opened, shutil.rmtree, made, ignore_errors=True)  # when the last weight in it has been let go
    return opened


def _frozen(stored: Stored) -> set[str]:
    frozen = stored.state.get("frozen")
    if frozen is None:
        raise CheckpointError(
            f"checkpoint {str(stored.path)!r}: it does not say which parameters were frozen; leave out "
            "exclude_frozen_parameters",
            str(stored.path),
        )
    return set(frozen)


def _without(stored: Stored, names: set[str]) -> Stored:
    from dataclasses import replace

    tied = tied_names(stored)
    gone = {MODEL + name for name in names} | {MODEL + name for name, of in tied.items() if of in names}
    return replace(stored, tensors={name: tensor for name, tensor in stored.tensors.items() if name not in gone})


def main(args: list[str] | None = None) -> None:
    """``zero_to_fp32.py``'s command line; what a user can mend is one line, and an exit code."""
    try:
        _convert(args)
    except HpcdsError as error:
        sys.stderr.write(f"zero_to_fp32: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)!r}: "
        sys.stderr.write(f"zero_to_fp32: {name}{error.strerror or error}; look at that folder, and the space there\n")
        sys.exit(CheckpointError.exit_code)


def _convert(args: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="zero_to_fp32", description="whole fp32 weights of a checkpoint")
    parser.add_argument("checkpoint_dir", help="what save_checkpoint was given")
    parser.add_argument("output_dir", help="folder for the weights")
    parser.add_argument("--max_shard_size", default="5GB", help="of one safetensors file")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("-t", "--tag", default=None, help="default: the one that latest names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what was not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="accepted")
    given = vars(parser.parse_args(args))
    del given["debug"]
    convert_zero_checkpoint_to_fp32_state_dict(**given)
