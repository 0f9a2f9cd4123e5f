"""The data loader: its whole state is (seed, epoch, samples consumed), so it resumes at any world size.

An epoch is one random order of all samples, drawn from (seed, epoch). The ranks walk through it together: a
micro-batch of the world is the next ``micro * world_size`` samples, rank r taking the r-th slice of ``micro``. A global
batch is therefore the same set of samples at any world size, as long as the batch size stays the same.

A batch that reaches the end of an epoch is filled up from the next one, so every sample of every epoch is seen once
and every batch is full. With ``drop_last`` the samples that do not fill a global batch are left out instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from hpc_ds.errors import ConfigError
from hpc_ds.runtime.preemption import ignore_in_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hpc_ds.config.training import BatchSizes


class Position:
    """Where all ranks stand in the endless stream of epochs.

    Attributes:
        samples: consumed by all ranks together since the run began.
        length: samples of the dataset.
        usable: samples of it that an epoch has.
        seed: of the order of every epoch.
    """

    def __init__(self, length: int, seed: int, sizes: BatchSizes, rank: int, *, drop_last: bool) -> None:
        usable = length - length % sizes.train if drop_last else length
        if usable < 1:
            raise ConfigError(
                f"training_data of {length} samples: too few for train_batch_size {sizes.train}; use a smaller batch, or "
                "set dataloader_drop_last to false"
            )
        self.samples = 0
        self.length, self.seed, self.usable = length, seed, usable
        self._micro, self._world_size, self._rank = sizes.micro, sizes.world_size, rank
        self._order_of: tuple[int, torch.Tensor] | None = None

    def epoch_of(self, samples: int) -> int:
        """How many epochs are complete when ``samples`` have been consumed."""
        return samples // self.usable

    @property
    def together(self) -> int:
        """Samples that all ranks consume with one micro-batch each."""
        return self._micro * self._world_size

    def micro_batches_left(self) -> int:
        """Micro-batches until the present epoch is complete."""
        left = self.usable - self.samples % self.usable
        return -(-left // self.together)

    def indices(self, samples: int) -> list[int]:
        """The dataset indices of this rank's micro-batch when ``samples`` have been consumed."""
        first = samples + self._rank * self._micro
        return [self._index(place) for place in range(first, first + self._micro)]

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, self.usable)
        key = self.seed * 1_000_003 + epoch
        if self._order_of is None or self._order_of[0] != key:
            self._order_of = (key, torch.randperm(self.length, generator=torch.Generator().manual_seed(key)))
        return int(self._order_of[1][within])


class _RankBatches(Sampler[list[int]]):
    """This rank's micro-batches from the present position to the end of the epoch."""

    def __init__(self, position: Position) -> None:
        self._position = position

    def __iter__(self) -> Iterator[list[int]]:
        start, count = self._position.samples, self._position.micro_batches_left()
        for number in range(count):
            yield self._position.indices(start + number * self._position.together)

    def __len__(self) -> int:
        return self._position.micro_batches_left()


def refuse_iterable(dataset: Any) -> None:
    """Only a dataset that can be indexed has positions; one that cannot may have no length either.

    Raises:
        ConfigError: it is an IterableDataset.
    """
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            "training_data: an IterableDataset has no positions to resume from; pass a map-style dataset, or iterate your "
            "own loader and keep its state with engine.register_state"
        )


class TrainingLoader:
    """A data loader that knows how many samples were handed out, and goes on from there.

    Iterating ends with the epoch; iterating again begins the next one, or goes on where a checkpoint stood.
    """

    def __init__(
        self,
        dataset: Any,
        position: Position,
        collate_fn: Callable[..., Any] | None,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        refuse_iterable(dataset)
        self.position = position
        self.dataset = dataset
        # A generator of its own: the loader draws a seed from it whenever an iteration begins, which would otherwise
        # move torch's global one, and a resumed run begins iterations that an uninterrupted one does not.
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=_RankBatches(position),
            collate_fn=collate_fn,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            # Counted when handed out, not when drawn: workers draw ahead.
            self.position.samples += self.position.together
            yield batch

    def __len__(self) -> int:
        return self.position.micro_batches_left()

    def state_dict(self, unfinished: int = 0) -> dict[str, Any]:
        """Seed, epoch, samples consumed, and how many an epoch has.

        Args:
            unfinished: micro-batches of each rank whose step is not complete; they will be handed out again.
        """
        position = self.position
        samples = position.samples - unfinished * position.together
        return {
            "samples": samples,
            "epoch": position.epoch_of(samples),
            "seed": position.seed,
            "length": position.length,
            "usable": position.usable,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, at any world size, in the order that its seed gives.

        Raises:
            ConfigError: the dataset has another length, so positions in it mean other samples.
        """
        if state["length"] != self.position.length:
            raise ConfigError(
                f"training_data of {self.position.length} samples: the checkpoint stands in one of {state['length']}; load it "
                "with the data it was trained on, or with load_module_only=True"
            )
        self.position.seed = int(state["seed"])
        # With drop_last another batch size leaves out others at the end: the place within the epoch is what stays.
        usable = self.position.usable
        epoch, within = divmod(int(state["samples"]), int(state.get("usable", usable)))
        self.position.samples = epoch * usable + min(within, usable)
