"""accelerate in a run of hpcds: its ranks meet as ours do, and DeepSpeed without a GPU counts its processes.

Two things in ``accelerate.state.PartialState`` stand in the way of a script that does not know where it runs:

- it takes its rank from RANK and LOCAL_RANK, which srun does not set, and makes the process group itself, from MASTER_ADDR
  and MASTER_PORT, which nobody has set under srun or site ``local``
- with DeepSpeed and without an accelerator it takes each process for the only one, unless ``use_cpu`` is given, which
  leaves DeepSpeed's own start out

So the variables are set, the group is made before by ``init_distributed``, and a process of several without an accelerator
is told what it is.
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


def attach(module: ModuleType) -> None:
    """Change ``accelerate.state``, once, as it is loaded."""
    state = module.PartialState
    if hasattr(state, _MARK):
        return
    setattr(state, _MARK, True)
    os.environ.update(variables_of_the_rank(os.environ))
    own_init, own_backend = state.__init__, state._prepare_backend  # noqa: SLF001 - accelerate has no other door

    @functools.wraps(own_init)
    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        if not self._shared_state and is_alone_below_a_rank(os.environ):
            with _untold():
                own_init(self, cpu, **kwargs)
            return
        if self._shared_state or not _is_rank():
            own_init(self, cpu, **kwargs)
            return
        _meet(kwargs.get("timeout"))
        with _without_asking_for_an_address():
            own_init(self, cpu, **kwargs)

    @functools.wraps(own_backend)
    def prepare_backend(self: Any, cpu: bool, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        backend, kind = own_backend(self, cpu, *args, **kwargs)
        if backend is None and _is_rank() and _wants_deepspeed():
            return "gloo", module.DistributedType.MULTI_CPU
        return backend, kind

    state.__init__ = init
    state._prepare_backend = prepare_backend  # noqa: SLF001 - as above


def _is_rank() -> bool:
    return os.environ.get("LOCAL_RANK", "-1") != "-1" and "WORLD_SIZE" in os.environ


def _wants_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _meet(timeout: timedelta | None) -> None:
    """Collective. Make the process group as hpc_ds makes it, where there is none."""
    from hpc_ds.runtime.process_group import init_distributed

    init_distributed(timeout=timeout)


@contextmanager
def _untold() -> Iterator[None]:
    """What a rank has started (an evaluation, say) is alone, though it has the variables of the rank."""
    told = {name: os.environ.pop(name) for name in told_to_the_rank(os.environ)}
    try:
        yield
    finally:
        os.environ.update(told)


@contextmanager
def _without_asking_for_an_address() -> Iterator[None]:
    """Ranks on CPUs of several hosts must have MASTER_ADDR, for accelerate, even when they have met already."""
    missing = "MASTER_ADDR" not in os.environ
    if missing:
        os.environ["MASTER_ADDR"] = "localhost"
    try:
        yield
    finally:
        if missing:
            os.environ.pop("MASTER_ADDR", None)
