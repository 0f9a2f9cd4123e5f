"""What a script for DeepSpeed keeps in ``client_state``, in the saves that the run makes by itself; only under that name.

Such a script gives it with its own saves only, so in a save of the run's it is as old as the script's last. What it says of steps
would then be behind the weights, and a script that goes on from there would take steps twice. So the numbers that counted
with the engine when the script gave them go on counting: ``{"epoch": 2, "step": 500}`` given at step 500 is
``{"epoch": 2, "step": 517}`` in the save of step 517. Epochs are those of the engine's own loader; a loader of the script's
begins its epoch anew.

A number that only happens to be equal, as ``steps_per_epoch``, must stay. So it counts only if that is its whole name, and,
once the script has saved twice, if it went with the engine both times.

Where the script has made no save before, there is none. It cannot expect that, and indexes it at once: it finds the engine's
counts by the names that such scripts give them.

A script for hpc_ds finds what it gave, as it gave it: it has ``engine.global_steps`` and ``register_state``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hpc_ds.runtime.by_name import goes_by_deepspeed

if TYPE_CHECKING:
    from hpc_ds.engine.engine import Engine

# Whole name of a number, without its case -> the engine's counters that it may go with. Those with "num" are the size of a data
# set and the epochs asked for as often as a count; of steps they are equal to the engine's only when both are.
_OF_STEPS = ("global_steps", "micro_steps")
_COUNTERS = {
    re.compile(r"((current|cur|last|num|completed|global|micro)_)?(steps?|iter|iters|iterations?)"): _OF_STEPS,
    re.compile(r"((current|last|consumed|global)_)?samples"): ("global_samples",),
    re.compile(r"((current|cur|last)_)?epoch"): ("epoch",),
}
_BEHIND = (0, 1)  # scripts save what they have done, or what they did last, from 0

_NAMES_OF_STEPS = ("step", "steps", "global_step", "global_steps", "iteration", "iter")


class ClientState:
    """The client state of one engine's script.

    Attributes:
        given: what the script gave with its last save, or found in its last load.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counting: dict[
            str, dict[str, int]
        ] = {}  # key -> counters that it goes with, and how far it is behind each
        self._compares = False
        self.given: Any = {}

    def saved(self, given: Any) -> None:
        """Take note of what the script has saved."""
        before = self.given if self._compares and isinstance(self.given, dict) else {}
        found = _going_with(given, self._engine)
        for key in found.keys() & before.keys():
            went = self._counting.get(key, {})
            found[key] = {name: behind for name, behind in found[key].items() if name in went}
        self._take(given, found)
        self._compares = self._engine.global_steps > 0  # before the first step nothing can be told

    def loaded(self, kept: Any) -> None:
        """Take note of what a load has brought: the script's saves begin anew."""
        self._take(kept, _going_with(kept, self._engine))
        self._compares = False

    def _take(self, given: Any, found: dict[str, dict[str, int]]) -> None:
        self.given, self._counting = given, {key: counters for key, counters in found.items() if counters}

    def now(self) -> Any:
        """The client state with those numbers as they would be now; under another name than DeepSpeed's as it was given."""
        if not self._counting or not goes_by_deepspeed():
            return self.given
        brought = dict(self.given)
        for key, counters in self._counting.items():
            name, behind = next(iter(counters.items()))
            count = _count(self._engine, name)
            if count is not None:
                brought[key] = count - behind
        return brought


def _going_with(client: Any, engine: Engine) -> dict[str, dict[str, int]]:
    """Which numbers of a client state may count with the engine: key -> its counters, and how far it is behind each."""
    found: dict[str, dict[str, int]] = {}
    for key, value in client.items() if isinstance(client, dict) else ():
        if not isinstance(key, str) or not isinstance(value, int) or isinstance(value, bool):
            continue
        names = next((names for pattern, names in _COUNTERS.items() if pattern.fullmatch(key.lower())), ())
        counts_now = {name: count for name in names if (count := _count(engine, name)) is not None}
        found[key] = {name: count - value for name, count in counts_now.items() if count - value in _BEHIND}
    return found


def counts(engine: Engine) -> dict[str, int]:
    """For a script that has saved none: steps and samples taken and, with the engine's own loader, the last whole epoch."""
    found = dict.fromkeys(_NAMES_OF_STEPS, engine.global_steps) | {"samples": engine.global_samples}
    epoch = _count(engine, "epoch")
    return found if epoch is None else {**found, "epoch": epoch - 1}


def _count(engine: Engine, name: str) -> int | None:
    """How far a counter is; None before the first step, when any number may be one, and for epochs of nobody knows which data."""
    if name != "epoch":
        return int(getattr(engine, name)) or None
    loader = engine.training_dataloader
    return None if loader is None else loader.position.epoch_of(loader.position.samples)
