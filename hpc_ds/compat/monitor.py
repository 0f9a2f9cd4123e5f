"""``deepspeed.monitor.monitor``: the monitors of a config, for scripts that write events themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hpc_ds.engine.monitors import monitor_for

if TYPE_CHECKING:
    from collections.abc import Iterable


class MonitorMaster:
    """TensorBoard, CSV files and Weights & Biases, as far as a config enables them, on rank 0.

    Args:
        monitor_config: what has the sections ``tensorboard``, ``csv_monitor`` and ``wandb``: ``DeepSpeedConfig.monitor_config``.

    Attributes:
        enabled: whether any of them is enabled.
    """

    def __init__(self, monitor_config: Any) -> None:
        sections = (monitor_config.tensorboard, monitor_config.csv_monitor, monitor_config.wandb)
        self.enabled = any(section.enabled for section in sections)
        self._monitor = monitor_for(monitor_config, dist.get_rank() if dist.is_initialized() else 0)

    def write_events(self, event_list: Iterable[tuple[str, float, int]]) -> None:
        """Write values.

        Args:
            event_list: of (name, value, samples so far).
        """
        if self._monitor is not None:
            self._monitor.write_events(event_list)
            self._monitor.flush()
