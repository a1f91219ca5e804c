"""The fast path: gradients laid out as in the step before are found, measured and scaled by their addresses.

To read every gradient with care costs microseconds, which thousands of small ones turn into the price of
a step. After a careful reading that found only whole, contiguous gradients in the CPU's memory, the next
steps check of each one only what can change: whether it is there, its class, dtype, size, layout, and whether
its storage still holds it. Compiled code then gets spans of memory, where neighbours in one flat buffer are
one span.
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
from distnorm.measure.gradients import Gradients
from distnorm.measure.norms import Norm
from distnorm.measure.replica_check import ReplicaCheck
from distnorm.plan.plan import Share
from distnorm.sources.shards import Gate, GradShard, Source

_GRAD = attrgetter("grad")

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Class:
    """Gradients of one class, plain tensors or DTensors.

    Args:
        pick: from the holders of all shards to those of these gradients.
        finder: finds where they lie.
        place: of their addresses among those of all.
    """

    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    finder: kernels.Finder
    place: slice


@dataclass(slots=True)
class _Tables:
    """Where gradients lie, whole and by what this rank counts of them."""

    addresses: Ints
    whole: kernels.AddressTable
    all: kernels.AddressTable
    counted: kernels.AddressTable


class FoundGradients(Gradients):
    """Gradients that the fast path found by address. It holds references to them."""

    def __init__(
        self,
        path: FastPath,
        tables: _Tables,
        held: Sequence[kernels.Found],
    ) -> None:
        super().__init__((), ())
        self._path, self._tables, self._held = path, tables, held
        self._read = False

    @property
    def tensors(self) -> list[Tensor | None]:
        if not self._read:
            tensors: list[Tensor | None] = [None] * self._path.count
            local = (tensor for found in self._held for tensor in found.tensors())
            for i, tensor in zip(self._path.positions.tolist(), local, strict=True):
                tensors[i] = tensor
            self._tensors, self._read = tensors, True
        return self._tensors

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def presence(self, weights: Mapping[int, int]) -> int:
        return self._path.presence

    def is_empty(self) -> bool:
        return False

    def statistic(
        self, norm: Norm, shares: Sequence[Share], device: torch.device, *, marks: bool = False
    ) -> Tensor:
        return kernels.moved(norm.statistic_at(self._tables.counted), device)

    def replica_numbers(self, check: ReplicaCheck) -> npt.NDArray[np.float64]:
        return check.numbers_at(self._tables.whole, self._path.places(check))

    def addresses(self) -> tuple[kernels.AddressTable, Ints]:
        return self._tables.whole, self._path.positions

    def scale_(self, coef: Tensor) -> None:
        if kernels.scale_at_(self._tables.all, coef):
            for found in self._held:
                found.mark_changed()

    def views(self) -> list[Tensor | None]:
        return self.tensors


class FastPath:
    """The gradients of the same shards, step after step. It keeps neither them nor their holders alive.

    Attributes:
        presence: the sum of the weights of those that had a gradient.
        positions: of these among all shards, in the order of the table.
        count: of all shards.
    """

    def __init__(
        self,
        classes: Sequence[_Class],
        absent: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        gates: Sequence[Gate],
        present: Mapping[int, Tensor],
        shares: Sequence[Share],
        presence: int,
    ) -> None:
        self._classes, self._absent, self._gates, self.presence = classes, absent, gates, presence
        self.count = len(shares)
        self.positions = np.array(list(present), dtype=np.int64)
        self._places = np.full(len(shares), -1, dtype=np.int64)
        self._places[self.positions] = np.arange(len(present))
        self._of_check: tuple[ReplicaCheck, Ints] | None = None
        counted = [(shares[i].start, shares[i].stop) for i in present]
        starts, stops = np.array(counted, dtype=np.int64).reshape(-1, 2).T
        self._whole = kernels.AddressTable.of(list(present.values()))
        self._counted = self._whole.part(starts, stops - starts)
        self._tables: _Tables | None = None

    @classmethod
    def of(
        cls, shards: Sequence[GradShard], shares: Sequence[Share], gradients: Gradients, presence: int
    ) -> FastPath | None:
        """What is known from a careful reading; `None` where the next step needs another."""
        if not gradients.is_plain or not all(_can_be_found(shard) for shard in shards):
            return None
        by_class: dict[type, dict[int, Tensor]] = {}
        absent: list[int] = []
        for i, (shard, tensor) in enumerate(zip(shards, gradients.tensors, strict=True)):
            if tensor is None:
                absent.append(i)
            elif tensor.is_contiguous() and not kernels.split([tensor])[1]:
                by_class.setdefault(type(shard.holder.grad), {})[i] = tensor
            else:
                return None
        if not by_class:
            return None
        classes: list[_Class] = []
        present: dict[int, Tensor] = {}
        for members in by_class.values():
            place = slice(len(present), len(present) + len(members))
            try:
                finder = kernels.Finder([_GRAD(shards[i].holder) for i in members])
            except ValueError:  # of a class that is read with care
                return None
            # What was read may be a part, or a sum, of what the parameters hold.
            if not finder.table.is_of(list(members.values())):
                return None
            classes.append(_Class(_picker(list(members), len(shards)), finder, place))
            present |= members
        gates = {id(gate): gate for shard in shards if (gate := shard.gate) is not None}
        return cls(classes, _picker(absent, len(shards)), list(gates.values()), present, shares, presence)

    def read(self, holders: Sequence[Tensor]) -> FoundGradients | None:
        """This step's gradients; `None` if they must be read with care.

        Args:
            holders: of the shards that the path was made of, in their order.
        """
        if any(gate.refusal() is not None for gate in self._gates):
            return None
        if not all(map(is_, map(_GRAD, self._absent(holders)), repeat(None))):
            return None
        addresses = np.empty(len(self._whole.numels), dtype=np.int64)
        held: list[kernels.Found] = []
        for kind in self._classes:
            found = kind.finder(kind.pick(holders))
            if found is None:
                return None
            addresses[kind.place] = found.addresses
            held.append(found)
        if self._tables is None or not np.array_equal(addresses, self._tables.addresses):
            whole = self._whole.at(addresses)
            if whole.overlap:
                return None
            self._tables = _Tables(addresses, whole, whole.merged, self._counted.at(addresses).merged)
        return FoundGradients(self, self._tables, held)

    def places(self, check: ReplicaCheck) -> Ints:
        """The place in the table of each gradient that is compared; -1 where there is none."""
        if self._of_check is None or self._of_check[0] is not check:
            self._of_check = check, self._places[check.positions]
        return self._of_check[1]


def _can_be_found(shard: GradShard) -> bool:
    return shard.has_fast_path and shard.source is Source.GRADIENT


def _picker(which: Sequence[int], count: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    if list(which) == list(range(count)):
        return lambda holders: holders
    if len(which) < 2:
        return lambda holders: [holders[i] for i in which]
    return itemgetter(*which)
