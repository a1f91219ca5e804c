"""The statistic of each gradient, taken while backward still computes the others.

A gradient is read when it is final: torch's own accumulation and FSDP2 tell so by post-accumulate hooks, DDP
by the communication hook of its bucket. Each has one slot, which the next backward overwrites. What was
taken counts only while the gradient is the same tensor and nothing has changed it in place; if a single one
has changed, all are measured as if nothing had been taken. (What writes to the memory without telling
autograd, as numpy does, is not seen.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distnorm import kernels
from distnorm.errors import ConfigError, DistnormError
from distnorm.measure.norms import Norm
from distnorm.plan.collectives import average_bucket
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard, of_grad

Bucket = Any
"""`torch.distributed.GradBucket`, where torch is built with collectives."""


@dataclass(slots=True)
class _Slot:
    """What was taken of one gradient: the statistic, and what tells whether it is still that one."""

    statistic: float
    gradient: weakref.ref[Tensor] | None
    mark: tuple[int, ...] | None


class Overlap:
    """Takes statistics during backward, for as long as somebody holds it.

    Args:
        norm: which norm; one that compiled code can do.
        shards: what this rank holds.
        shares: what it counts of each.
        modules: those of the target, which tell whose gradients DDP reduces.

    Attributes:
        replicas: ranks over which DDP reduces every gradient; 0 where some gradient goes another way.
        looks_before: whether the next backward also looks at gradients before DDP reduces them.
        before: the sum of squares, [1] fp64, that it saw then of the gradients that were taken last; `None`
            where it saw not all of them just once, or they have changed since.

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
        self._slots: dict[int, _Slot] = {}
        index = {id(shard.holder): i for i, shard in enumerate(shards) if _can_be_taken(shard)}
        this = weakref.ref(self)
        self._handles = []
        self.looks_before = False
        self.before: Tensor | None = None
        self._buckets: dict[int, Tensor | None] = {}
        sizes = set()
        for replicated in _replicated(modules):
            mine = {id(p): index.pop(id(p)) for p in replicated.parameters() if id(p) in index}
            sizes.add(replicated.process_group.size())
            _Relay.of(replicated).listen(this, mine)
        whole = len(sizes) == 1 and not index and all(map(_can_be_taken, shards))
        self.replicas: int = sizes.pop() if whole else 0
        for i in index.values():
            hook = partial(_when_accumulated, this, i)
            holder: Any = shards[i].holder
            self._handles.append(holder.register_post_accumulate_grad_hook(hook))

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()

    def take(self) -> Tensor | None:
        """The statistic, [width], of all gradients; `None` if one was not taken, or has changed since.

        Every slot is empty afterwards: gradients that were measured once may be scaled unseen.
        """
        slots, self._slots = self._slots, {}
        buckets, self._buckets, self.before = self._buckets, {}, None
        statistics = []
        for i, shard in enumerate(self._shards):
            gradient = shard.holder.grad
            if gradient is None:
                continue
            slot = slots.get(i)
            if slot is None or slot.gradient is None or slot.gradient() is not gradient:
                return None
            assert shard.route is not None
            if shard.route.mark_of(gradient) != slot.mark:
                return None
            statistics.append(slot.statistic)
        squares = [one for one in buckets.values() if one is not None]
        if squares and len(squares) == len(buckets):
            self.before = torch.stack(squares).sum(dim=0)
        if not statistics:
            return None
        return self._norm.reduce(torch.tensor(statistics, dtype=torch.float64).unsqueeze(1))

    def read(self, i: int) -> None:
        """Take the statistic of a gradient that is final."""
        self._slots.pop(i, None)
        reading: object = None
        with suppress(DistnormError):  # whoever measures is refused
            reading = self._shards[i].read()
        if isinstance(reading, Tensor) and reading.is_contiguous():
            self.read_local(i, reading.reshape(-1))
            self.mark([i])

    def look_before(self, bucket: int, flat: Tensor) -> None:
        """See this rank's own gradients, before others' are added; once in a step."""
        if self.looks_before:
            seen = bucket in self._buckets
            self._buckets[bucket] = None if seen else self._norm.statistic([flat], flat.device)

    def read_local(self, i: int, flat: Tensor) -> None:
        """Take the statistic of elements that will be a gradient; `mark` makes it count."""
        share = self._shares[i]
        if not kernels.split([flat])[1]:
            counted = flat[share.start : share.stop]
            statistic = self._norm.statistic([counted], flat.device)  # compiled code's are one number
            self._slots[i] = _Slot(float(statistic), None, None)

    def mark(self, which: Sequence[int]) -> None:
        """Remember which tensors some gradients are, now that they are final."""
        for i in which:
            shard, slot = self._shards[i], self._slots.get(i)
            gradient = shard.holder.grad
            if slot is not None and gradient is not None and shard.route is not None:
                slot.gradient, slot.mark = weakref.ref(gradient), shard.route.mark_of(gradient)


class _Relay:
    """The communication hook of one DDP module: the user's or DDP's own, and then a look at the result."""

    def __init__(self, module: DistributedDataParallel) -> None:
        if module._comm_hooks:
            raise ConfigError(
                "clip.overlap: expected a DDP module without a communication hook, found one; register it "
                "after GradClipper or attach, which runs it then"
            )
        self._inner: Callable[[Any, Bucket], Future[Any]] | None = None
        self._state: Any = None
        self._group = module.process_group
        self._listener: weakref.ref[Overlap] | None = None
        self._index: Mapping[int, int] = {}
        module.register_comm_hook(None, lambda state, bucket: self._hook(bucket))
        module.register_comm_hook = self._register  # type: ignore[method-assign]

    @classmethod
    def of(cls, module: DistributedDataParallel) -> _Relay:
        """The module's relay, made at first; a module can't be freed of it."""
        if module not in _relays:
            _relays[module] = cls(module)
        return _relays[module]

    def listen(self, listener: weakref.ref[Overlap], index: Mapping[int, int]) -> None:
        """Tell the listener, and no other any more, of the parameters with these `id`s."""
        self._listener, self._index = listener, index

    def _register(self, state: object, hook: Callable[[Any, Bucket], Future[Any]]) -> None:
        self._state, self._inner = state, hook

    def _hook(self, bucket: Bucket) -> Future[Any]:
        listener = self._listener() if self._listener is not None else None
        if listener is not None:
            listener.look_before(bucket.index(), bucket.buffer())
        if self._inner is not None:
            reduced = self._inner(self._state, bucket)
        else:
            reduced = average_bucket(self._group, bucket)
        if listener is None:
            return reduced
        pieces = [(self._index.get(id(p)), p.numel(), p.is_contiguous()) for p in bucket.parameters()]
        mark = partial(listener.mark, [i for i, _, _ in pieces if i is not None])
        engine = torch.autograd.Variable._execution_engine
        # DDP's own callback, which puts buckets into gradients, is queued later than this one: so once more.
        engine.queue_callback(partial(engine.queue_callback, mark))
        return reduced.then(partial(_when_reduced, listener, pieces))


_relays: weakref.WeakKeyDictionary[DistributedDataParallel, _Relay] = weakref.WeakKeyDictionary()


def _when_accumulated(listener: weakref.ref[Overlap], i: int, holder: Tensor) -> None:
    overlap = listener()
    if overlap is not None:
        overlap.read(i)


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


def _can_be_taken(shard: GradShard) -> bool:
    holder = shard.holder
    return shard.take is of_grad and shard.route is not None and holder.requires_grad and holder.is_leaf


def _replicated(modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    return [
        inner
        for module in modules
        for inner in module.modules()
        if isinstance(inner, DistributedDataParallel)
    ]
