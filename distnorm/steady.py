"""Gradients that lie in memory as they did one step before: read, measured and scaled all at once.

Looking at every gradient with care costs microseconds, which thousands of small ones turn into the price of
a step. Where the last careful reading found only whole, contiguous gradients in the CPU's memory, the next
steps ask each of them only for its address, by the interpreter's own loops, and for what would make another
careful reading necessary. What they find is handed to compiled code as spans of memory, in which neighbours
of one flat buffer are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_, itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.plan import Share
from distnorm.readings import Reading
from distnorm.shards import GradShard, Route, of_grad

Ints = npt.NDArray[np.int64]

_GRAD, _DTYPE, _IS_CPU = attrgetter("grad"), attrgetter("dtype"), attrgetter("is_cpu")


@dataclass(frozen=True, slots=True)
class _Kind:
    """Gradients of shards of one class.

    Args:
        route: the class's.
        pick: from all holders to those of these.
        layouts: of the gradients, as the route tells them. (Lists of the same objects compare fastest.)
        dtypes, numels: of the local tensors.
    """

    route: Route
    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    layouts: list[object]
    dtypes: list[torch.dtype]
    numels: list[int]

    def read(self, holders: Sequence[Tensor]) -> list[Tensor] | None:
        """The local gradients; `None` if one is missing, or laid out in another way."""
        gradients = list(map(_GRAD, self.pick(holders)))
        if list(map(self.route.layout_of, gradients)) != self.layouts:
            return None
        local = gradients if self.route.local_of is None else list(map(self.route.local_of, gradients))
        # What moves or converts a model does so to all of it.
        looked_at = slice(None, None, max(len(local) - 1, 1) if self.route.tells_all else 1)
        return local if self._are_alike(local[looked_at], looked_at) else None

    def _are_alike(self, local: Sequence[Tensor], which: slice) -> bool:
        return (
            list(map(_DTYPE, local)) == self.dtypes[which]
            and list(map(Tensor.numel, local)) == self.numels[which]
            and all(map(_IS_CPU, local))
            and all(map(Tensor.is_contiguous, local))
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's gradients.

    Args:
        gradients: this rank's local ones, those that are there.
        spans: where they lie.
        counted: where those of their elements lie that this rank counts.
    """

    gradients: list[Tensor]
    spans: kernels.Spans
    counted: kernels.Spans


class Steady:
    """The gradients of the same shards, step after step. It keeps neither them nor their holders alive.

    Args:
        kinds: the shards that had a gradient.
        absent: from all holders to those that had none.
        tensors: the local gradients that a careful reading found, kind by kind.
        shares: what this rank counts of each.
    """

    def __init__(
        self,
        kinds: list[_Kind],
        absent: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        tensors: Sequence[Tensor],
        shares: Sequence[Share],
    ) -> None:
        self._kinds, self._absent = kinds, absent
        starts, stops = np.array([(s.start, s.stop) for s in shares], dtype=np.int64).reshape(-1, 2).T
        whole = kernels.SpanTable.of(tensors)
        self._tables = whole, whole.part(starts, stops - starts)
        self._addresses: Ints = np.zeros(0, dtype=np.int64)
        self._spans: tuple[kernels.Spans, kernels.Spans] | None = None

    @classmethod
    def of(
        cls, shards: Sequence[GradShard], shares: Sequence[Share], readings: Sequence[Reading]
    ) -> Steady | None:
        """What is known from a careful reading; `None` where the next step needs another."""
        absent: list[int] = []
        found: dict[Route, dict[int, Tensor]] = {}
        for i, (shard, reading) in enumerate(zip(shards, readings, strict=True)):
            if shard.take is not of_grad or shard.route is None:
                return None
            if reading is None:
                absent.append(i)
            elif isinstance(reading, Tensor) and reading.is_contiguous():
                found.setdefault(shard.route, {})[i] = reading
            else:
                return None
        holders = [shard.holder for shard in shards]
        kinds = [_kind(route, holders, tensors) for route, tensors in found.items()]
        tensors = {i: tensor for of in found.values() for i, tensor in of.items()}
        if kernels.split(list(tensors.values()))[1]:
            return None
        return cls(kinds, _picker(absent, len(shards)), list(tensors.values()), [shares[i] for i in tensors])

    def read(self, holders: Sequence[Tensor]) -> Batch | None:
        """This step's gradients; `None` if they must be looked at with care.

        Args:
            holders: those of all shards, in their order.
        """
        try:
            return self._read(holders)
        except (AttributeError, TypeError, RuntimeError):  # a gradient of another kind, such as a sparse one
            return None

    def _read(self, holders: Sequence[Tensor]) -> Batch | None:
        if not all(map(is_, map(_GRAD, self._absent(holders)), repeat(None))):
            return None
        tensors: list[Tensor] = []
        for kind in self._kinds:
            found = kind.read(holders)
            if found is None:
                return None
            tensors += found
        addresses = kernels.addresses_of(tensors)
        if self._spans is None or not np.array_equal(addresses, self._addresses):
            whole, counted = self._tables
            self._addresses, self._spans = addresses, (whole.at(addresses), counted.at(addresses))
        return Batch(tensors, *self._spans)


def _kind(route: Route, holders: Sequence[Tensor], tensors: Mapping[int, Tensor]) -> _Kind:
    return _Kind(
        route,
        _picker(list(tensors), len(holders)),
        [route.layout_of(_GRAD(holders[i])) for i in tensors],
        list(map(_DTYPE, tensors.values())),
        list(map(Tensor.numel, tensors.values())),
    )


def _picker(which: Sequence[int], count: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    if list(which) == list(range(count)):
        return list
    if len(which) < 2:
        return lambda holders: [holders[i] for i in which]
    return itemgetter(*which)
