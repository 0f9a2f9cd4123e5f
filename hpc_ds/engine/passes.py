"""The backward passes of one step: each begins whole, ends whole, and scales its gradients like the others."""

from __future__ import annotations

from hpc_ds.errors import ConfigError


class Passes:
    """What is known of the passes since the last step."""

    def __init__(self) -> None:
        self._under_way = False
        self._too_large: int | None = None
        self._scaled = 0

    @property
    def too_large(self) -> int:
        """How many times larger than their share of the step the gradients are."""
        return self._too_large or 1

    def loss_is_scaled(self) -> None:
        """A script scales a loss itself, for a pass to come."""
        self._scaled += 1

    def begin(self, too_large: int) -> None:
        """Begin a pass whose gradients are too large by a factor.

        Raises:
            ConfigError: the pass before broke off, or had another factor.
        """
        if self._under_way:
            raise ConfigError(
                "backward: an earlier pass ended in an error; call engine.zero_grad(), and begin the step anew"
            )
        self._under_way = True
        if self._too_large not in {None, too_large}:
            raise ConfigError(
                "backward: passes of one step began with engine.backward(loss) and with loss.backward(), which scale gradients "
                "differently; use one of them"
            )
        self._too_large = too_large

    def begin_plain(self, too_large: int, loss_scale: float) -> None:
        """Begin a pass of the script's own.

        Raises:
            ConfigError: see ``begin``; or the loss must be scaled and is not.
        """
        self.begin(too_large)
        if loss_scale != 1.0 and not self._scaled:
            raise ConfigError(
                "loss.backward(): fp16 needs the loss scaled; call engine.backward(loss), or engine.scale(loss).backward()"
            )
        self._scaled = max(self._scaled - 1, 0)

    def end(self) -> None:
        """The pass has reached its end."""
        self._under_way = False

    def forget(self) -> None:
        """The gradients are gone, and with them what is known of their passes."""
        self._under_way, self._too_large, self._scaled = False, None, 0
