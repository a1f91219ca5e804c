"""Gradients that lie in memory as they did one step before: read, measured and scaled all at once.

To look at every gradient with care costs microseconds, which thousands of small ones turn into the price of
a step. Where the last careful reading found only whole, contiguous gradients in the CPU's memory, the next
steps ask of each one only where it is, and whether it must be looked at again. Compiled code is told of spans
of memory then, in which neighbours in one flat buffer are one.
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
from distnorm.measure.readings import Reading
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard, Route, of_grad

Ints = npt.NDArray[np.int64]
Pick = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From the holders of all shards to those of some."""

_GRAD = attrgetter("grad")


@dataclass(frozen=True, slots=True)
class Spans:
    """Where one step's gradients lie: `all` of this rank's, and what it `counted` of them."""

    all: kernels.AddressTable
    counted: kernels.AddressTable


@dataclass(slots=True)
class _Kind:
    """Gradients of one class of shards, what finds them, and where in the list of all they are."""

    route: Route
    pick: Pick
    finder: kernels.Finder
    place: slice

    def find(self, holders: Sequence[Tensor], addresses: Ints) -> bool:
        """Fill in the addresses of its gradients; whether none must be looked at with care."""
        found = self.finder(self.pick(holders))
        if found is not None:
            addresses[self.place] = found.addresses
        return found is not None


class Steady:
    """The gradients of the same shards, step after step. It keeps neither them nor their holders alive.

    Args:
        kinds: the shards that had a gradient.
        absent: those that had none.
        tensors: the local gradients that a careful reading found, kind by kind.
        shares: what this rank counts of each.
    """

    def __init__(
        self, kinds: Sequence[_Kind], absent: Pick, tensors: Sequence[Tensor], shares: Sequence[Share]
    ) -> None:
        self._kinds, self._absent = kinds, absent
        starts, stops = np.array([(s.start, s.stop) for s in shares], dtype=np.int64).reshape(-1, 2).T
        whole = kernels.AddressTable.of(tensors)
        self._tables = whole, whole.part(starts, stops - starts)
        self._addresses: Ints = np.zeros(0, dtype=np.int64)
        self._spans: Spans | None = None

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
        tensors = {i: tensor for of in found.values() for i, tensor in of.items()}
        if kernels.split(list(tensors.values()))[1]:
            return None
        holders = [shard.holder for shard in shards]
        kinds: list[_Kind] = []
        try:
            for route, of in found.items():
                kinds.append(_kind(route, holders, of, kinds[-1].place.stop if kinds else 0))
        except ValueError:
            return None
        return cls(kinds, _picker(absent, len(shards)), list(tensors.values()), [shares[i] for i in tensors])

    def read(self, holders: Sequence[Tensor]) -> Spans | None:
        """This step's gradients; `None` if they must be looked at with care.

        Args:
            holders: those of all shards, in their order.
        """
        if not all(map(is_, map(_GRAD, self._absent(holders)), repeat(None))):
            return None
        whole, counted = self._tables
        addresses = np.empty(len(whole.numels), dtype=np.int64)
        if not all(kind.find(holders, addresses) for kind in self._kinds):
            return None
        if self._spans is None or not np.array_equal(addresses, self._addresses):
            self._addresses, self._spans = addresses, Spans(whole.at(addresses), counted.at(addresses))
        return self._spans

    def scale_(self, spans: Spans, coef: Tensor, holders: Sequence[Tensor]) -> None:
        """Multiply the gradients that `read` has just found, in place, and tell autograd."""
        if kernels.scale_at_(spans.all, coef):
            for kind in self._kinds:
                if kind.route.is_versioned:
                    torch.autograd.graph.increment_version(list(map(_GRAD, kind.pick(holders))))


def _kind(route: Route, holders: Sequence[Tensor], which: Mapping[int, Tensor], start: int) -> _Kind:
    finder = kernels.Finder([_GRAD(holders[i]) for i in which])
    return _Kind(route, _picker(list(which), len(holders)), finder, slice(start, start + len(which)))


def _picker(which: Sequence[int], count: int) -> Pick:
    if list(which) == list(range(count)):
        return lambda holders: holders
    if len(which) < 2:
        return lambda holders: [holders[i] for i in which]
    return itemgetter(*which)
