"""How far a run is and how fast it goes, from the end of its events: never from all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RECENT_STEPS = 50


@dataclass(frozen=True, slots=True)
class Progress:
    """What the last steps tell.

    Attributes:
        step, loss: of the last step; None before the first, and where a script keeps its loss to itself.
        step_at: when it was done, seconds since the epoch.
        attempt: which attempt took it.
        steps_per_s: over the last 50 steps of that attempt, saves included; None of fewer than two.
    """

    step: int | None = None
    loss: float | None = None
    step_at: float | None = None
    attempt: int | None = None
    steps_per_s: float | None = None


def progress(events: Sequence[dict[str, Any]]) -> Progress:
    """The progress that events (the last ones are enough) tell of."""
    steps = [event for event in events if event.get("event") == "step" and isinstance(event.get("step"), int)]
    if not steps:
        return Progress()
    last = steps[-1]
    recent = [step for step in steps[-_RECENT_STEPS:] if step.get("attempt") == last.get("attempt")]
    return Progress(last["step"], finite(last.get("loss")), last.get("time"), last.get("attempt"), _rate(recent))


def finite(number: float | None) -> float | None:
    """A number that JSON can hold, else None."""
    return number if number is not None and math.isfinite(number) else None


def _rate(steps: Sequence[dict[str, Any]]) -> float | None:
    times = [float(step["time"]) for step in steps if "time" in step]
    passed = times[-1] - times[0] if len(times) > 1 else 0.0
    return (len(times) - 1) / passed if passed > 0 else None


def steps_in_all(config: Mapping[str, Any]) -> int | None:
    """How many steps a run takes: its job's ``steps``, else where its schedule ends; None where neither says."""
    for number in (config.get("steps"), _in(config, "training", "scheduler", "params", "total_num_steps")):
        if isinstance(number, int | float) and number >= 1:
            return int(number)
    return None


def samples_per_step(config: Mapping[str, Any]) -> int | None:
    """Samples in one optimizer step over all ranks; None where the job's training config does not say."""
    whole = _in(config, "training", "train_batch_size")
    if isinstance(whole, int):
        return whole
    micro = _in(config, "training", "train_micro_batch_size_per_gpu")
    accumulation = _in(config, "training", "gradient_accumulation_steps") or 1
    if not isinstance(micro, int) or not isinstance(accumulation, int):
        return None
    return micro * accumulation * world_size(config)


def world_size(config: Mapping[str, Any]) -> int:
    """Ranks of a job."""
    gpus, tasks = (_in(config, "resources", key) for key in ("gpus_per_node", "tasks_per_node"))
    return int(_in(config, "resources", "nodes") or 1) * int(tasks or max(int(gpus or 0), 1))


def _in(config: Mapping[str, Any], *keys: str) -> Any:
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
