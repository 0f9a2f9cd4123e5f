"""A DeepSpeed checkpoint becomes one of ours: fp32 masters, optimizer state, schedule, loss scale, counters, client state.

Nothing of DeepSpeed's or torch's is imported and no code of the files runs; bytes are copied range by range, so memory does
not depend on the model's size. What comes out is committed as any save is. DeepSpeed keeps no random states and no
position in the data, so these start as the new run has them.
"""

from __future__ import annotations

import base64
import math
import time
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint import commit, deepspeed_plain, deepspeed_shards
from hpc_ds.checkpoint.blocks import LANES, Aligned, DataFile
from hpc_ds.checkpoint.deepspeed_files import DeepSpeedCheckpoint, read, tag_folder
from hpc_ds.checkpoint.deepspeed_shards import Gathered, Part, whole
from hpc_ds.checkpoint.index import BLOCK_BYTES, ITEM_BYTES, Entry, Index, header_of, write_index
from hpc_ds.checkpoint.layout import FORMAT, candidates, data_file
from hpc_ds.checkpoint.torch_file import InFile, Record
from hpc_ds.checkpoint.whole import MODEL
from hpc_ds.config.known_names import MOVED_BY_SCHEDULES
from hpc_ds.errors import CheckpointError, ConfigError
from hpc_ds.run_dir import fsync_folder
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What DeepSpeed itself puts at the top of its file; all else is the user's.
_ITS_OWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments",
    "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "csr_tensor_module_names", "skipped_steps",
    "global_steps", "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config",
    "ds_version", "universal_checkpoint_info", "num_experts", "autotp_universal_checkpoint_info",
}  # fmt: skip


def import_deepspeed(
    source: Path,
    folder: Path,
    tag: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    weights_only: bool = False,
) -> Path:
    """Write the checkpoint that ``source`` holds into ``folder`` under the same tag; returns its folder.

    ``latest`` is set where ``folder`` had no checkpoint yet.

    Args:
        source: what DeepSpeed's ``save_checkpoint`` was given, or the folder of one tag.
        folder: of our checkpoints.
        tag: which one; by default the one that its ``latest`` names.
        progress: called with the bytes copied so far, and with those in all.
        weights_only: leave out all tensors but parameters and buffers.

    Raises:
        CheckpointError: it cannot be read, or not be written.
        ConfigError: there is such a tag already.
    """
    path = tag_folder(source, tag)
    if (folder / path.name).exists():
        raise ConfigError(f"{str(folder / path.name)!r}: already there; choose another folder")
    try:
        tensors, manifest = _arranged(read(path))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"DeepSpeed checkpoint {str(path)!r}: not arranged as DeepSpeed 0.19 does it: {error!r}; save it with that version",
            str(path),
        ) from None
    if weights_only:
        tensors = [tensor for tensor in tensors if tensor.name.startswith(MODEL)]
    _write(folder, path.name, tensors, manifest, progress)
    return folder / path.name


def _arranged(checkpoint: DeepSpeedCheckpoint) -> tuple[list[Gathered], dict[str, Any]]:
    """All tensors, and what the manifest says."""
    client = _Plain()
    client_state = client.encode(_client_state(checkpoint), "client_state")
    tied = _tied(checkpoint)
    tensors = _tensors(checkpoint, tied)
    tensors += [whole(f"client_state.{number}", tensor) for number, tensor in enumerate(client.tensors)]
    return tensors, {
        "format": FORMAT,
        "step": checkpoint.model[0]["global_steps"],
        "world_size": 1,
        "stage": checkpoint.stage,
        "created": time.time(),
        "versions": {"hpc_ds": __version__, "deepspeed": str(checkpoint.model[0].get("ds_version"))},
        "config_hash": None,
        "state": {**_state(checkpoint), "tied": tied, "frozen": _frozen(checkpoint, tied)},
        "client_state": client_state,
    }


