"""Makes matrices whole that lie in ranges over the ranks, each on one rank, and gives the ranges back.

Each rank works on few matrices, and no rank holds all of them: two all-to-alls, of about as many elements as a rank holds
ranges of. A matrix that every rank holds whole goes only one way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from hpc_ds.engine.piece import Piece


class MatrixExchange:
    """Who owns which matrix, and what moves between the ranks; the same on every rank.

    Attributes:
        owned: for each rank the indices of the matrices that it makes whole.
    """

    def __init__(self, pieces: list[Piece], ranges: list[list[tuple[int, int]]]) -> None:
        """Share out matrices among the ranks.

        Args:
            pieces: this rank's, one of each matrix.
            ranges: for each matrix the (start, length) of every rank.
        """
        self._pieces, self._ranges = pieces, ranges
        self.owned = shared_out([piece.shape for piece in pieces], ranges)
        self._rank = dist.get_rank() if len(self.owned) > 1 else 0

    def to_owners(self, parts: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """From this rank's range of each matrix to the whole ones that it owns, flat, by index. Collective."""
        mine = self.owned[self._rank]
        to_come = [index for index in mine if not self._pieces[index].shared]
        received = self._exchange(
            [[parts[index] for index in indices if not self._pieces[index].shared] for indices in self.owned],
            [[self._ranges[index][rank][1] for index in to_come] for rank in range(len(self.owned))],
            like=parts[0],
        )
        whole = {index: parts[index] for index in mine}
        whole |= {index: parts[index].new_empty(self._pieces[index].shape.numel()) for index in to_come}
        for rank, of_rank in enumerate(received):
            for index, part in zip(to_come, of_rank, strict=True):
                start, length = self._ranges[index][rank]
                whole[index][start : start + length] = part
        return whole

    def from_owners(self, whole: dict[int, torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
        """From the whole matrices that this rank owns to its range of each matrix. Collective."""
        received = self._exchange(
            [
                [_part(whole[index], *self._ranges[index][rank]) for index in self.owned[self._rank]]
                for rank in range(len(self.owned))
            ],
            [[self._ranges[index][self._rank][1] for index in indices] for indices in self.owned],
            like=like,
        )
        found = {
            index: part
            for indices, of_rank in zip(self.owned, received, strict=True)
            for index, part in zip(indices, of_rank, strict=True)
        }
        return [found[index] for index in range(len(self._pieces))]

    def _exchange(
        self, to: list[list[torch.Tensor]], lengths: list[list[int]], like: torch.Tensor
    ) -> list[list[torch.Tensor]]:
        """Send some tensors to each rank; returns those that each has sent, of the given lengths. Collective."""
        if len(to) == 1:
            return to
        outgoing = [sum(part.numel() for part in parts) for parts in to]
        incoming = [sum(of_rank) for of_rank in lengths]
        sent = torch.cat([like.new_empty(0), *(part for parts in to for part in parts)])
        received = like.new_empty(sum(incoming))
        dist.all_to_all_single(received, sent, incoming, outgoing)
        buffers = received.split(incoming)
        return [list(buffer.split(of_rank)) for buffer, of_rank in zip(buffers, lengths, strict=True)]


def shared_out(shapes: list[torch.Size], ranges: list[list[tuple[int, int]]]) -> list[list[int]]:
    """For each rank the matrices it works on: the costly ones first, each to the rank with the least work.

    Of ranks with equal work, the one that has most of the matrix takes it.
    """
    owned: list[list[int]] = [[] for _ in ranges[0]]
    work = [0] * len(owned)
    costs = [_cost(shape) for shape in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        lengths = [length for _, length in ranges[index]]
        owner = min((done, -length, rank) for rank, (done, length) in enumerate(zip(work, lengths, strict=True)))[-1]
        owned[owner].append(index)
        work[owner] += costs[index]
    return owned


def _part(whole: torch.Tensor, start: int, length: int) -> torch.Tensor:
    return whole[start : start + length]  # an empty range may start anywhere


def _cost(shape: torch.Size) -> int:
    """Of making it orthogonal, up to a factor: elements times the shorter side."""
    return shape.numel() * min(shape[0], shape.numel() // max(shape[0], 1))
