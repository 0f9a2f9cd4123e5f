"""A DeepSpeed checkpoint of stage 0: one file, whose optimizer state does not say which parameter is which.

An optimizer knows its parameters by group and place only. So the module's parameters, in order, are dealt to the groups:
a parameter may be the next of a group when its shape fits and, where the group holds fp32 masters of 16-bit weights, when
the master rounds to the weight. Those that no group takes are frozen. When there are two ways, nothing is guessed.

Source: DeepSpeed 0.19.8, runtime/fp16/unfused_optimizer.py (fp32_groups), runtime/fp16/fused_optimizer.py (fp32_groups_flat)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.convert import converted
from hpc_ds.checkpoint.deepspeed_shards import Gathered, Part, scalar, whole
from hpc_ds.checkpoint.torch_file import InFile
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from hpc_ds.checkpoint.deepspeed_files import DeepSpeedCheckpoint

Slot = tuple[int, ...]  # for each group, how far it is dealt: in parameters, or in elements where it is flat


def trainable(checkpoint: DeepSpeedCheckpoint, weights: dict[str, InFile]) -> list[Gathered]:
    """Masters and optimizer state of the parameters that the optimizer has.

    Args:
        checkpoint: of stage 0.
        weights: the module's parameters in order, each once.

    Raises:
        CheckpointError: it cannot be told which parameter is which.
    """
    states = checkpoint.model[0].get("optimizer")
    if not states:
        return []
    base = states.get("optimizer_state_dict", states)
    groups = [[base["state"].get(number) or {} for number in group["params"]] for group in base["param_groups"]]
    flats = states.get("fp32_groups_flat")
    masters = states.get("fp32_groups")
    if flats is not None:
        dealt = _deal(checkpoint, weights, _Flat(flats))
        return [
            entry
            for name, (group, first) in dealt.items()
            for entry in _flat(name, weights[name], flats[group], first, groups[group])
        ]
    dealt = _deal(checkpoint, weights, _Listed(groups, masters))
    found = []
    for name, (group, place) in dealt.items():
        found.append(whole(f"model.{name}", masters[group][place] if masters else weights[name]))
        found += _state(name, groups[group][place])
    return found


class _Listed:
    """Groups that list their parameters."""

    def __init__(self, groups: list[list[dict[str, Any]]], masters: list[list[InFile]] | None) -> None:
        self._groups, self._masters = groups, masters
        self.ends = tuple(len(group) for group in groups)

    def step(self, weight: InFile, group: int, place: int) -> int | None:
        """How far ``group`` is dealt after it took ``weight`` as its next parameter; None where that does not fit."""
        if place >= self.ends[group]:
            return None
        if self._masters is not None:
            master = self._masters[group][place]
            return place + 1 if master.shape == weight.shape and _rounds_to(master, 0, weight) else None
        shapes = {
            value.shape for value in self._groups[group][place].values() if isinstance(value, InFile) and value.shape
        }
        return place + 1 if shapes <= {weight.shape} else None


class _Flat:
    """Groups whose parameters stand one after another in one tensor."""

    def __init__(self, flats: list[InFile]) -> None:
        self._flats = flats
        self.ends = tuple(flat.length for flat in flats)

    def step(self, weight: InFile, group: int, first: int) -> int | None:
        """See ``_Listed``."""
        end = first + weight.length
        return end if end <= self.ends[group] and _rounds_to(self._flats[group], first, weight) else None


def _deal(
    checkpoint: DeepSpeedCheckpoint, weights: dict[str, InFile], groups: _Listed | _Flat
) -> dict[str, tuple[int, int]]:
    """Which group, and which place in it, each trainable parameter has."""
    begin: Slot = tuple(0 for _ in groups.ends)
    ways: dict[Slot, int] = {begin: 1}  # states of the groups -> number of ways to come there
    history: list[dict[Slot, tuple[Slot, int | None]]] = []
    for weight in weights.values():
        later: dict[Slot, int] = {}
        came_from: dict[Slot, tuple[Slot, int | None]] = {}
        for slot, count in ways.items():
            for after, group in _choices(groups, weight, slot):
                later[after] = later.get(after, 0) + count
                came_from[after] = (slot, group)
        ways = later
        history.append(came_from)
    if ways.get(groups.ends, 0) != 1:
        how = "which parameter is which" if ways.get(groups.ends) else "how its parameters fit its optimizer"
        raise CheckpointError(
            f"DeepSpeed checkpoint {str(checkpoint.path)!r}: it does not say {how}; save it once at ZeRO stage 1 and import that",
            str(checkpoint.path),
        )
    found: dict[str, tuple[int, int]] = {}
    slot = groups.ends
    for name, came_from in zip(reversed(weights), reversed(history), strict=True):
        slot, group = came_from[slot]
        if group is not None:
            found[name] = (group, slot[group])
    return dict(reversed(found.items()))


def _choices(groups: _Listed | _Flat, weight: InFile, slot: Slot) -> list[tuple[Slot, int | None]]:
    """What the groups are after each way to deal a parameter; the last way is that it is frozen."""
    taken = []
    for group, place in enumerate(slot):
        after = groups.step(weight, group, place)
        if after is not None:
            taken.append(((*slot[:group], after, *slot[group + 1 :]), group))
    return [*taken, (slot, None)]


def _rounds_to(master: InFile, first: int, weight: InFile) -> bool:
    data = bytearray(weight.length * 4)
    master.read_into(memoryview(data), first * 4)
    return bytes(converted(bytes(data), "F32", weight.dtype)) == weight.all_bytes()


def _flat(name: str, weight: InFile, master: InFile, first: int, states: list[dict[str, Any]]) -> list[Gathered]:
    found = [Gathered(f"model.{name}", weight.shape, master.dtype, (Part(master, first, weight.length),))]
    for key, value in (states[0] if states else {}).items():
        if isinstance(value, InFile) and value.length == master.length and value.shape:
            parts = (Part(value, first, math.prod(weight.shape)),)
            found.append(Gathered(f"optimizer.{name}.{key}", weight.shape, value.dtype, parts))
        elif isinstance(value, InFile) or type(value) in {int, float}:
            found.append(scalar(f"optimizer.{name}.{key}", value))
    return found


def _state(name: str, state: dict[str, Any]) -> list[Gathered]:
    return [
        scalar(f"optimizer.{name}.{key}", value)
        for key, value in state.items()
        if isinstance(value, InFile) or type(value) in {int, float}
    ]
