"""The fast path: gradients laid out as in the step before are found, measured and scaled by their addresses.

To read every gradient with care costs microseconds, which thousands of small ones turn into the price of
a step. After a careful reading that found only whole, contiguous gradients on one device, the next steps
check of each one only what can change: whether it is there, its class, dtype, size, layout, and whether its
storage still holds it. The device's compiled code then gets their addresses, which it already has if none
has moved.
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
from distnorm.measure.flat_gradients import FlatFinder
from distnorm.measure.gradients import Gradients
from distnorm.measure.norms import Norm
from distnorm.measure.replica_check import ReplicaCheck
from distnorm.plan.plan import Share
from distnorm.sources.shards import FlatGradient, Gate, GradShard, Source

_GRAD = attrgetter("grad")

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Class:
    """Gradients of one class, plain tensors or DTensors.

    Args:
        pick: from the holders of all shards to those of these gradients.
        finder: finds where they lie.
    """

    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    finder: kernels.Finder | FlatFinder


@dataclass(slots=True)
class _Tables:
    """Where gradients lie, whole and by what this rank counts of them, also for compiled code."""

    addresses: bytes
    whole: kernels.AddressTable
    all: kernels.Located
    counted: kernels.Located


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
            for i, tensor in zip(self._path.positions_by_class, local, strict=True):
                tensors[i] = tensor
            self._tensors, self._read = tensors, True
        return self._tensors

    @property
    def device(self) -> torch.device:
        return self._tables.whole.device

    @property
    def _are_on_host(self) -> bool:
        return isinstance(self._tables.all, kernels.AddressTable)

    def presence(self, weights: Mapping[int, int]) -> int:
        return self._path.presence

    def is_empty(self) -> bool:
        return False

    def statistic(
        self, norm: Norm, shares: Sequence[Share], device: torch.device, *, marks: bool = False
    ) -> Tensor:
        statistic = norm.statistic_at(self._tables.counted, self.taken)
        if marks and not isinstance(self._tables.counted, kernels.AddressTable):
            self.marks = kernels.FiniteMarks.of_table(self._tables.counted, self._path.each_position)
        return kernels.moved(statistic, device)

    def headed_statistic(
        self, norm: Norm, device: torch.device, header: int, *, marks: bool = False
    ) -> Tensor | None:
        place = self._tables.counted
        if isinstance(place, kernels.AddressTable) or place.device != device or norm.kernel is None:
            return None
        statistic = kernels.headed_statistic_at(place, norm.kernel, header, self.taken)
        if marks:
            self.marks = kernels.FiniteMarks.of_table(place, self._path.each_position)
        return statistic

    def clip_(self, reduced: Tensor, terms: kernels.ClipTerms) -> kernels.Clipped | None:
        place = self._tables.all
        if isinstance(place, kernels.AddressTable) or place.device != reduced.device or not place.kinds:
            return None
        clipped = kernels.clip_at_(place, reduced, terms)
        if terms.may_scale:
            self._mark_changed()
        return clipped

    def replica_numbers(self, check: ReplicaCheck) -> npt.NDArray[np.float64]:
        if not self._are_on_host:
            return super().replica_numbers(check)
        return check.numbers_at(self._tables.whole, self._path.places(check))

    def replica_difference(self, check: ReplicaCheck, device: torch.device) -> Tensor:
        place = self._tables.all
        if isinstance(place, kernels.AddressTable):
            return super().replica_difference(check, device)
        return check.of_table(place, self._path.places(check), device)

    def on_gpu(self) -> tuple[kernels.DeviceTable, Ints] | None:
        place = self._tables.counted
        return None if isinstance(place, kernels.AddressTable) else (place, self._path.positions)

    def addresses(self) -> tuple[kernels.AddressTable | None, Ints]:
        return self._tables.whole if self._are_on_host else None, self._path.positions

    def scale_(self, coef: Tensor, keep: Tensor | None = None) -> None:
        if self._are_on_host and keep is not None:
            super().scale_(coef, keep)
        elif kernels.scale_at_(self._tables.all, coef, keep):
            self._mark_changed()

    def _mark_changed(self) -> None:
        for found in self._held:
            found.mark_changed()

    def zero_unless_(self, keep: Tensor) -> None:
        if self._are_on_host:
            super().zero_unless_(keep)
        else:
            self.scale_(torch.ones_like(keep, dtype=torch.float64), keep)

    def views(self) -> list[Tensor | None]:
        return self.tensors


class FastPath:
    """The gradients of the same shards, step after step. It keeps neither them nor their holders alive.

    Attributes:
        presence: the sum of the weights of those that had a gradient.
        positions: of these among all shards, ascending: the order of the table, and of a careful reading.
        positions_by_class: the same, one class behind the other, as they are found.
        each_position: the same, each alone.
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
        self.positions_by_class = list(present)
        self._order = np.argsort(np.array(self.positions_by_class, dtype=np.int64))
        present = dict(sorted(present.items()))
        self.positions = np.array(list(present), dtype=np.int64)
        self.each_position = [(i,) for i in present]
        self._places = np.full(len(shares), -1, dtype=np.int64)
        self._places[self.positions] = np.arange(len(present))
        self._of_check: tuple[ReplicaCheck, Ints] | None = None
        counted = [(shares[i].start, shares[i].stop) for i in present]
        starts, stops = np.array(counted, dtype=np.int64).reshape(-1, 2).T
        self._whole = kernels.AddressTable.of(list(present.values()))
        self._counted = self._whole.part(starts, stops - starts)
        self._counts_all = np.array_equal(self._counted.numels, self._whole.numels)
        self._tables: _Tables | None = None

    @classmethod
    def of(
        cls, shards: Sequence[GradShard], shares: Sequence[Share], gradients: Gradients, presence: int
    ) -> FastPath | None:
        """What is known from a careful reading; `None` where the next step needs another."""
        if not gradients.is_plain or not all(_can_be_found(shard) for shard in shards):
            return None
        by_class: dict[type, dict[int, Tensor]] = {}
        flat: dict[int, tuple[FlatGradient, Tensor]] = {}
        absent: list[int] = []
        for i, (shard, tensor) in enumerate(zip(shards, gradients.tensors, strict=True)):
            place = shard.flat
            if tensor is None and place is None:
                absent.append(i)
            elif tensor is None or not tensor.is_contiguous() or not kernels.has_kernel(tensor):
                return None
            elif place is None:
                by_class.setdefault(type(shard.holder.grad), {})[i] = tensor
            else:
                flat[i] = place, tensor
        there = [tensor for tensor in gradients.tensors if tensor is not None]
        if not there or any(tensor.device != there[0].device for tensor in there):
            return None
        classes: list[_Class] = []
        present: dict[int, Tensor] = {}
        for members in by_class.values():
            try:
                of_class = kernels.Finder([_GRAD(shards[i].holder) for i in members])
            except ValueError:  # of a class that is read with care
                return None
            # What was read may be a part, or a sum, of what the parameters hold.
            if not of_class.table.is_of(list(members.values())):
                return None
            classes.append(_Class(_picker(list(members), len(shards)), of_class))
            present |= members
        if flat:
            there = [tensor for _, tensor in flat.values()]
            try:
                finder = FlatFinder([place for place, _ in flat.values()], there)
            except ValueError:  # they are copies, or parts of what no compiled code can read
                return None
            classes.append(_Class(_picker((), len(shards)), finder))
            present |= dict(zip(flat, there, strict=True))
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
        held: list[kernels.Found] = []
        for kind in self._classes:
            found = kind.finder(kind.pick(holders))
            if found is None:
                return None
            held.append(found)
        addresses = held[0].addresses
        if len(held) > 1:
            addresses = np.concatenate([found.addresses for found in held])[self._order]
        if self._tables is None or addresses.tobytes() != self._tables.addresses:
            tables = self._tables_at(addresses)
            if tables is None:
                return None
            self._tables = tables
        return FoundGradients(self, self._tables, held)

    def _tables_at(self, addresses: Ints) -> _Tables | None:
        whole = self._whole.at(addresses)
        if whole.overlap:
            return None
        before, self._tables = self._tables, None
        every = kernels.located(whole, before.all if before is not None else None)
        if every is None:
            return None
        if self._counts_all:
            return _Tables(addresses.tobytes(), whole, every, every)
        counted = kernels.located(self._counted.at(addresses), before.counted if before is not None else None)
        return None if counted is None else _Tables(addresses.tobytes(), whole, every, counted)

    def places(self, check: ReplicaCheck) -> Ints:
        """The place in the table of each gradient that is compared; -1 where there is none."""
        if self._of_check is None or self._of_check[0] is not check:
            self._of_check = check, self._places[check.positions]
        return self._of_check[1]


def _can_be_found(shard: GradShard) -> bool:
    is_flat = shard.flat is not None and shard.source is Source.GRADIENT and shard.place is None
    return shard.is_in_grad or is_flat


def _picker(which: Sequence[int], count: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    if list(which) == list(range(count)):
        return lambda holders: holders
    if len(which) < 2:
        return lambda holders: [holders[i] for i in which]
    return itemgetter(*which)
