"""The batch arithmetic: ``train_batch_size = micro x accumulation x world size``, what is missing filled in.

Every process is data-parallel, so the world size is the number of ranks.

| given                            | inferred                                            |
|----------------------------------|-----------------------------------------------------|
| all three                        | nothing                                             |
| train, micro                     | accumulation = train // micro // world size         |
| train, accumulation              | micro = train // world size // accumulation         |
| micro, accumulation              | train = micro x accumulation x world size           |
| train                            | accumulation = 1, micro = train // world size       |
| micro                            | accumulation = 1, train = micro x world size        |
| none, or only accumulation       | an error                                            |

Then the four are checked against each other.

Source: https://www.deepspeed.ai/docs/config-json#batch-size-related-parameters
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from hpc_ds.config.training import TrainingConfig


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The batch arithmetic of a run: ``train = micro * accumulation * world_size``, all in samples but the last two."""

    train: int
    micro: int
    accumulation: int
    world_size: int


def resolve_batch_sizes(config: TrainingConfig, world_size: int, because: str = "") -> BatchSizes:
    """Fill in what is missing of the three batch sizes, and check them against each other.

    Args:
        config: where they stand.
        world_size: ranks in all.
        because: why there are so many ranks, in a few words, for the message.

    Raises:
        ConfigError: none is given, or they contradict each other; all four numbers are named.
    """
    train, micro = config.train_batch_size, config.train_micro_batch_size_per_gpu
    accumulation = config.gradient_accumulation_steps
    if train is None and micro is None:
        raise ConfigError(
            "train_batch_size, train_micro_batch_size_per_gpu: neither is given; give at least one",
            key="train_batch_size",
        )
    if micro is None:
        micro = max((train or 0) // world_size // (accumulation or 1), 1)
    if accumulation is None:
        accumulation = 1 if train is None else max(train // micro // world_size, 1)
    if train is None:
        train = micro * accumulation * world_size
    if train != micro * accumulation * world_size:
        world = f"world size {world_size}" + (f" ({because})" if because else "")
        raise ConfigError(
            f"train_batch_size {train}: not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {world} = {micro * accumulation * world_size}; make them agree, or leave one of the three "
            "sizes out",
            key="train_batch_size",
            value=train,
        )
    return BatchSizes(train, micro, accumulation, world_size)


def fitting_world_size(config: TrainingConfig) -> int | None:
    """The one world size that three given sizes leave; None where they leave more than one, or none."""
    train, micro = config.train_batch_size, config.train_micro_batch_size_per_gpu
    accumulation = config.gradient_accumulation_steps
    if train is None or micro is None or accumulation is None or train % (micro * accumulation):
        return None
    return train // (micro * accumulation)
