"""In which type each parameter computes, and which modules compute in another one than what is around them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _NormBase

from hpc_ds.engine.sharding import stands_alone, uses_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

    from hpc_ds.engine.sharding import Precision

_LEAST_APART = 1 << 16  # elements: below, gathering a module by itself costs more than to keep it whole


def compute_dtypes(module: nn.Module, precision: Precision) -> dict[nn.Parameter, torch.dtype]:
    """The type of every parameter in forward and backward: the config's, else its own.

    Batch normalisation keeps its own in any case: its running statistics do, and its kernels want both alike.
    """
    wanted = precision.compute
    if wanted is None:
        return {parameter: parameter.dtype for parameter in module.parameters()}
    statistics = [layer for layer in module.modules() if isinstance(layer, _NormBase) and precision.buffers is None]
    kept = {parameter for layer in statistics for parameter in layer.parameters(recurse=False)}
    return {
        parameter: wanted if parameter.is_floating_point() and parameter not in kept else parameter.dtype
        for parameter in module.parameters()
    }


def usual_type(types: Mapping[nn.Parameter, tuple[torch.dtype, torch.dtype]]) -> tuple[torch.dtype, torch.dtype] | None:
    """The types that most elements have."""
    elements: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for parameter, kind in types.items():
        elements[kind] += parameter.numel()
    return elements.most_common(1)[0][0] if elements else None


def modules_apart(
    model: nn.Module, block: nn.Module, types: Mapping[nn.Parameter, tuple[torch.dtype, torch.dtype]]
) -> list[nn.Module]:
    """The large modules inside of a block whose parameters all have one type, and not the block's usual one.

    Args:
        model: around the block.
        block: may be the model.
        types: of the parameters of the block that are to be sharded: compute and master type.
    """
    return list(dict.fromkeys(_apart(block, types, usual_type(types), uses_of(model))))


def _apart(
    module: nn.Module,
    types: Mapping[nn.Parameter, tuple[torch.dtype, torch.dtype]],
    usual: tuple[torch.dtype, torch.dtype] | None,
    uses: Counter[int],
) -> Iterator[nn.Module]:
    for child in module.children():
        inside = [parameter for parameter in child.parameters() if parameter in types]
        kinds = {types[parameter] for parameter in inside}
        large = sum(parameter.numel() for parameter in inside) >= _LEAST_APART
        if large and len(kinds) == 1 and kinds != {usual} and stands_alone(child, uses):
            yield child
        elif large:
            yield from _apart(child, types, usual, uses)
