"""accelerate on ranks of hpcds: they meet as ours do, and without a GPU they are counted.

Two things in ``accelerate.state.PartialState`` stand in the way of a script that does not know where it runs:

- it takes its rank from RANK and LOCAL_RANK, which srun does not set, and makes the process group itself, from MASTER_ADDR
  and MASTER_PORT, which nobody has set under srun or site ``local``
- without an accelerator it takes each process for the only one, unless ``use_cpu`` is given, which leaves DeepSpeed's own
  start out

So the variables are set, ``init_distributed`` makes the group before accelerate would, and several processes without an
accelerator are told that they are several. Groups of other backends than gloo and nccl are left to accelerate.
"""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpc_ds.compat.environment import variables_of_the_rank
from hpc_ds.runtime.descent import is_alone_below_a_rank, told_to_the_rank

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta
    from types import ModuleType

_MARK = "_hpc_ds_attached"
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def attach(module: ModuleType) -> None:
    """Change ``accelerate.state``, once, as it is loaded."""
    state = module.PartialState
    if hasattr(state, _MARK):
        return
    setattr(state, _MARK, True)
    os.environ.update(variables_of_the_rank(os.environ))
    own_init, own_backend = state.__init__, state._prepare_backend  # noqa: SLF001 - accelerate has no other door
    timeouts: list[timedelta | None] = []

    @functools.wraps(own_init)
    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        timeouts[:] = [kwargs.get("timeout")]
        with _address_left_alone(), _untold_below_a_rank():
            own_init(self, cpu, **kwargs)

    @functools.wraps(own_backend)
    def prepare_backend(self: Any, cpu: bool, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        backend, kind = own_backend(self, cpu, *args, **kwargs)
        if backend not in {None, "gloo", "nccl"} or not _is_rank():
            return backend, kind
        _meet(backend, timeouts[0] if timeouts else None)
        return ("gloo", module.DistributedType.MULTI_CPU) if backend is None else (backend, kind)

    state.__init__ = init
    state._prepare_backend = prepare_backend  # noqa: SLF001 - as above


def _is_rank() -> bool:
    """Whether this process is one of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_RANK", "-1") != "-1" and size.isdecimal() and int(size) > 1


def _meet(backend: str | None, timeout: timedelta | None) -> None:
    """Collective. Make the process group as hpc_ds makes it, where there is none."""
    from hpc_ds.runtime.process_group import init_distributed

    init_distributed("gloo" if backend == "gloo" else None, timeout=timeout)
    # It asks ranks on CPUs of several hosts for an address, even when they have met.
    os.environ.setdefault("MASTER_ADDR", "localhost")


@contextmanager
def _untold_below_a_rank() -> Iterator[None]:
    """What a rank has started (an evaluation, say) is alone, though it has the variables of the rank."""
    names = told_to_the_rank(os.environ) if is_alone_below_a_rank(os.environ) else []
    told = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(told)


@contextmanager
def _address_left_alone() -> Iterator[None]:
    """What accelerate says of an address where there is none must not be taken for one by whoever meets later."""
    before = {name: os.environ.get(name) for name in _ADDRESS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
