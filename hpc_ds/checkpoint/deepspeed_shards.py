"""Where each parameter of a DeepSpeed checkpoint is: the laws by which ZeRO flattens, pads and cuts.

Stages 1 and 2. A group's parameters stand one after another in a flat buffer, in the order of ``param_shapes``, each
followed by its ``param_alignment_paddings``; the buffer is padded at its end and cut into ``world`` equal partitions. A
rank saves its fp32 partition without the padding, ``group_paddings`` says how much that was; optimizer state keeps it.

Stage 3. Each parameter is cut by itself: rank r has elements r·p to (r + 1)·p, p = ceil(elements / world), the last ones
padding. A rank's parts stand one after another in its ``fp32_flat_groups``, which are sub-groups of the parameter groups;
optimizer state is per sub-group. Frozen parameters are cut the same way, in ``frozen_param_fragments``.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, utils/zero_to_fp32.py; measured on checkpoints
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.torch_file import InFile
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from hpc_ds.checkpoint.deepspeed_files import DeepSpeedCheckpoint


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a flat tensor in a file, or a literal.

    Attributes:
        source: the tensor, or bytes.
        start, length: elements of it.
    """

    source: InFile | bytes
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """A whole tensor, put together from parts.

    Attributes:
        name: under which our format knows it.
        dtype: safetensors' name of the type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


def whole(name: str, tensor: InFile) -> Gathered:
    """A tensor that is whole where it is."""
    return Gathered(name, tensor.shape, tensor.dtype, (Part(tensor, 0, tensor.length),))


def scalar(name: str, value: float | InFile) -> Gathered:
    """A number that an optimizer keeps for a parameter, as torch's optimizers keep their ``step``."""
    if isinstance(value, InFile):
        return whole(name, value)
    return Gathered(name, (), "F32", (Part(struct.pack("<f", value), 0, 1),))


def trainable(checkpoint: DeepSpeedCheckpoint) -> list[Gathered]:
    """Masters and optimizer state of all trainable parameters of a checkpoint of stage 1, 2 or 3."""
    found: list[Gathered] = []
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in checkpoint.model[0]["param_shapes"]]
    if checkpoint.stage == 3:
        _stage3(checkpoint, shapes, found)
    else:
        for group, of_group in enumerate(shapes):
            _group(checkpoint, group, of_group, found)
    return found


def frozen(checkpoint: DeepSpeedCheckpoint) -> list[Gathered]:
    """Frozen parameters of a checkpoint of stage 3."""
    shapes = checkpoint.model[0].get("frozen_param_shapes") or {}
    found = []
    for name, shape in shapes.items():
        fragments = [model["frozen_param_fragments"][name] for model in checkpoint.model]
        sizes = _cut(math.prod(shape), len(fragments))
        parts = [Part(fragment, 0, size) for fragment, size in zip(fragments, sizes, strict=True)]
        found.append(_checked(checkpoint, f"model.{name}", tuple(shape), parts))
    return found


# stages 1 and 2


def _group(
    checkpoint: DeepSpeedCheckpoint, group: int, shapes: dict[str, tuple[int, ...]], found: list[Gathered]
) -> None:
    ranks = checkpoint.optimizer
    partitions = [states["single_partition_of_fp32_groups"][group] for states in ranks]
    states = [_group_state(rank, group) for rank in ranks]
    keys = [key for key, value in states[0].items() if isinstance(value, InFile) and value.shape]
    size = _partition_size(checkpoint, group)
    paddings = ranks[0].get("param_alignment_paddings")
    offset = 0
    for number, (name, shape) in enumerate(shapes.items()):
        length = math.prod(shape)
        cuts = [(rank, max(offset, rank * size), min(offset + length, (rank + 1) * size)) for rank in range(len(ranks))]
        cuts = [(rank, first - rank * size, last - first) for rank, first, last in cuts if first < last]
        _check_mapping(checkpoint, group, name, cuts)
        masters = [Part(partitions[rank], first, count) for rank, first, count in cuts]
        found.append(_checked(checkpoint, f"model.{name}", shape, masters))
        for key in keys:
            parts = [Part(states[rank][key], first, count) for rank, first, count in cuts]
            found.append(_checked(checkpoint, f"optimizer.{name}.{key}", shape, parts))
        found += _scalars(name, states[0])
        offset += length + (paddings[group][number] if paddings else 0)


def _partition_size(checkpoint: DeepSpeedCheckpoint, group: int) -> int:
    sizes = set()
    for states in checkpoint.optimizer:
        # ZeRO's own optimizers save without the padding, BF16_Optimizer with it.
        padding = states["group_paddings"][group] if "zero_stage" in states else 0
        sizes.add(states["single_partition_of_fp32_groups"][group].length + padding)
    if len(sizes) != 1:
        raise _wrong(checkpoint, f"partitions of group {group} have {len(sizes)} sizes")
    return int(sizes.pop())


def _group_state(states: dict[str, Any], group: int) -> dict[str, Any]:
    """The state of the one flat parameter of a group; with ``elastic_checkpoint`` it is a list by group."""
    base = states.get("base_optimizer_state") or {}
    if isinstance(base, list):
        return dict(base[group]) | (
            {"step": states["base_optimizer_state_step"]} if "base_optimizer_state_step" in states else {}
        )
    return _torch_state(base, base["param_groups"][group]["params"][0], base["param_groups"][group]) if base else {}


