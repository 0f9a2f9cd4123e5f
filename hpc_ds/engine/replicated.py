"""ZeRO stages 0 to 2: whole parameters on every rank, as views into flat buffers (``buckets.py``).

Autograd hands over each gradient when it is complete; it is put where it belongs in its bucket at once. A bucket is
summed when all before it have been, so every rank sums them in the same order whatever its graph looks like.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import nn

from hpc_ds.engine.buckets import Bucket, Policy, Slot
from hpc_ds.engine.compute_types import compute_dtypes
from hpc_ds.engine.deferred import Deferred
from hpc_ds.engine.early import restore
from hpc_ds.engine.exchange import Exchange
from hpc_ds.engine.piece import Piece
from hpc_ds.engine.sharding import (
    Kept,
    Precision,
    Sharding,
    broadcast,
    cast_inputs,
    find_blocks,
    gather_flat,
    master_dtype,
    persistent_buffers,
    take_up_written,
    weakly,
)
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch.utils.hooks import RemovableHandle

_ALIGN = 16  # elements: kernels want parameters, and copies chunks, to begin at whole cache lines or at least 16 bytes
_IN_FLIGHT = 2  # sums of buckets at a time


class Replicated(Sharding):
    """A module whose parameters are whole on every rank."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        policy: Policy,
        precision: Precision,
        block_names: Sequence[str] | None = None,
    ) -> None:
        """Collective. Put the module's parameters into buckets, from rank 0's values."""
        restore(module)
        Deferred(module, device).make_real()
        self.module = module.to(device)
        self._policy = policy
        self._precision = precision
        self._dtypes = compute_dtypes(self.module, precision)
        self._exchange = Exchange(device)
        self.device = device
        self._overlaps = device.type != "cpu"
        self._boundary = True
        self._next = 0  # of the buckets in the order of their sums
        self._pass = 0  # number of the backward pass
        self._arrivals: set[int] = set()  # of this backward pass
        self._in_parts = self._sums_early = self._inspects = self._released = False
        self._frozen: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._buckets: list[Bucket] = []
        self._slot_of: dict[nn.Parameter, tuple[Bucket, Slot]] = {}
        self.pieces = []
        self._fill_buckets()
        self._adapt_the_rest()
        if precision.compute is not None:
            converts = partial(cast_inputs, precision.compute)  # no method: a copy of the module would copy all of this
            for block in (module, *find_blocks(module, block_names)):
                self._hooks.append(block.register_forward_pre_hook(converts, with_kwargs=True))

    # making the buckets

    def _fill_buckets(self) -> None:
        named = [(name, value) for name, value in self.module.named_parameters() if value.requires_grad]
        groups: dict[tuple[torch.dtype, torch.dtype], list[list[tuple[int, str, nn.Parameter]]]] = {}
        for index, (name, parameter) in enumerate(named):
            buckets = groups.setdefault((self._dtypes[parameter], master_dtype(parameter.dtype)), [[]])
            filled = sum(other.numel() for _, _, other in buckets[-1])
            if buckets[-1] and filled + parameter.numel() > self._policy.bucket_elements:
                buckets.append([])
            buckets[-1].append((index, name, parameter))
        pieces: dict[int, Piece] = {}
        for (dtype, exact), buckets in groups.items():
            for members in buckets:
                pieces.update(self._make_bucket(members, dtype, exact))
        self.pieces = [pieces[index] for index in range(len(named))]
        self._buckets.reverse()  # gradients come from the last parameters to the first
        by_index = {slot.index: (bucket, slot) for bucket in self._buckets for slot in bucket.slots}
        self._places = [by_index[index] for index in range(len(named))]
        self._index_of = {piece.name: index for index, piece in enumerate(self.pieces)}

    def _make_bucket(
        self, members: list[tuple[int, str, nn.Parameter]], dtype: torch.dtype, exact: torch.dtype
    ) -> dict[int, Piece]:
        slots, end = [], 0
        for index, _, parameter in members:
            slots.append(Slot(parameter, index, end, parameter.numel()))
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
        step = _ALIGN * self._exchange.world_size
        device = members[0][2].device
        whole = torch.zeros(-(-end // step) * step, dtype=exact, device=device)
        for slot in slots:
            whole.narrow(0, slot.start, slot.length).copy_(slot.parameter.detach().flatten())
        broadcast([whole])
        values = whole if dtype == exact else whole.to(dtype)
        share = whole if self._policy.stage == 0 else self._exchange.chunk(whole)
        # In fp32 the master is the parameter itself; else it must not keep the whole buffer alive.
        masters = share if dtype == exact else share.clone()
        if self._policy.offload and masters.device.type != "cpu":
            masters = share.cpu().pin_memory() if self._policy.pin_memory else share.cpu()
        accumulate = self._precision.accumulate or dtype
        bucket = Bucket(slots, values, masters, accumulate, missing=len(slots))
        self._buckets.append(bucket)
        names = {index: name for index, name, _ in members}
        return {slot.index: self._make_piece(bucket, slot, names[slot.index]) for slot in slots}

    def _make_piece(self, bucket: Bucket, slot: Slot, name: str) -> Piece:
        parameter, shape = slot.parameter, slot.parameter.shape
        parameter.data = bucket.values.narrow(0, slot.start, slot.length).view(shape)
        slot.version = parameter._version  # noqa: SLF001 - the only sign of a write
        self._hooks.append(parameter.register_post_accumulate_grad_hook(weakly(self._arrived)))
        self._slot_of[parameter] = bucket, slot
        shared = self._policy.stage == 0
        first, length, start = self._own_range(bucket, slot)
        own = bucket.masters.narrow(0, first, length)
        return Piece(name, shape, start, nn.Parameter(own.view(shape) if length == slot.length else own), shared)

    def _own_range(self, bucket: Bucket, slot: Slot) -> tuple[int, int, int]:
        """A slot's part of this rank's chunk: first element in the chunk, length, first element in the parameter."""
        if self._policy.stage == 0:
            return slot.start, slot.length, 0
        chunk = bucket.values.numel() // self._exchange.world_size
        begin = self._exchange.rank * chunk
        first, last = max(slot.start, begin), min(slot.start + slot.length, begin + chunk)
        return (first - begin, last - first, first - slot.start) if first < last else (0, 0, 0)

    def _adapt_the_rest(self) -> None:
        self._frozen = [value for value in self.module.parameters() if not value.requires_grad]
        buffers = list(self.module.buffers())
        broadcast([value.data for value in self._frozen] + buffers)
        for parameter in self._frozen:
            # Flat ranges of it are saved and loaded in place.
            parameter.data = parameter.data.to(self._dtypes[parameter]).contiguous()
        if self._precision.buffers is not None:
            for buffer in buffers:
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(self._precision.buffers)

    # gradients

    def inspect(self) -> None:
        """See ``Sharding``."""
        self._inspects = True

    def watch_output(self, tensor: torch.Tensor) -> None:
        """Gradients are noticed where they arrive."""

    def begin_backward(self, *, boundary: bool) -> None:
        """See ``Sharding``."""
        self._refuse_released()
        self._boundary = boundary
        self._pass += 1
        self._arrivals.clear()

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Put a gradient where it belongs; autograd calls it when a parameter has all of its gradient."""
        bucket, slot = self._slot_of[parameter]
        gradient = parameter.grad
        if gradient is None:
            return
        if bucket.summed:
            self._reopen()
        if bucket.reduction is not None or bucket.summed:
            raise ConfigError(
                f"gradient of {self.pieces[slot.index].name!r}: more of it came after it was summed over the ranks; use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        if self._inspects and self.culprit is None and not bool(gradient.isfinite().all()):
            self.culprit = self.pieces[slot.index].name
        place = bucket.gradient_of(slot)
        if gradient.is_sparse or gradient.data_ptr() != place.data_ptr():  # else autograd has added it there by itself
            stays = bucket.accumulate == parameter.dtype and self._policy.stage < 2
            # With create_graph autograd adds as well, but makes a new tensor.
            adds = slot.arrived and not (stays and gradient.requires_grad)
            (place.add_ if adds else place.copy_)(gradient.detach().to_dense().flatten())
            parameter.grad = place.view(parameter.shape) if stays else None
        slot.arrived = slot.used = True
        self._sum_when_complete(bucket, slot)

    def _sum_when_complete(self, bucket: Bucket, slot: Slot) -> None:
        """Sum buckets while the backward pass goes on, as soon as they are complete and it is their turn.

        A parameter may get its gradient in several parts, in nested backward passes. The first pass, which sums at its end,
        shows whether there are such parameters; if so, every pass does.
        """
        self._in_parts = self._in_parts or slot.index in self._arrivals
        self._arrivals.add(slot.index)
        bucket.missing -= 1
        if not self._sums_early or self._in_parts or not self._sums_now(self._boundary):
            return
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            self._launch_next(self._boundary)

    def _sums_now(self, boundary: bool) -> bool:
        return self._policy.stage == 2 or (boundary and self._overlaps)

    def end_backward(self) -> None:
        """See ``Sharding``."""
        self._reopen()
        if self._sums_now(self._boundary):
            self._sum_all(self._boundary)
        self._sums_early = True
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)

    def complete_gradients(self) -> None:
        """See ``Sharding``."""
        if self._policy.stage < 2 and not all(bucket.summed for bucket in self._buckets):
            self._sum_all(final=True)
        for bucket in self._buckets:
            if bucket.total is not None:
                bucket.total = bucket.total.to(bucket.exact)

    def _sum_all(self, final: bool) -> None:
        while self._next < len(self._buckets):
            self._launch_next(final)
        for bucket in self._buckets:
            self._land(bucket, final)
        self._next = 0

    def _launch_next(self, final: bool) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        if self._next > _IN_FLIGHT:  # bounds the buffers that messages arrive in
            self._land(self._buckets[self._next - 1 - _IN_FLIGHT], final)
        for slot in bucket.slots:
            place = bucket.gradient_of(slot)
            if not slot.arrived:
                place.zero_()
        flat = bucket.gradient_of(bucket.slots[0]) if bucket.gradients is None else bucket.gradients
        if self._policy.before != 1.0:
            flat.mul_(self._policy.before)
        bucket.reduction = self._exchange.reduce_scatter(flat, self._precision.wire)

    def _land(self, bucket: Bucket, final: bool) -> None:
        """Take in the sum of a bucket: mean over ranks, added to that of the micro-batches before."""
        if bucket.reduction is None or bucket.gradients is None:
            return
        factor = (1 / self._exchange.world_size if self._policy.average else 1.0) / self._policy.before
        total = bucket.reduction.wait(factor, bucket.exact)
        bucket.reduction = None
        if self._policy.stage == 0:
            total = self._whole_total(bucket, total)
        elif self._policy.stage == 2 and total.untyped_storage().nbytes() > total.nbytes:
            total = total.clone()  # a view would keep all gradients alive
        if bucket.total is not None:
            total.add_(bucket.total)
        if self._policy.stage == 2:
            total = total if final else total.to(bucket.accumulate)
            self._forget(bucket)
        bucket.total = total
        bucket.summed, bucket.summed_in = self._policy.stage < 2, self._pass
        for slot in bucket.slots:
            slot.parameter.grad = None  # autograd would add to what has been summed

    def _whole_total(self, bucket: Bucket, own: torch.Tensor) -> torch.Tensor:
        if bucket.gradients is not None and bucket.gradients.dtype == bucket.exact:
            whole = bucket.gradients
        else:
            whole = torch.empty(bucket.values.numel(), dtype=bucket.exact, device=own.device)
        place = self._exchange.chunk(whole)
        if place.data_ptr() != own.data_ptr():
            place.copy_(own)
        for work in self._exchange.all_gather(whole):
            work.wait()
        return whole

    def _reopen(self) -> None:
        """Keep the sums of earlier passes of this step aside: another one has begun, and its sums are added to them."""
        for bucket in self._buckets:
            if bucket.summed and bucket.summed_in != self._pass and bucket.total is not None:
                bucket.total = bucket.total.clone()  # it may lie in the gradients
                bucket.summed = False
                self._forget(bucket)

    def _forget(self, bucket: Bucket) -> None:
        bucket.gradients = None
        for slot in bucket.slots:
            slot.arrived = False
            slot.parameter.grad = None

    def used(self) -> list[bool]:
        """See ``Sharding``."""
        return [slot.used for _, slot in self._places]

    def refuse_different_use(self, users: Sequence[int]) -> None:
        """Gradients have places of their own: a rank that did not use a parameter adds zero."""

    def squared_norm(self) -> torch.Tensor:
        """See ``Sharding``."""
        totals = [bucket.total for bucket in self._buckets if bucket.total is not None]
        if not totals:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        norms = torch.stack([torch.linalg.vector_norm(total).double() for total in totals])
        share = 1 / self._exchange.world_size if self._policy.stage == 0 else 1.0
        return norms.square().sum() * share

    def hand_over(self, used: Sequence[bool], factor: float) -> None:
        """See ``Sharding``."""
        for bucket in self._buckets:
            if bucket.total is None:
                continue
            if factor != 1.0:
                bucket.total.mul_(factor)
            total = bucket.total.to(bucket.masters.device)
            for slot in bucket.slots:
                first, length, _ = self._own_range(bucket, slot)
                master = self.pieces[slot.index].master
                master.grad = total.narrow(0, first, length).view(master.shape) if used[slot.index] else None

    def gradient(self, piece: Piece) -> torch.Tensor | None:
        """See ``Sharding``."""
        bucket, slot = self._places[self._index_of[piece.name]]
        if bucket.total is None:
            return None
        first, length, _ = self._own_range(bucket, slot)
        return bucket.total.narrow(0, first, length)

    def drop_gradients(self) -> None:
        """See ``Sharding``."""
        for bucket in self._buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait(1.0, bucket.exact)
            bucket.total = bucket.reduction = None
            bucket.summed = False
            bucket.missing = len(bucket.slots)
            self._forget(bucket)
            for slot in bucket.slots:
                slot.used = False
                self.pieces[slot.index].master.grad = None
        self._next = 0
        self._inspects, self.culprit = False, None

    # parameters

    def publish(self) -> None:
        """See ``Sharding``."""
        works = []
        for bucket in self._buckets:
            own = bucket.values if self._policy.stage == 0 else self._exchange.chunk(bucket.values)
            if own.data_ptr() != bucket.masters.data_ptr():
                own.copy_(bucket.masters)
            if self._policy.stage > 0:
                works += self._exchange.all_gather(bucket.values)
        for work in works:
            work.wait()
        for _, slot in self._places:
            slot.version = slot.parameter._version  # noqa: SLF001 - the only sign of a write

    def adopt(self) -> None:
        """See ``Sharding``.

        Raises:
            ConfigError: a parameter has other storage now, as after ``module.to(...)``, or needs a gradient since.
        """
        self._refuse_released()
        for bucket, slot in self._places:
            parameter, name = slot.parameter, self.pieces[slot.index].name
            place = bucket.values.narrow(0, slot.start, slot.length)
            if slot.length and parameter.data_ptr() != place.data_ptr():
                raise ConfigError(
                    f"parameter {name!r}: its storage was replaced after initialize; move and convert the module before, and "
                    "write values with copy_()"
                )
            if parameter._version == slot.version:  # noqa: SLF001 - the only sign of a write
                continue
            slot.version = parameter._version  # noqa: SLF001 - as above
            first, length, start = self._own_range(bucket, slot)
            own = bucket.masters.narrow(0, first, length)
            if bucket.values.dtype != bucket.exact or own.device != place.device:
                take_up_written(own, place.narrow(0, start, length))
        if any(value.requires_grad for value in self._frozen):
            raise ConfigError(
                "parameter: one that was frozen at initialize needs a gradient now; set requires_grad before initialize"
            )

    def release(self) -> bool:
        """See ``Sharding``."""
        self._released = True
        for hook in self._hooks:
            hook.remove()
        for parameter in self._slot_of:
            parameter.grad, parameter.data = None, parameter.data.clone()
        return True

    def _refuse_released(self) -> None:
        if self._released:
            raise ConfigError("engine: it was destroyed, and its module is free; give it to initialize again")

    def explain(self, error: RuntimeError) -> None:  # noqa: ARG002 - whatever it says
        """See ``Sharding``: a module that was moved or converted after initialize is told so."""
        self.adopt()

    def reshard(self) -> None:
        """Nothing is gathered."""

    def kept(self) -> Iterator[Kept]:
        """See ``Sharding``."""
        for name, parameter in self.module.named_parameters():
            if parameter not in self._slot_of:
                yield Kept(name, parameter.shape, 0, parameter.detach(), shared=True, frozen=True)
        for name, buffer in persistent_buffers(self.module).items():
            yield Kept(name, buffer.shape, 0, buffer, shared=True, frozen=False)

    def whole_value(self, index: int) -> torch.Tensor:
        """See ``Sharding``."""
        self.adopt()
        piece = self.pieces[index]
        return cast("torch.Tensor", gather_flat(piece, piece.master))

    def whole(self) -> AbstractContextManager[None]:
        """See ``Sharding``: they always are."""
        return nullcontext()

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], writer: int | None) -> Iterator[None]:
        """See ``Sharding``: parameters are whole anyway."""
        yield
        if writer is None:
            return
        for parameter in parameters:
            dist.broadcast(parameter.data, src=writer)
            if parameter in self._slot_of:
                self._slot_of[parameter][1].version = -1
        self.adopt()
