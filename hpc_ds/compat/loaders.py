"""``RepeatingLoader`` and ``DeepSpeedDataLoader``, for scripts that make their loaders themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class RepeatingLoader:
    """A loader without an end: it begins again where it would end.

    Args:
        loader: any iterable that can be iterated again.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class DeepSpeedDataLoader:
    """Batches of this rank's share of a dataset, in random order.

    It has no position to resume from: one that ``initialize`` makes from ``training_data`` has.

    Args:
        dataset: map-style.
        batch_size: samples in a micro-batch of this rank.
        pin_memory: see torch's DataLoader.
        local_rank: -1 for a process alone, whose samples are drawn from all; else the ranks share them.
        tput_timer: None, or what has a ``start``, which each batch calls.
        collate_fn: see torch's DataLoader.
        num_local_io_workers: worker processes.
        data_sampler: instead of the random order.
        data_parallel_world_size: instead of the world size.
        data_parallel_rank: instead of the rank.
        dataloader_drop_last: leave out samples that fill no batch.
        deepspeed_dataloader_config: accepted; curriculum learning is not supported.
    """

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        dataset: Any,
        batch_size: int,
        pin_memory: bool = False,
        local_rank: int = -1,
        tput_timer: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Any = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
        deepspeed_dataloader_config: dict[str, Any] | None = None,  # noqa: ARG002 - DeepSpeed's signature
    ) -> None:
        if data_sampler is None and local_rank >= 0 and dist.is_initialized():
            data_sampler = DistributedSampler(dataset, data_parallel_world_size, data_parallel_rank)
        self.dataset, self.batch_size, self.tput_timer = dataset, batch_size, tput_timer
        self.data_sampler = RandomSampler(dataset) if data_sampler is None else data_sampler
        self.dataloader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self.data_sampler,
            pin_memory=pin_memory and torch.cuda.is_available(),
            collate_fn=collate_fn,
            num_workers=num_local_io_workers or 0,
            drop_last=dataloader_drop_last,
        )
        self.data: Iterator[Any] = iter(())

    def __iter__(self) -> DeepSpeedDataLoader:
        self.data = iter(self.dataloader)
        return self

    def __len__(self) -> int:
        return len(self.dataloader)

    def __next__(self) -> Any:
        if self.tput_timer is not None:
            self.tput_timer.start()
        return next(self.data)
