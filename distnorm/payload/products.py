"""Sums from which norms of updates and cosines follow, of every parameter, and of slices of stacked ones.

With the gradient g, the weight w and the newest update u, the weight less the one that a step before had been
clipped with, each rank adds what it counts of <g, w>, <u, u> and <u, g>; of slices also <g, g> and <w, w>.

The cost is 8 bytes a value in the all-reduce, and one more reading of gradients and weights, on monitored
steps. Updates cost memory too: from the step before a monitored one to that step a copy of the trained
weights, of which replicas keep their own share each (of a sliced parameter, all that they hold).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.errors import ConfigError
from distnorm.measure.norms import Norm
from distnorm.payload.dots import Operands, sums
from distnorm.payload.indices import Indices
from distnorm.payload.parameters import trained_weights
from distnorm.payload.slices import Slices
from distnorm.plan.model_table import ModelTable
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class Products:
    """Sums over the elements of each parameter, or slice, [n] fp64 each; `None` where they aren't measured.

    Args:
        grad_weight: of gradient times weight.
        update: of the squares of the newest update; NaN where no rank knows the weights before it.
        grad_update: of gradient times newest update, as `update`.
        grad, weight: of the squares of gradient and weight.
    """

    grad_weight: Tensor | None = None
    update: Tensor | None = None
    grad_update: Tensor | None = None
    grad: Tensor | None = None
    weight: Tensor | None = None


class ProductStatistics:
    """The payload of these sums for one set of shards.

    Args:
        table: the model's parameters.
        shards: what this rank holds.
        shares: what it counts of each.
        norm: the configured norm.
        cosines: whether <g, w> is sent.
        updates: whether <u, u> and <u, g> are sent; then `keep` says which weights were there before.
        slices: which there are; `None`: none.

    Raises:
        ConfigError: the norm is a maximum, by which nothing can be added up; on every rank alike.
    """

    def __init__(
        self,
        table: ModelTable,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        norm: Norm,
        *,
        cosines: bool,
        updates: bool,
        slices: Slices | None = None,
    ) -> None:
        if norm.op != "sum":
            raise ConfigError(
                "norm.type: expected a finite order with monitor.cosines, monitor.updates and "
                f"monitor.slices, found {norm.order:g}"
            )
        self._shards, self._shares, self._updates, self._slices = (
            tuple(shards),
            tuple(shares),
            updates,
            slices,
        )
        self._columns = (["grad_weight"] if cosines else []) + (["update", "grad_update"] if updates else [])
        self._parameters = len(table.names)
        self._before: dict[int, Tensor] | None = None
        self._slots = Indices()
        self._slots["parameters"] = table.slots
        if slices is not None:
            self._slots["slices"] = slices.slots

    @property
    def length(self) -> int:
        """Number of values."""
        return sum(len(columns) * size for columns, size in self._layout())

    def _layout(self) -> list[tuple[list[str], int]]:
        """The columns of parameters and of slices, and how many there are of each."""
        return [
            (self._columns, self._parameters),
            (["grad", "weight", *self._columns], 0 if self._slices is None else len(self._slices.names)),
        ]

    def keep(self, is_wanted: bool) -> None:
        """Copy the weights as they are before the optimizer's step, or free such a copy. No device is waited
        for.

        Args:
            is_wanted: whether the next step sends these sums.
        """
        self._before = None
        if is_wanted and self._updates:
            trained = [i for i, shard in enumerate(self._shards) if shard.holder.requires_grad]
            there = [self._kept(i, self._shards[i].witness()) for i in trained]
            copies = [torch.empty_like(tensor) for tensor in there]
            if copies:
                torch._foreach_copy_(copies, there)
            self._before = dict(zip(trained, copies, strict=True))

    def _kept(self, i: int, weight: Tensor) -> Tensor:
        share = self._shares[i]
        return weight if self._is_sliced(i) else weight.reshape(-1)[share.start : share.stop]

    def _is_sliced(self, i: int) -> bool:
        return self._slices is not None and i in self._slices.sliced

    def _counted(self, i: int, tensor: Tensor | None) -> Tensor | None:
        share = self._shares[i]
        return None if tensor is None else tensor.reshape(-1)[share.start : share.stop]

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64, which are to be added up. No device is waited for.

        Args:
            gradients: of all shards, in their order: the whole local ones. Missing ones count as zeros.
            device: where the values are to be.
        """
        weights = trained_weights(self._shards, gradients)
        whole, counted = list[Operands](), list[Operands]()
        for i, now in enumerate(zip(gradients, weights, strict=True)):
            whole.append(now)
            counted.append(tuple(self._counted(i, tensor) for tensor in now))
            if self._updates:
                kept = None if now[1] is None or self._before is None else self._before.get(i)
                # A weight that wasn't trained in the step before has no update.
                before = now[1] if kept is None else kept
                is_cut = kept is not None and not self._is_sliced(i)
                whole[-1] += (before,)
                counted[-1] += (before if is_cut else self._counted(i, before),)
        sliced = [] if self._slices is None else self._slices.parts(whole)
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        kinds = zip((counted, sliced), ("parameters", "slices"), self._layout(), strict=True)
        return torch.cat(
            [
                nothing,
                *(
                    self._added_up(parts, name, columns, size, device)
                    for parts, name, (columns, size) in kinds
                    if size and columns
                ),
            ]
        )

    def _added_up(
        self, parts: Sequence[Operands], name: str, columns: Sequence[str], size: int, device: torch.device
    ) -> Tensor:
        found = sums(parts, lambda *operands: _products(columns, *operands), len(columns), device)
        values = torch.zeros(len(columns), size, dtype=torch.float64, device=device)
        values.index_add_(1, self._slots.at(name, values), found)
        if self._updates and self._before is None:
            values[columns.index("update") :] = torch.nan
        return values.view(-1)

    def read(self, reduced: Tensor) -> tuple[Products, Products]:
        """The sums of parameters and of slices, of the reduced values, [length] fp64."""
        found, start = [], 0
        for columns, size in self._layout():
            rows = reduced[start : start + len(columns) * size].view(len(columns), size)
            found.append(Products(**dict(zip(columns, rows, strict=True))))
            start += rows.numel()
        return found[0], found[1]


def _products(
    columns: Sequence[str], grad: Tensor, weight: Tensor, before: Tensor | None = None
) -> tuple[Tensor, ...]:
    update = grad if before is None else weight - before
    pairs = {
        "grad": (grad, grad),
        "weight": (weight, weight),
        "grad_weight": (grad, weight),
        "update": (update, update),
        "grad_update": (grad, update),
    }
    return tuple(torch.mul(*pairs[column]) for column in columns)
