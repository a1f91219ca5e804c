"""The statistic of each gradient, taken while backward still computes the others.

A gradient is read when `backward_hooks` announces it. Each has one slot, which the next backward overwrites.
What lies on a GPU is `GpuOverlap`'s; the rest of this is of the CPU's memory.
A statistic is used only if its gradient is proved to be the same: the same address, the versions that
autograd counts, and a fingerprint of the bytes that this rank counts, for writes that autograd doesn't count
(`.grad.data`, numpy, foreach operators on DTensors, collectives). A fingerprint has every byte up to 16 MiB,
and of more 64 bytes of every KiB. If a single gradient is not the same, all are measured as if nothing
had been taken.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.measure.backward_hooks import AccumulateHook, Relay, replicated
from distnorm.measure.fingerprints import FingerprintedReads
from distnorm.measure.gpu_overlap import GpuOverlap, local_of, versions_of
from distnorm.measure.gradients import Gradients
from distnorm.measure.norms import Norm
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard

Ints = npt.NDArray[np.int64]


class Overlap:
    """Takes statistics during backward, until it is closed or dropped.

    Args:
        norm: which norm; one that compiled code can do.
        shards: what this rank holds.
        shares: what it counts of each.
        modules: those of the target, which say whose gradients DDP reduces.
        prints: takes the monitor's fingerprints, in a read of its own when the step is measured: what this
            takes during backward is not of every byte.

    Attributes:
        replicas: ranks over which DDP reduces every gradient; 0 where some gradient goes another way.
        reads_before: whether the next backward also reads gradients before DDP reduces them.

    Raises:
        ConfigError: a DDP module has a communication hook already.
    """

    def __init__(
        self,
        norm: Norm,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        modules: Sequence[nn.Module],
        prints: FingerprintedReads | None = None,
    ) -> None:
        self._norm, self._shards, self._shares, self._prints = norm, shards, shares, prints
        self._statistics = np.zeros(len(shards))
        self._bytes = np.zeros((len(shards), 2), dtype=np.int64)  # address and fingerprint
        counted = [(share.start, share.stop - share.start) for share in shares]
        self._counted = np.array(counted, dtype=np.int64).reshape(-1, 2)
        self._on_gpu = GpuOverlap(norm, shards)
        self._versions: dict[int, tuple[int, int]] = {}  # of the slots that hold something
        self._unmarked: set[int] = set()
        index = {id(shard.holder): i for i, shard in enumerate(shards) if _can_be_taken(shard)}
        self._handles: list[Any] = []
        # Not __del__: what is freed in a cycle finds the weak references that its handles remove by dead.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self.reads_before = False
        self._before: tuple[Tensor, kernels.TakenParts | None] | None = None
        self._buckets: dict[int, Tensor | None] = {}
        sizes = set()
        for module in replicated(modules):
            mine = {id(p): index.pop(id(p)) for p in module.parameters() if id(p) in index}
            sizes.add(module.process_group.size())
            Relay.of(module).listen(weakref.ref(self), mine)
        whole = len(sizes) == 1 and not index and all(map(_can_be_taken, shards))
        self.replicas: int = sizes.pop() if whole else 0
        for i in index.values():
            holder: Any = shards[i].holder
            self._handles.append(holder.register_post_accumulate_grad_hook(AccumulateHook(self, i)))

    def close(self) -> None:
        """Let backward run as before."""
        self._finalizer()

    def take(self, gradients: Gradients) -> Tensor | None:
        """The statistic, [width], of all gradients; `None` if one was not taken, or has changed since.

        Gradients on a GPU get what was taken instead, if any was, and find out there what has changed. Every
        slot is empty afterwards, since the caller may scale the gradients.
        """
        if self._prints is not None:
            self._prints.take(gradients)
        versions, self._versions = self._versions, {}
        buckets, self._buckets, self._before = self._buckets, {}, None
        gradients.taken = self._on_gpu.take(gradients)
        if gradients.taken is not None:
            self._keep_before(buckets, gradients.taken)
            return None
        table, places = gradients.addresses()
        if table is None or not len(places) or not self._are_same(versions, table, places):
            return None
        self._keep_before(buckets, None)
        taken = torch.from_numpy(self._statistics[np.sort(places)])
        return self._norm.reduce(taken.unsqueeze(1))

    def _keep_before(self, buckets: Mapping[int, Tensor | None], taken: kernels.TakenParts | None) -> None:
        squares = [one for one in buckets.values() if one is not None]
        if squares and len(squares) == len(buckets):
            self._before = torch.stack(squares).sum(dim=0), taken

    @property
    def before(self) -> Tensor | None:
        """The sum of squares before DDP's reduction, [1] fp64, once the step is measured; `None` or NaN
        unless each gradient was read exactly once, and none has changed since."""
        if self._before is None:
            return None
        squares, taken = self._before
        return squares if taken is None else torch.where(taken.were_kept(), squares, math.nan)

    def _are_same(
        self, versions: Mapping[int, tuple[int, int]], table: kernels.AddressTable, places: Ints
    ) -> bool:
        if not all(
            versions.get(i) == versions_of(gradient)
            for i in places.tolist()
            if (gradient := self._shards[i].holder.grad) is not None
        ):
            return False
        prints = self._fingerprints(table, places)
        found = None if prints is None else np.stack([table.starts, prints], axis=1)
        return found is not None and np.array_equal(self._bytes[places], found)

    def _fingerprints(self, table: kernels.AddressTable, places: Ints) -> Ints | None:
        """Of what this rank counts of gradients, by position; the rest is counted, and checked, elsewhere."""
        starts, numels = self._counted[places].T
        return kernels.fingerprints(table.part(starts, numels))

    def read(self, i: int) -> None:
        """Take the statistic of a gradient that is final."""
        if self._on_gpu.is_ready:
            self._on_gpu.read(i)
            return
        self._versions.pop(i, None)
        reading: object = None
        with suppress(DistnormError):  # the measurement will raise it
            reading = self._shards[i].read()
        if (
            isinstance(reading, Tensor)
            and reading.is_contiguous()
            and self._read_local(i, reading.reshape(-1))
        ):
            self.mark([i])

    def read_before(self, bucket: int, flat: Tensor) -> None:
        """Read this rank's own gradients, before others' are added; once in a step."""
        if self.reads_before:
            is_again = bucket in self._buckets
            self._buckets[bucket] = None if is_again else self._norm.statistic([flat], flat.device)

    def read_reduced(self, pieces: Sequence[tuple[int, Tensor]]) -> None:
        """Take the statistics of elements that will be gradients; `mark` makes them count."""
        if self._on_gpu.is_ready:
            self._on_gpu.read_reduced(pieces)
            return
        for i, flat in pieces:
            self._read_local(i, flat)

    def _read_local(self, i: int, flat: Tensor) -> bool:
        self._versions.pop(i, None)
        share = self._shares[i]
        if kernels.split([flat])[1]:
            return False
        counted = flat[share.start : share.stop]
        # Not of the gradient later: DDP leaves one as it was that no rank has used, whatever its hook gave.
        prints = kernels.fingerprints(kernels.AddressTable.of([counted]))
        if prints is None:
            return False
        self._statistics[i] = float(self._norm.statistic([counted], flat.device))
        self._bytes[i, 1] = prints[0]
        self._unmarked.add(i)
        return True

    def mark(self, which: Sequence[int]) -> None:
        """Remember what some gradients are, now that they are final."""
        self._on_gpu.mark(which)
        held = {i: self._shards[i].holder.grad for i in self._unmarked.intersection(which)}
        self._unmarked.difference_update(which)
        for i, gradient in held.items():
            if gradient is not None and not kernels.split([local_of(gradient)])[1]:
                self._bytes[i, 0] = local_of(gradient).data_ptr()
                self._versions[i] = versions_of(gradient)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _can_be_taken(shard: GradShard) -> bool:
    holder = shard.holder
    return shard.is_in_grad and shard.gate is None and holder.requires_grad and holder.is_leaf
