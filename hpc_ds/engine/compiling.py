"""``compile``: torch.compile of each block by itself.

Blocks of one class share what is compiled, so a model of 48 layers compiles one. Sharding and compiling may come in either
order: hooks that gather and drop parameters run between the compiled parts. A checkpoint inside of a block is compiled with
it; one that keeps its inputs in host memory divides the block in two.

Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.config.model import nearest
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


def compile_blocks(
    blocks: Iterable[nn.Module], backend: str = "inductor", kwargs: dict[str, Any] | None = None
) -> None:
    """Compile blocks in place; they keep class, names and parameters, and compile at their first forward.

    Args:
        blocks: those of the engine, or the whole module as the only one.
        backend: one that torch knows, or that the script has registered.
        kwargs: more arguments of torch.compile.

    Raises:
        ConfigError: an unknown backend, or an argument that torch.compile does not have.
    """
    kwargs = kwargs or {}
    check_compile(backend, kwargs)
    for block in dict.fromkeys(blocks):
        block.compile(backend=backend, **kwargs)


def check_compile(backend: str, kwargs: dict[str, Any]) -> None:
    """Refuse what torch.compile would refuse at the first forward.

    Raises:
        ConfigError: see ``compile_blocks``.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(
            f"compile.backend {backend!r}: not a backend of torch.compile; known: {', '.join(known)}",
            key="compile.backend",
            value=backend,
        )
    possible = [name for name in inspect.signature(torch.compile).parameters if name not in {"model", "backend"}]
    for name, value in kwargs.items():
        if name not in possible:
            raise ConfigError(
                f"compile.kwargs.{name}: not an argument of torch.compile; {nearest(name, possible)}",
                key=f"compile.kwargs.{name}",
                value=value,
            )
