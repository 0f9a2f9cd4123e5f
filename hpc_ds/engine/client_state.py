"""What a script keeps in ``client_state``, in the saves that the run makes by itself.

A script gives it with its own saves only, so in a save of the run's it is as old as the script's last. What it says of steps
would then be behind the weights, and a script that goes on from there would take steps twice. So the numbers that counted
with the engine when the script gave them go on counting: ``{"epoch": 2, "step": 500}`` given at step 500 is
``{"epoch": 2, "step": 517}`` in the save of step 517.
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
}
_BEHIND = (0, 1)  # scripts save what they have done, or what they did last, from 0


def going_with(client: Any, engine: Engine) -> dict[str, tuple[str, int]]:
    """Which numbers of a client state count with the engine now: key -> its counter, and how far it is behind."""
    found: dict[str, tuple[str, int]] = {}
    for key, value in client.items() if isinstance(client, dict) else ():
        if not isinstance(key, str) or not isinstance(value, int) or isinstance(value, bool):
            continue
        names = [name for word, counters in _COUNTERS.items() if word in key.lower() for name in counters]
        behind = {name: getattr(engine, name) - value for name in names}
        fitting = [name for name in names if behind[name] in _BEHIND]
        if fitting and value > 0:
            found[key] = fitting[0], behind[fitting[0]]
    return found


def brought_up(client: Any, counting: dict[str, tuple[str, int]], engine: Engine) -> Any:
    """The client state with those numbers as they would be now."""
    if not counting:
        return client
    return {**client, **{key: getattr(engine, name) - behind for key, (name, behind) in counting.items()}}
