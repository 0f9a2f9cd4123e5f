"""What every schedule of ours is: a law from the index of a step to the rate of each parameter group.

``step()`` sets the index: 0 after the first step that was applied, -1 before it. The rate is valid from construction, and a
checkpoint keeps nothing but the index: all else comes from the config, so a changed config takes effect on resume.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# One for all groups, or one for each; groups that are added later have the last one.
PerGroup = float | list[float]


class Schedule:
    """A learning rate for every parameter group as a function of the steps taken."""

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._own_rates: list[float] = []
        self._apply()

    def rate(self, i: int, group: int) -> float:
        """The learning rate at index ``i`` of a group, by its number."""
        raise NotImplementedError

    def own_rate(self, group: int) -> float:
        """The rate that the optimizer asked for, for this group."""
        return self._own_rates[group]

    def get_lr(self) -> list[float]:
        """The rate of every group at the present index."""
        groups = self.optimizer.param_groups
        self._own_rates += [float(group["lr"]) for group in groups[len(self._own_rates) :]]
        return [self.rate(self.last_batch_iteration, number) for number in range(len(groups))]

    def get_last_lr(self) -> list[float]:
        """The rates that the optimizer has now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next index, or to a given one."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The index."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def per_group(optimizer: torch.optim.Optimizer, name: str, value: Any) -> list[float]:
    """A parameter of a schedule, by group.

    Raises:
        ValueError: a list of another length than there are groups, or what is no number.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, list | tuple) and len(value) != len(optimizer.param_groups):
        raise ValueError(f"{name} {value!r} is not one number for each of the {len(optimizer.param_groups)} groups")
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise ValueError(f"{name} {one!r} is not a number")  # noqa: TRY004 - a wrong value of a config
    return [float(one) for one in values]


def of_group(values: list[float], group: int) -> float:
    """The value of a group; the last one for groups that were added later."""
    return values[min(group, len(values) - 1)]


def check_steps(name: str, steps: object) -> None:
    """Refuse a number of steps that is none.

    Raises:
        ValueError: it is not a whole number above 0.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} {steps!r} is not a whole number above 0")
