"""The loss scale of fp16 training: arithmetic on three numbers, the same on every rank.

The rule is DeepSpeed's ZeRO scaler at every stage: an overflow first uses up the hysteresis, then halves the scale; a
window of good steps doubles it and refills the hysteresis. A start below the minimum rises to it at the first overflow.

Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2; https://www.deepspeed.ai/docs/config-json,
and release 0.19.8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_ds.errors import DivergedError

if TYPE_CHECKING:
    from hpc_ds.config.training import Fp16Config


class LossScale:
    """A factor on the loss; 1 where compute is not fp16.

    Attributes:
        value: the factor of the next step.
    """

    def __init__(self, config: Fp16Config) -> None:
        self._config = config
        self._dynamic = config.enabled and config.loss_scale == 0
        if self._dynamic:
            self.value = float(2**config.initial_scale_power)
        else:
            self.value = config.loss_scale if config.enabled else 1.0
        self._iteration = 0
        self._last_overflow = -1
        self._hysteresis = config.hysteresis

    @property
    def exhausted(self) -> bool:
        """Whether the next overflow ends the training: time to look which gradient it is."""
        return self._dynamic and self._hysteresis <= 1 and self.value == self._config.min_loss_scale

    def update(self, overflowed: bool, culprit: str | None = None) -> None:
        """Learn from one step.

        Args:
            overflowed: it had a gradient that is not finite, on any rank.
            culprit: what is known of it, as "gradient of 'head.weight' on rank 1 is not finite".

        Raises:
            DivergedError: it overflowed at the smallest scale.
        """
        if self._dynamic:
            if overflowed:
                self._shrink(culprit or "gradients overflow")
            else:
                self._grow_if_due()
        self._iteration += 1

    def _shrink(self, reason: str) -> None:
        if self.exhausted:
            raise DivergedError(
                f"fp16 loss scale {self.value:g}: {reason} at the smallest scale; lower the learning rate, or use bf16, and "
                "start from an earlier checkpoint"
            )
        if self._hysteresis > 1:
            self._hysteresis -= 1
        else:
            self.value = max(self.value / 2, self._config.min_loss_scale)
        self._last_overflow = self._iteration

    def _grow_if_due(self) -> None:
        config = self._config
        if config.consecutive_hysteresis:
            self._hysteresis = config.hysteresis
        good = self._iteration - self._last_overflow - 1
        if good > 0 and good % config.loss_scale_window == 0:
            self._hysteresis = config.hysteresis
            self.value *= 2

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing of a static scale, so that one which becomes dynamic begins as the config says."""
        if not self._dynamic:
            return {}
        return {
            "value": self.value,
            "iteration": self._iteration,
            "last_overflow": self._last_overflow,
            "hysteresis": self._hysteresis,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint; a static scale stays as the config says."""
        if self._dynamic and "value" in state:
            self.value = float(state["value"])
            self._iteration = int(state["iteration"])
            self._last_overflow = int(state["last_overflow"])
            self._hysteresis = min(int(state["hysteresis"]), self._config.hysteresis)
