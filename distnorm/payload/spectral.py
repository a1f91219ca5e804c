"""Spectral norms of weight matrices on any sharding, by a power iteration that goes on from step to step.

With orthonormal vectors V [n, r] that all ranks hold, each rank adds what its part of a matrix W [m, n]
contributes to ``Y = W V``; the sum comes out of the step's own all-reduce. The largest singular value of Y is
the estimate, never above that of W, and the orthonormalised Y takes the place of V in the next monitored
step, which forms ``W.T Y``. So each of them is half an iteration and needs no further collective; as weights
change slowly, the estimate follows once it has come close. Its error falls by about ``(s_{r+1} / s_1)^2``
each time, of the singular values s in falling order.

The cost is 8 r max(m, n) bytes a matrix in the all-reduce and as many on each rank, and one reading of the
matrices that match, on monitored steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import ConfigError, UnsupportedGradientError
from distnorm.measure.norms import Norm
from distnorm.payload.flat import refuse_flat
from distnorm.payload.indices import Indices
from distnorm.payload.parameters import trained_weights
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import ModelTable
from distnorm.plan.plan import Share, raise_named
from distnorm.sources.shards import GradShard

_BLOCK = 1 << 22  # elements of a matrix that are widened to fp64 together
_MATRIX = 2


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix of the model: its place in the table, its shape, and where its values begin."""

    slot: int
    shape: tuple[int, int]
    vectors: int
    start: int

    @property
    def length(self) -> int:
        return max(self.shape) * self.vectors


class SpectralNorms:
    """The payload of the iteration for one set of shards. Collective: every rank must make one.

    Args:
        ranks: who takes part.
        table: the model's parameters.
        shards: what this rank holds.
        shares: what it counts of each; replicas share the rows.
        norm: the configured norm.
        patterns: of the matrices' names; what they match and has other than two dims is left out.
        vectors: r.

    Raises:
        ConfigError: the norm is a maximum, or a pattern matches no matrix; on every rank alike.
        UnsupportedGradientError: a shard is a run of a flat parameter, or complex; on every rank.
    """

    def __init__(
        self,
        ranks: Ranks,
        table: ModelTable,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        norm: Norm,
        patterns: Sequence[str],
        vectors: int,
    ) -> None:
        if norm.op != "sum":
            raise ConfigError(
                f"norm.type: expected a finite order with monitor.spectral, found {norm.order:g}"
            )
        self._matrices = {one.slot: one for one in _matrices(table, patterns, vectors)}
        self._names = table.names
        self._held = [i for i, s in enumerate(shards) if s.numel and table.slots[i] in self._matrices]
        held, expected = [shards[i] for i in self._held], "real shards along dims, which have spectral norms"
        refuse_flat(ranks, held, expected, "take the pattern out")
        of_complex = [(shard.name, "complex values") for shard in held if shard.holder.is_complex()]
        raise_named(ranks, of_complex, UnsupportedGradientError, expected, "Take the pattern out.")
        self._shards, self._shares, self._slots = tuple(shards), tuple(shares), table.slots
        self._indices = Indices()
        for i in self._held:
            whole = shards[i].numel == shards[i].global_numel
            for dim in range(_MATRIX):
                of = np.arange(shards[i].global_shape[dim]) if whole else shards[i].indices(dim).numpy()
                self._indices[i, dim] = of
        self._from = 1  # the dim along which the vectors lie; the products lie along the other
        self._vectors: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Number of values; products along the shorter dim are followed by zeros."""
        return sum(matrix.length for matrix in self._matrices.values())

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64, which are to be added up. No device is waited for."""
        values = torch.zeros(self.length, dtype=torch.float64, device=device)
        weights = trained_weights(self._shards, gradients, frozenset(self._held))
        for i in self._held:
            weight, matrix = weights[i], self._matrices[self._slots[i]]
            if weight is not None:
                self._add(values, i, matrix, kernels.moved(weight, device))
        return values

    def _add(self, values: Tensor, i: int, matrix: _Matrix, weight: Tensor) -> None:
        of = values[matrix.start : matrix.start + matrix.length].view(-1, matrix.vectors)
        vectors = self._vectors_of(matrix, values)
        rows, columns = (self._indices.at((i, dim), values) for dim in range(_MATRIX))
        weight = weight.reshape(len(rows), len(columns))
        share = self._shares[i]
        begin, end = (len(rows) * k // share.replicas for k in (share.index, share.index + 1))
        step = max(1, _BLOCK // max(1, len(columns)))
        for a in range(begin, end, step):
            b = min(a + step, end)
            block = weight[a:b].double()
            if self._from == 1:
                of.index_add_(0, rows[a:b], block @ vectors[columns])
            else:
                of.index_add_(0, columns, block.T @ vectors[rows[a:b]])

    def _vectors_of(self, matrix: _Matrix, like: Tensor) -> Tensor:
        if matrix.slot not in self._vectors:
            dice = torch.Generator().manual_seed(crc32(self._names[matrix.slot].encode()))
            shape = matrix.shape[self._from], matrix.vectors
            start = torch.randn(shape, dtype=torch.float64, generator=dice, device="cpu")
            self._vectors[matrix.slot] = kernels.moved(torch.linalg.qr(start).Q, like.device)
        return self._vectors[matrix.slot]

    def advance(self, reduced: Tensor) -> None:
        """Go on from what the values were reduced to, [length] fp64. Every rank gets the same vectors, and no
        device is waited for."""
        for matrix in self._matrices.values():
            of = reduced[matrix.start : matrix.start + matrix.length].view(-1, matrix.vectors)
            # What isn't finite would stay so; the vectors of zeros are orthonormal too.
            products = of[: matrix.shape[1 - self._from]].nan_to_num(0.0, 0.0, 0.0)
            # Unlike torch's svd and eigh, its qr has no error code that the host would have to wait for.
            self._vectors[matrix.slot] = torch.linalg.qr(products).Q
        self._from = 1 - self._from

    def read(self, reduced: Tensor) -> dict[int, float]:
        """The estimates, by the places of the matrices in the table, of [length] values in the host's memory.

        Those of zeros, of what isn't finite, and of weights that nobody read are left out.
        """
        found = {}
        for matrix in self._matrices.values():
            of = reduced[matrix.start : matrix.start + matrix.length].view(-1, matrix.vectors).numpy()
            gram = of.T @ of
            if np.isfinite(gram).all() and gram.any():
                found[matrix.slot] = math.sqrt(float(np.linalg.eigvalsh(gram)[-1]))
        return found


def _matrices(table: ModelTable, patterns: Sequence[str], vectors: int) -> list[_Matrix]:
    slots = [
        slot
        for slot, (name, shape) in enumerate(zip(table.names, table.shapes, strict=True))
        if len(shape) == _MATRIX and min(shape) and any(fnmatchcase(name, p) for p in patterns)
    ]
    useless = [p for p in patterns if not any(fnmatchcase(table.names[slot], p) for slot in slots)]
    if useless:
        raise ConfigError(
            f"monitor.spectral: expected patterns that match parameters of two dims, found {useless}"
        )
    shapes = [(table.shapes[slot][0], table.shapes[slot][1]) for slot in slots]
    widths = [min(vectors, *shape) for shape in shapes]
    starts = accumulate((max(s) * w for s, w in zip(shapes, widths, strict=True)), initial=0)
    return [_Matrix(*of) for of in zip(slots, shapes, widths, starts, strict=False)]