def _check_mapping(checkpoint: DeepSpeedCheckpoint, group: int, name: str, cuts: list[tuple[int, int, int]]) -> None:
    """Compare with what each rank says of its own partition, where it does.

    With round_robin_gradients DeepSpeed saves a mapping that takes no notice of the other order, so it is wrong.
    """
    zero = (checkpoint.model[0].get("ds_config") or {}).get("zero_optimization")
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        return
    told = []
    for rank, states in enumerate(checkpoint.optimizer):
        mappings = states.get("param_slice_mappings")
        if not mappings:
            return
        address = mappings[group].get(name)
        if address is not None:
            told.append((rank, address.attributes["start"], address.attributes["numel"]))
    if told != cuts:
        raise _wrong(checkpoint, f"{name!r} is not where its ranks say that it is")


# stage 3


def _stage3(checkpoint: DeepSpeedCheckpoint, shapes: list[dict[str, tuple[int, ...]]], found: list[Gathered]) -> None:
    ranks = checkpoint.optimizer
    groups = [states["fp32_flat_groups"] for states in ranks]
    states = [_sub_group_states(checkpoint, rank) for rank in ranks]
    ends = list(accumulate(flat.length for flat in groups[0]))
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        sizes = _cut(math.prod(shape), len(ranks))
        cuts = [cut for rank, size in enumerate(sizes) for cut in _in_sub_groups(rank, offset, size, ends)]
        masters = [Part(groups[rank][sub], first, count) for rank, sub, first, count in cuts]
        found.append(_checked(checkpoint, f"model.{name}", shape, masters))
        first_state = states[0][min(bisect_right(ends, offset), len(ends) - 1)]
        for key in [key for key, value in first_state.items() if isinstance(value, InFile) and value.shape]:
            parts = [Part(states[rank][sub][key], first, count) for rank, sub, first, count in cuts]
            found.append(_checked(checkpoint, f"optimizer.{name}.{key}", shape, parts))
        found += _scalars(name, first_state)
        offset += math.ceil(math.prod(shape) / len(ranks))
    if offset != ends[-1]:
        raise _wrong(checkpoint, f"its parameters have {offset} elements a rank, its flat groups {ends[-1]}")


def _cut(length: int, world_size: int) -> list[int]:
    """Elements of a parameter that each rank has, padding left out."""
    part = math.ceil(length / world_size)
    return [max(0, min(length, (rank + 1) * part) - rank * part) for rank in range(world_size)]


def _in_sub_groups(rank: int, offset: int, size: int, ends: list[int]) -> list[tuple[int, int, int, int]]:
    """(rank, sub-group, first element in it, elements) of a range of a rank's sub-groups."""
    found = []
    while size > 0:
        sub = bisect_right(ends, offset)
        if sub == len(ends):
            break
        count = min(size, ends[sub] - offset)
        found.append((rank, sub, offset - (ends[sub - 1] if sub else 0), count))
        offset, size = offset + count, size - count
    return found


def _sub_group_states(checkpoint: DeepSpeedCheckpoint, states: dict[str, Any]) -> list[dict[str, Any]]:
    base, flat = states.get("optimizer_state_dict") or {}, states["fp32_flat_groups"]
    if not base:
        return [{} for _ in flat]
    found = [_torch_state(base, number, group) for group in base["param_groups"] for number in group["params"]]
    if len(found) != len(flat):
        raise _wrong(checkpoint, f"{len(flat)} flat groups have optimizer state for {len(found)}")
    return found


# both


def _torch_state(base: dict[str, Any], number: int, group: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter in the ``state_dict`` of an optimizer; some keep the step in its group."""
    state = dict(base["state"].get(number) or {})
    return state if "step" in state or "step" not in group or not state else {**state, "step": group["step"]}


def _scalars(name: str, state: dict[str, Any]) -> list[Gathered]:
    """What an optimizer keeps beside tensors of the parameter's size."""
    return [
        scalar(f"optimizer.{name}.{key}", value)
        for key, value in state.items()
        if (isinstance(value, InFile) and not value.shape) or type(value) in {int, float}
    ]


def _checked(checkpoint: DeepSpeedCheckpoint, name: str, shape: tuple[int, ...], parts: list[Part]) -> Gathered:
    """A tensor whose parts are all of it, each inside of its source."""
    dtypes = {part.source.dtype for part in parts if isinstance(part.source, InFile)} or {"F32"}
    inside = all(part.start + part.length <= len_of(part) for part in parts)
    if len(dtypes) != 1 or not inside or sum(part.length for part in parts) != math.prod(shape):
        raise _wrong(checkpoint, f"{name.partition('.')[2]!r} does not fit its shape {shape}")
    return Gathered(name, shape, dtypes.pop(), tuple(parts))


def len_of(part: Part) -> int:
    """Elements of what a part is taken from."""
    return part.source.length if isinstance(part.source, InFile) else 1


def _wrong(checkpoint: DeepSpeedCheckpoint, problem: str) -> CheckpointError:
    path = str(checkpoint.path)
    return CheckpointError(f"DeepSpeed checkpoint {path!r}: {problem}; is it complete, and of a known version?", path)
