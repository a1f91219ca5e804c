"""Norms of the output units of parameters, for adaptive gradient clipping, right for every sharding.

A unit is an index along dim 0 of a parameter of two or more dims, and all of a smaller one. The payload has a
value for the gradient and one for the weight of every unit of the model, to which each rank adds the part
that it holds; replicas of a shard share its rows.

The cost is 16 bytes a unit in the all-reduce, where a unit is a whole row of a matrix.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.payload.flat import refuse_flat
from distnorm.payload.indices import Indices
from distnorm.payload.parameters import trained_weights
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import Ints, ModelTable
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard

_ALL, _EVERY = "all that are counted", "all that are held"
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _HeldUnits:
    """What this rank has of the units of one of its shards.

    Args:
        rows: number of the shard's units.
        start: the first of the shard's units, or elements where it is one unit, that this rank adds.
        stop: end of these.
        units: [rows] their places among all units.
    """

    rows: int
    start: int
    stop: int
    units: Ints

    @property
    def counted(self) -> Ints:
        """The places of the units that this rank adds something to."""
        return self.units[self.start : self.stop] if self.rows else self.units


class UnitStatistics:
    """The payload of the units of one set of shards. Collective: every rank must make one.

    Args:
        ranks: who takes part.
        table: the model's parameters.
        shards: what this rank holds.
        shares: what it counts of each.
        names: the parameters whose units are meant, the same on every rank; default: all.

    Raises:
        UnsupportedGradientError: on every rank, naming a shard that cuts across units and has lost where.
    """

    def __init__(
        self,
        ranks: Ranks,
        table: ModelTable,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        names: Container[str] | None = None,
    ) -> None:
        meant = [names is None or name in names for name in table.names]
        held = [i for i, shard in enumerate(shards) if shard.numel and meant[table.slots[i]]]
        expected = "shards along dims, of which each output unit is a row"
        refuse_flat(ranks, (shards[i] for i in held), expected, "take another policy")
        sizes = [
            _units_of(shape) if is_meant else 0 for shape, is_meant in zip(table.shapes, meant, strict=True)
        ]
        starts = [0, *accumulate(sizes)]
        self.count = starts[-1]
        self._shards = tuple(shards)
        self._held = {i: _held_units(shards[i], shares[i], starts[table.slots[i]]) for i in held}
        self._indices = Indices()
        self._indices[_EVERY] = np.concatenate([_NONE, *(units.units for units in self._held.values())])
        self._indices[_ALL] = np.concatenate([_NONE, *(units.counted for units in self._held.values())])

    @property
    def length(self) -> int:
        """Number of values."""
        return 2 * self.count

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64, which are to be added up. No device is waited for.

        Args:
            gradients: of all shards, in their order: the whole local ones. Missing ones add nothing, nor do
                the weights of frozen parameters.
            device: where the values are to be.
        """
        values = torch.zeros(2, self.count, dtype=torch.float64, device=device)
        if not self._held:
            return values.view(-1)
        weights = trained_weights(self._shards, gradients, self._held)
        counted = self._indices.at(_ALL, values)
        for row, tensors in zip(values, (gradients, weights), strict=True):
            rows = [self._rows(i, held, tensors[i], device) for i, held in self._held.items()]
            together = [rows] if len({one.device for one in rows}) == 1 else [[one] for one in rows]
            squares = [kernels.moved(kernels.row_squares(ones), device) for ones in together]
            row.index_add_(0, counted, torch.cat(squares))
        return values.view(-1)

    def _rows(self, i: int, held: _HeldUnits, tensor: Tensor | None, device: torch.device) -> Tensor:
        """What is counted, each unit a row."""
        if tensor is None:
            return torch.empty(len(held.counted), 0, device=device)
        if not held.rows:
            return tensor.reshape(-1)[held.start : held.stop].view(1, -1)
        return self._with_rows(i, tensor)[held.start : held.stop]

    def _with_rows(self, i: int, tensor: Tensor) -> Tensor:
        # A whole one may come flat.
        return tensor if tensor.dim() > 1 else tensor.reshape(self._shards[i].global_shape)

    def norms(self, reduced: Tensor) -> tuple[Tensor, Tensor]:
        """Of each unit the 2-norms of gradient and weight, [units] fp64 each, of the reduced values."""
        gradients, weights = reduced.view(2, -1).sqrt()
        return gradients, weights

    def scale_(self, gradients: Sequence[Tensor | None], coefs: Tensor) -> None:
        """Multiply the units of local gradients, in place.

        The coefficients are rounded as those of `distnorm.kernels.scale_` are.

        Args:
            gradients: their views in memory, in the order of `local`, each row with memory of its own.
            coefs: [units], on any device.
        """
        if self._held:
            rows = [self._all_rows(i, gradients[i], coefs) for i in self._held]
            kernels.scale_rows_(rows, coefs[self._indices.at(_EVERY, coefs)])

    def _all_rows(self, i: int, gradient: Tensor | None, like: Tensor) -> Tensor:
        held = self._held[i]
        if gradient is None:
            with kernels.mode_of([like]):
                return torch.empty(len(held.units), 0, device=like.device)
        return self._with_rows(i, gradient) if held.rows else gradient.unsqueeze(0)


def _units_of(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _held_units(shard: GradShard, share: Share, first: int) -> _HeldUnits:
    """Replicas split the rows, or the elements of what is one unit, whatever the norm says of shares."""
    if len(shard.global_shape) > 1:
        whole = shard.numel == shard.global_numel
        units = np.arange(shard.global_shape[0]) if whole else shard.indices(0).numpy()
        rows, size = len(units), len(units)
    else:
        units, rows, size = np.zeros(1, dtype=np.int64), 0, shard.numel
    start, stop = (size * i // share.replicas for i in (share.index, share.index + 1))
    return _HeldUnits(rows, start, stop, units + first)
