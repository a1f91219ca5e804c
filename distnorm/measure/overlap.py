"""The statistic of each gradient, taken while backward still computes the others.

A gradient is read when it is final: torch's own accumulation and FSDP2 announce that by post-accumulate
hooks, DDP by the communication hook of its bucket. Each has one slot, which the next backward overwrites.
A statistic is used only if its gradient is proved to be the same: the same address, the versions that
autograd counts, and a fingerprint of the bytes that this rank counts, for writes that autograd doesn't count
(`.grad.data`, numpy, foreach operators on DTensors, collectives). A fingerprint has every byte up to 16 MiB,
and of more 64 bytes of every KiB. If a single gradient is not the same, all are measured as if nothing
had been taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distnorm import kernels
from distnorm.errors import ConfigError, DistnormError
from distnorm.measure.gradients import Gradients
from distnorm.measure.norms import Norm
from distnorm.plan.collectives import average_bucket
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard

Bucket = Any
"""`torch.distributed.GradBucket`, where torch is built with collectives."""

Ints = npt.NDArray[np.int64]


class Overlap:
    """Takes statistics during backward, until it is closed or dropped.

    Args:
        norm: which norm; one that compiled code can do.
        shards: what this rank holds.
        shares: what it counts of each.
        modules: those of the target, which say whose gradients DDP reduces.

    Attributes:
        replicas: ranks over which DDP reduces every gradient; 0 where some gradient goes another way.
        reads_before: whether the next backward also reads gradients before DDP reduces them.
        before: their sum of squares before DDP's reduction, [1] fp64; `None` unless each was read exactly
            once, and none has changed since.

    Raises:
        ConfigError: a DDP module has a communication hook already.
    """

    def __init__(
        self,
        norm: Norm,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        modules: Sequence[nn.Module],
    ) -> None:
        self._norm, self._shards, self._shares = norm, shards, shares
        self._statistics = np.zeros(len(shards))
        self._bytes = np.zeros((len(shards), 2), dtype=np.int64)  # address and fingerprint
        counted = [(share.start, share.stop - share.start) for share in shares]
        self._counted = np.array(counted, dtype=np.int64).reshape(-1, 2)
        self._versions: dict[int, tuple[int, int]] = {}  # of the slots that hold something
        self._unmarked: set[int] = set()
        index = {id(shard.holder): i for i, shard in enumerate(shards) if _can_be_taken(shard)}
        self._handles: list[Any] = []
        # Not __del__: what is freed in a cycle finds the weak references that its handles remove by dead.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self.reads_before = False
        self.before: Tensor | None = None
        self._buckets: dict[int, Tensor | None] = {}
        sizes = set()
        for replicated in _replicated(modules):
            mine = {id(p): index.pop(id(p)) for p in replicated.parameters() if id(p) in index}
            sizes.add(replicated.process_group.size())
            _Relay.of(replicated).listen(weakref.ref(self), mine)
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

        Every slot is empty afterwards, since the caller may scale the gradients.
        """
        versions, self._versions = self._versions, {}
        buckets, self._buckets, self.before = self._buckets, {}, None
        table, places = gradients.addresses()
        if table is None or not len(places) or not self._are_same(versions, table, places):
            return None
        squares = [one for one in buckets.values() if one is not None]
        if squares and len(squares) == len(buckets):
            self.before = torch.stack(squares).sum(dim=0)
        taken = torch.from_numpy(self._statistics[np.sort(places)])
        return self._norm.reduce(taken.unsqueeze(1))

    def _are_same(
        self, versions: Mapping[int, tuple[int, int]], table: kernels.AddressTable, places: Ints
    ) -> bool:
        if not all(
            versions.get(i) == _versions_of(gradient)
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
        self._versions.pop(i, None)
        reading: object = None
        with suppress(DistnormError):  # the measurement will raise it
            reading = self._shards[i].read()
        if (
            isinstance(reading, Tensor)
            and reading.is_contiguous()
            and self.read_local(i, reading.reshape(-1))
        ):
            self.mark([i])

    def read_before(self, bucket: int, flat: Tensor) -> None:
        """Read this rank's own gradients, before others' are added; once in a step."""
        if self.reads_before:
            is_again = bucket in self._buckets
            self._buckets[bucket] = None if is_again else self._norm.statistic([flat], flat.device)

    def read_local(self, i: int, flat: Tensor) -> bool:
        """Take the statistic of elements that will be a gradient, if it can be; `mark` makes it count."""
        self._versions.pop(i, None)
        share = self._shares[i]
        if kernels.split([flat])[1]:
            return False
        counted = flat[share.start : share.stop]
        self._statistics[i] = float(self._norm.statistic([counted], flat.device))
        self._unmarked.add(i)
        return True

    def mark(self, which: Sequence[int]) -> None:
        """Remember what some gradients are, now that they are final."""
        held = {i: self._shards[i].holder.grad for i in self._unmarked.intersection(which)}
        self._unmarked.difference_update(which)
        locals_ = {i: _local(gradient) for i, gradient in held.items() if gradient is not None}
        fitting = [i for i, at in locals_.items() if at.is_contiguous() and not kernels.split([at])[1]]
        table = kernels.AddressTable.of([locals_[i] for i in fitting])
        prints = self._fingerprints(table, np.array(fitting, dtype=np.int64))
        if prints is None:
            return
        for i, address, fingerprint in zip(fitting, table.starts.tolist(), prints.tolist(), strict=True):
            self._bytes[i] = address, fingerprint
            if (gradient := held[i]) is not None:
                self._versions[i] = _versions_of(gradient)


class AccumulateHook:
    """Lets an `Overlap` read a gradient that is final. In a copy or pickle of its parameter it does
    nothing."""

    def __init__(self, listener: Overlap | None = None, i: int = -1) -> None:
        self._listener, self._i = None if listener is None else weakref.ref(listener), i

    def __call__(self, holder: Tensor) -> None:
        overlap = None if self._listener is None else self._listener()
        if overlap is not None:
            overlap.read(self._i)

    def __reduce__(self) -> tuple[type[AccumulateHook], tuple[()]]:
        return AccumulateHook, ()


class _Relay:
    """The communication hook of one DDP module: the user's or DDP's own, and then a read of the result."""

    def __init__(self, module: DistributedDataParallel) -> None:
        if module._comm_hooks:
            raise ConfigError(
                "clip.overlap: expected a DDP module without a communication hook, found one; register it "
                "after GradClipper or attach, which runs it then"
            )
        self.inner: Callable[[Any, Bucket], Future[Any]] | None = None
        self.state: Any = None
        self._group = module.process_group
        self._listener: weakref.ref[Overlap] | None = None
        self._index: Mapping[int, int] = {}
        # torch refuses a hook whose annotation of `bucket` is a string, so this one has none.
        module.register_comm_hook(self, lambda relay, bucket: relay.run(bucket))
        # A copy of the module has a reducer of its own, without our hook, and must not claim to have it.
        module._comm_hooks.pop()
        module.register_comm_hook = partial(_register_inner, module)  # type: ignore[method-assign]

    @classmethod
    def of(cls, module: DistributedDataParallel) -> _Relay:
        """The module's relay, made once: torch can't unregister a communication hook."""
        if module not in _relays:
            _relays[module] = cls(module)
        return _relays[module]

    def listen(self, listener: weakref.ref[Overlap], index: Mapping[int, int]) -> None:
        """From now on let this listener read the parameters with these `id`s, and no other listener."""
        self._listener, self._index = listener, index

    def run(self, bucket: Bucket) -> Future[Any]:
        """Reduce a bucket, and let the listener read it before and after."""
        listener = self._listener() if self._listener is not None else None
        if torch._C._current_graph_task_id() == -1:
            listener = None  # under torch's Join: this rank is out of data, and reduces zeros
        if listener is not None:
            listener.read_before(bucket.index(), bucket.buffer())
        reduced = (
            average_bucket(self._group, bucket) if self.inner is None else self.inner(self.state, bucket)
        )
        if listener is None:
            return reduced
        pieces = [(self._index.get(id(p)), p.numel(), p.is_contiguous()) for p in bucket.parameters()]
        mark = partial(listener.mark, [i for i, _, is_whole in pieces if i is not None and is_whole])
        engine = torch.autograd.Variable._execution_engine
        # DDP's own callback, which puts buckets into gradients, is queued later than this one: so once more.
        engine.queue_callback(partial(engine.queue_callback, mark))
        return reduced.then(partial(_when_reduced, listener, pieces))


_relays: weakref.WeakKeyDictionary[DistributedDataParallel, _Relay] = weakref.WeakKeyDictionary()


def _register_inner(module: DistributedDataParallel, state: object, hook: Callable[..., Future[Any]]) -> None:
    """In place of a DDP module's `register_comm_hook`: keeps the hook for the relay to run. A copy of the
    module has no relay, and registers as usual."""
    relay = _relays.get(module)
    if relay is None:
        DistributedDataParallel.register_comm_hook(module, state, hook)
    else:
        relay.state, relay.inner = state, hook


def _when_reduced(
    listener: Overlap, pieces: Sequence[tuple[int | None, int, bool]], reduced: Future[Any]
) -> Any:
    value = reduced.value()
    flat = value[0] if isinstance(value, list | tuple) else value
    if sum(numel for _, numel, _ in pieces) == flat.numel():
        at = 0
        for i, numel, is_contiguous in pieces:
            if i is not None and is_contiguous:
                listener.read_local(i, flat[at : at + numel])
            at += numel
    return flat


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _can_be_taken(shard: GradShard) -> bool:
    holder = shard.holder
    return shard.is_in_grad and shard.gate is None and holder.requires_grad and holder.is_leaf


def _local(gradient: Tensor) -> Tensor:
    local: Tensor = getattr(gradient, "_local_tensor", gradient)
    return local


def _versions_of(gradient: Tensor) -> tuple[int, int]:
    return _version_of(gradient), _version_of(_local(gradient))


def _version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors count no changes


def _replicated(modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    return [
        inner
        for module in modules
        for inner in module.modules()
        if isinstance(inner, DistributedDataParallel)
    ]