def _write(
    folder: Path,
    tag: str,
    tensors: list[Gathered],
    manifest: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    try:
        first = not candidates(folder)
        hidden = commit.begin(folder, tag, commit.Run())
        try:
            files = _write_files(hidden, tensors, progress)
            complete = {**manifest, "id": commit.id_of(hidden), "files": files}
            commit.publish(hidden, folder / tag, complete, save_latest=first)
        except BaseException:
            commit.give_up(hidden)
            raise
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(folder / tag)!r}: not saved: {error.strerror}", str(folder / tag)
        ) from None


def _write_files(
    hidden: Path, tensors: list[Gathered], progress: Callable[[int, int], None] | None
) -> dict[str, dict[str, Any]]:
    entries, offset = [], 0
    # Larger elements first, as in every save: no element may stand on both sides of a block's end.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    for tensor in ordered:
        entries.append(Entry(tensor.name, tensor.shape, tensor.dtype, 0, math.prod(tensor.shape), offset))
        offset += entries[-1].size_bytes
    header = header_of(entries)
    source = _Source(ordered, entries, None if progress is None else lambda done: progress(done, offset))
    data = DataFile(hidden / data_file(0), header, offset, source)
    data.start()
    data.finish()
    index = Index(commit.id_of(hidden), 0, len(header), offset, data.header, data.blocks, entries, state=None)
    files = write_index(hidden, index)
    fsync_folder(hidden)
    return files


class _Source:
    """The bytes of our data file, read from DeepSpeed's files when a block is due (see ``blocks.Source``)."""

    def __init__(self, tensors: list[Gathered], entries: list[Entry], progress: Callable[[int], None] | None) -> None:
        self._parts: list[Part] = []
        self._offsets: list[int] = []
        self._items: list[int] = []
        for tensor, entry in zip(tensors, entries, strict=True):
            offset, item = entry.offset, ITEM_BYTES[tensor.dtype]
            for part in (part for part in tensor.parts if part.length):
                self._parts.append(part)
                self._offsets.append(offset)
                self._items.append(item)
                offset += part.length * item
        self._buffers = [Aligned(BLOCK_BYTES).view for _ in range(LANES)]
        self._done = [0] * LANES
        self._progress = progress

    def block(self, lane: int, start: int, stop: int) -> memoryview:
        """See ``blocks.Source``."""
        buffer = self._buffers[lane]
        number = max(bisect_right(self._offsets, start) - 1, 0)
        while number < len(self._offsets) and self._offsets[number] < stop:
            part, offset, item = self._parts[number], self._offsets[number], self._items[number]
            first, last = max(start, offset), min(stop, offset + part.length * item)
            _read(part, first - offset + part.start * item, buffer[first - start : last - start])
            number += 1
        self._done[lane] += stop - start
        if self._progress is not None:
            self._progress(sum(self._done))
        return buffer


def _read(part: Part, start: int, into: memoryview) -> None:
    if isinstance(part.source, InFile):
        part.source.read_into(into, start)
    else:
        into[:] = part.source[start : start + len(into)]


def _tied(checkpoint: DeepSpeedCheckpoint) -> dict[str, str]:
    """The other names of parameters that have several: name -> the first one."""
    model = checkpoint.model[0]
    tied: dict[str, str] = dict(model.get("shared_params") or {})
    first_of: dict[InFile, str] = {}
    for name, tensor in model["module"].items():
        if isinstance(tensor, InFile) and tensor.length and first_of.setdefault(tensor, name) != name:
            tied.setdefault(name, first_of[tensor])
    return tied


def _frozen(checkpoint: DeepSpeedCheckpoint, tied: dict[str, str]) -> list[str] | None:
    """The parameters that were not trained; None at stage 0, whose files do not say."""
    model = checkpoint.model[0]
    if not checkpoint.stage:
        return None
    trained = {name for group in model["param_shapes"] for name in group}
    return [name for name in model["module"] if name not in {*trained, *tied, *(model["buffer_names"] or ())}]


