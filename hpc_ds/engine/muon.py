"""Muon: momentum whose matrix is made orthogonal before it is applied; AdamW for all that is no hidden matrix.

With momentum m and gradient g: ``m = b m + (1 - b) g``, ``u = (1 - b) g + b m`` (Nesterov), and
``p -= lr (s O(u) + decay p)``, where O is five Newton-Schulz steps, which bring all singular values near 1, and
``s = sqrt(max(1, rows / columns))``. A parameter of three dimensions is a batch of matrices, one of four a convolution, whose
matrix has one row for each filter (DeepSpeed's own step fails on those).

Momentum works on ranges; O needs whole matrices. So each matrix has an owner for the step: all ranks send it their ranges of
u, it computes O, and sends each rank its range of that: two all-to-alls, of as many elements as a rank holds. A parameter
that no rank used stays as it is, and gradients are clipped before they reach the momentum (DeepSpeed decays such a
parameter, and clips the norm of what O returned).

Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; ``gram``: https://tridao.me/blog/2026/gram-newton-schulz/;
names, defaults and the choice of parameters: DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hpc_ds.engine.matrix_exchange import MatrixExchange
from hpc_ds.engine.newton_schulz import METHODS, orthogonalised
from hpc_ds.engine.own_optimizer import OwnOptimizer, check_numbers, gradients, trained
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hpc_ds.engine.piece import Piece

_NOT_HIDDEN = ("embed", "lm_head")  # words in the names of matrices that AdamW takes
_BATCH = 1 << 26  # elements of matrices that are whole somewhere at once


class Muon(OwnOptimizer):
    """Muon and AdamW in one: every group of the caller is split into a Muon and an AdamW half.

    A group's own settings win over ``muon_lr`` and ``adam_lr``, and these over ``lr``. A group may say with ``use_muon``
    which half it is.
    """

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        groups: Iterable[dict[str, Any]],
        piece_of: Mapping[Any, Piece],
        lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        ns_method: str = "gram",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        adam_w_mode: bool = True,
    ) -> None:
        if ns_method not in METHODS:
            key, known = "optimizer.params.ns_method", " or ".join(repr(method) for method in METHODS)
            raise ConfigError(f"{key} {ns_method!r}: unknown; use {known}", key=key, value=ns_method)
        self._adam = torch.optim.Adam([{"params": []}], fused=True, decoupled_weight_decay=adam_w_mode)
        self._piece_of = piece_of
        self._ranges: dict[Any, list[tuple[int, int]]] = {}
        self._muon_defaults: dict[str, Any] = {"lr": _first(muon_lr, lr, 0.02), "weight_decay": weight_decay}
        self._muon_defaults |= {"momentum": momentum, "ns_method": ns_method}
        self._adam_defaults = {**self._adam.defaults, "lr": _first(adam_lr, lr, 3e-4), "weight_decay": weight_decay}
        self._adam_defaults |= {"betas": betas, "eps": eps}
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the Muon and the AdamW half of a group, without a half that no parameter is in."""
        own = {key: value for key, value in param_group.items() if key not in {"params", "use_muon"}}
        parameters = list(param_group["params"])
        for use_muon, defaults in ((True, self._muon_defaults), (False, self._adam_defaults)):
            half = [one for one in parameters if param_group.get("use_muon", self._is_hidden_matrix(one)) is use_muon]
            foreign = (self._muon_defaults.keys() | self._adam_defaults.keys()) - defaults.keys()
            settings = {key: value for key, value in own.items() if key not in foreign}
            check_numbers({**defaults, **settings})
            if half:
                super().add_param_group({**defaults, **settings, "use_muon": use_muon, "params": half})

    def _is_hidden_matrix(self, one: Any) -> bool:
        piece = self._piece_of[one]
        return len(piece.shape) > 1 and not any(word in piece.name.lower() for word in _NOT_HIDDEN)

    def _update(self) -> None:
        self._take_muon_step()
        # The groups and the state are new objects after a load.
        self._adam.state = self.state
        self._adam.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        if self._adam.param_groups:
            self._adam.step()

    def _take_muon_step(self) -> None:
        by_group = [(group, trained(group)) for group in self.param_groups if group["use_muon"]]
        updates: list[tuple[Any, torch.Tensor]] = []
        for group, parameters in by_group:
            updates += zip(parameters, self._blend(group, parameters), strict=True)
        method = {one: group["ns_method"] for group, parameters in by_group for one in parameters}
        orthogonal = self._orthogonalised(updates, method)
        for group, parameters in by_group:
            if parameters:
                lr = float(group["lr"])
                torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
                moves = [orthogonal[one].view_as(one) for one in parameters]
                torch._foreach_add_(parameters, moves, alpha=-lr)

    def _blend(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Advance the momentum; returns Nesterov's blend of it and the gradient, of this rank's ranges."""
        if not parameters:
            return []
        grads = gradients(parameters)
        momenta = [self._state(parameter, "momentum_buffer")[0] for parameter in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(grads, momenta, group["momentum"]))  # noqa: SLF001

    def _orthogonalised(
        self, updates: list[tuple[Any, torch.Tensor]], method: dict[Any, str]
    ) -> dict[Any, torch.Tensor]:
        """This rank's ranges of the orthogonalised matrices. Collective."""
        self._learn_ranges([one for one, _ in updates])
        found: dict[Any, torch.Tensor] = {}
        for batch in _batches(updates, self._piece_of):
            pieces = [self._piece_of[one] for one, _ in batch]
            exchange = MatrixExchange(pieces, [self._ranges[one] for one, _ in batch])
            flat = [update.flatten().float() for _, update in batch]
            whole = exchange.to_owners(flat)
            for index, matrix in whole.items():
                shaped = matrix.view(pieces[index].shape)
                whole[index] = orthogonalised(shaped, method[batch[index][0]]).flatten()
            parts = exchange.from_owners(whole, like=flat[0])
            found.update(zip([one for one, _ in batch], parts, strict=True))
        return found

    def _learn_ranges(self, parameters: list[Any]) -> None:
        """Let every rank know which range every rank has of each parameter. Collective, once for each parameter."""
        new = [one for one in parameters if one not in self._ranges]
        if not new:
            return
        mine = torch.tensor([(self._piece_of[one].start, one.numel()) for one in new], device=new[0].device)
        tables = [mine]
        if dist.is_initialized():
            tables = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(tables, mine)
        by_rank = [table.tolist() for table in tables]
        for index, one in enumerate(new):
            self._ranges[one] = [(start, length) for start, length in (table[index] for table in by_rank)]


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _batches(
    updates: list[tuple[Any, torch.Tensor]], piece_of: Mapping[Any, Piece]
) -> Iterator[list[tuple[Any, torch.Tensor]]]:
    """The same batches on every rank, each of one matrix at least."""
    batch: list[tuple[Any, torch.Tensor]] = []
    elements = 0
    for update in updates:
        size = piece_of[update[0]].shape.numel()
        if batch and elements + size > _BATCH:
            yield batch
            batch, elements = [], 0
        batch.append(update)
        elements += size
    if batch:
        yield batch
