"""What a script for DeepSpeed keeps in ``client_state``, in the saves that the run makes by itself; only under that name.

Such a script gives it with its own saves only, so in a save of the run's it is as old as the script's last. What it says of steps
would then be behind the weights, and a script that goes on from there would take steps twice. So the numbers that counted
with the engine when the script gave them go on counting: ``{"epoch": 2, "step": 500}`` given at step 500 is
``{"epoch": 2, "step": 517}`` in the save of step 517. Epochs are those of the engine's own loader; a loader of the script's
begins its epoch anew.

Where the script has made no save before, there is none. It cannot expect that, and indexes it at once: it finds the engine's
counts by the names that such scripts give them.

A script for hpc_ds finds what it gave, as it gave it: it has ``engine.global_steps`` and ``register_state``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_ds.engine.engine import Engine

# Word in the name of a number -> the engine's counters that it may go with.
_COUNTERS = {
    "step": ("global_steps", "micro_steps"),
    "iter": ("global_steps", "micro_steps"),
    "sample": ("global_samples",),
    "epoch": ("epoch",),
}
_BEHIND = (0, 1)  # scripts save what they have done, or what they did last, from 0

_NAMES_OF_STEPS = ("step", "steps", "global_step", "global_steps", "iteration", "iter")


def going_with(client: Any, engine: Engine) -> dict[str, tuple[str, int]]:
    """Which numbers of a client state count with the engine now: key -> its counter, and how far it is behind."""
    found: dict[str, tuple[str, int]] = {}
    for key, value in client.items() if isinstance(client, dict) else ():
        if not isinstance(key, str) or not isinstance(value, int) or isinstance(value, bool):
            continue
        for name in (name for word, names in _COUNTERS.items() if word in key.lower() for name in names):
            count = _count(engine, name)
            if key not in found and count is not None and count - value in _BEHIND:
                found[key] = name, count - value
    return found


def brought_up(client: Any, counting: dict[str, tuple[str, int]], engine: Engine) -> Any:
    """The client state with those numbers as they would be now."""
    if not counting:
        return client
    now = {key: (_count(engine, name), behind) for key, (name, behind) in counting.items()}
    return {**client, **{key: count - behind for key, (count, behind) in now.items() if count is not None}}


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