def _tensors(checkpoint: DeepSpeedCheckpoint, tied: dict[str, str]) -> list[Gathered]:
    """Everything but client state, under the names of our format."""
    model = checkpoint.model[0]
    buffers = set(model["buffer_names"] or ())
    module = {
        name: tensor for name, tensor in model["module"].items() if name not in tied and isinstance(tensor, InFile)
    }
    if checkpoint.stage == 0:
        weights = {name: tensor for name, tensor in module.items() if name not in buffers}
        found = deepspeed_plain.trainable(checkpoint, weights)
    else:
        found = deepspeed_shards.trainable(checkpoint)
    if checkpoint.stage == 3:
        found += deepspeed_shards.frozen(checkpoint)
        module = {name: tensor for name, tensor in module.items() if name in buffers}
    there = {tensor.name for tensor in found}
    return found + [whole(f"model.{name}", tensor) for name, tensor in module.items() if f"model.{name}" not in there]


def _state(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    """What our engine keeps beside tensors."""
    model = checkpoint.model[0]
    return {
        "hpc_ds": __version__,
        "made_by": None,
        "global_steps": model["global_steps"],
        "global_samples": model.get("global_samples", 0),
        "skipped_steps": model.get("skipped_steps", 0),
        "micro_steps": 0,
        "zero_stage": checkpoint.stage,
        "train_batch_size": None,
        "loss_scale": _loss_scale(checkpoint),
        "data": None,
    }


def _loss_scale(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    """The state of a dynamic loss scale; empty where it is static."""
    states = checkpoint.optimizer[0] if checkpoint.optimizer else checkpoint.model[0].get("optimizer") or {}
    scaler = states.get("loss_scaler")
    told = scaler.attributes if isinstance(scaler, Record) else states
    if not states.get("dynamic_loss_scale") or "cur_scale" not in told:
        return {}
    return {
        "value": float(told["cur_scale"]),
        "iteration": int(told.get("cur_iter", 0)),
        "last_overflow": int(told.get("last_overflow_iter", -1)),
        "hysteresis": int(told.get("cur_hysteresis", 1)),
    }


def _client_state(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    model = checkpoint.model[0]
    schedule = model.get("lr_scheduler")
    groups = _groups(checkpoint)
    moved = [{key: group[key] for key in MOVED_BY_SCHEDULES if key in group} for group in groups]
    return {
        "client": {key: value for key, value in model.items() if key not in _ITS_OWN},
        "registered": {},
        "optimizer": {},
        "lr_scheduler": None if schedule is None else {"schedule": schedule, "moved": moved},
    }


def _groups(checkpoint: DeepSpeedCheckpoint) -> list[dict[str, Any]]:
    """The parameter groups of the optimizer, with their rates."""
    states = checkpoint.optimizer[0] if checkpoint.optimizer else checkpoint.model[0].get("optimizer") or {}
    base = states.get("base_optimizer_state", states.get("optimizer_state_dict", states))
    return list(base.get("param_groups", ())) if isinstance(base, dict) else []


class _Plain:
    """Client state as the JSON of hpc_ds/checkpoint/plain.py, which needs torch for what a file cannot hold.

    Attributes:
        tensors: in the order of their numbers.
    """

    def __init__(self) -> None:
        self.tensors: list[InFile] = []

    def encode(self, value: Any, where: str) -> Any:
        """The value as JSON."""
        kind = type(value)
        if value is None or kind in {bool, int, str}:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"<float>": str(value)}
        if kind in {list, tuple, set, frozenset}:
            items = [self.encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
            return items if kind is list else {f"<{kind.__name__}>": items}
        if isinstance(value, dict):
            return self._mapping(value, where)
        if kind is bytes:
            return {"<bytes>": base64.b64encode(value).decode()}
        if kind is InFile:
            self.tensors.append(value)
            return {"<tensor>": len(self.tensors) - 1}
        of = getattr(value, "of", kind.__name__)
        raise CheckpointError(f"{where}: a {of} of DeepSpeed's file cannot be stored; save the checkpoint without it")

    def _mapping(self, value: dict[Any, Any], where: str) -> dict[str, Any]:
        if type(value) is dict and all(type(key) is str and not key.startswith("<") for key in value):
            return {key: self.encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [[self.encode(key, where), self.encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {"<dict>" if type(value) is dict else "<OrderedDict>": pairs}
