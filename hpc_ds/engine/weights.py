"""Whole weights of a sharded module: gathered one tensor at a time, saved as one file, taken up again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hpc_ds.checkpoint.agree import on_rank_0
from hpc_ds.engine.piece import Piece, own_range
from hpc_ds.engine.sharding import gather_flat
from hpc_ds.engine.state import tied_names
from hpc_ds.errors import ConfigError
from hpc_ds.runtime.roll_call import roll_call

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from hpc_ds.engine.sharding import Kept, Sharding


def whole_state(
    sharding: Sharding, dtype: torch.dtype | None, *, frozen: bool = True
) -> dict[str, torch.Tensor] | None:
    """Collective. The module's state dict, whole, on the CPU of rank 0; None on other ranks.

    Args:
        sharding: the module.
        dtype: of floating-point tensors; None: each in the type of its master.
        frozen: with parameters that are not trained.
    """
    roll_call("module_state_dict")
    found = {}
    for name, whole in _gathered_one_by_one(sharding, frozen=frozen):
        if dist.get_rank() == 0:
            cast = dtype if dtype is not None and whole.is_floating_point() else whole.dtype
            found[name] = whole.to("cpu", cast)
    if dist.get_rank() != 0:
        return None
    # In the module's order, and under every name of what is tied.
    aliases = tied_names(sharding.module)
    return {
        name: found[aliases.get(name, name)]
        for name in sharding.module.state_dict(keep_vars=True)
        if aliases.get(name, name) in found
    }


def save_whole(sharding: Sharding, path: Path, dtype: torch.dtype, *, frozen: bool = True) -> None:
    """Collective. Write the whole weights as one file that the plain module loads, whole or not at all."""
    state = whole_state(sharding, dtype, frozen=frozen)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        torch.save(state, temporary)
        temporary.replace(path)

    on_rank_0(f"weights {str(path)!r}: not saved", write)


def load_whole(sharding: Sharding, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
    """Collective. Take up whole weights, the same on every rank.

    Raises:
        ConfigError: names or shapes differ from the module's.
    """
    roll_call("load_module_state_dict")
    places: dict[str, Piece | Kept] = {piece.name: piece for piece in sharding.pieces}
    places |= {kept.name: kept for kept in sharding.kept()}
    aliases = tied_names(sharding.module)
    missing = [name for name in places if name not in {aliases.get(given, given) for given in state}]
    unknown = [name for name in state if aliases.get(name, name) not in places]
    if strict and (missing or unknown):
        problem = f"it has no {missing[0]!r}" if missing else f"the module has no {unknown[0]!r}"
        raise ConfigError(f"state dict: {problem}; pass strict=False to take up what fits")
    fitting = [
        (given, value, place) for given, value in state.items() if (place := places.get(aliases.get(given, given)))
    ]
    for given, value, place in fitting:
        if value.shape != place.shape:
            raise ConfigError(
                f"state dict: {given!r} has shape {tuple(value.shape)}, the module {tuple(place.shape)}; load it into the "
                "model that it came from"
            )
    sharding.adopt()  # what a script wrote to parameters that are not in the state dict
    for _, value, place in fitting:
        own = place.master if isinstance(place, Piece) else place.tensor
        with torch.no_grad():
            own.copy_(own_range(value, place.start, own))
    sharding.publish()


def _gathered_one_by_one(sharding: Sharding, *, frozen: bool) -> Iterator[tuple[str, torch.Tensor]]:
    sharding.adopt()
    for index, piece in enumerate(sharding.pieces):
        yield piece.name, sharding.whole_value(index)
    for kept in sharding.kept():
        if frozen or not kept.frozen:
            whole = gather_flat(kept, kept.tensor)
            if whole is not None:
                yield kept.name, whole
