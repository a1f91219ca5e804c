"""The moments of a backward pass in which gradients are final: torch's hooks, which tell a listener.

torch's own accumulation and FSDP2 announce them by post-accumulate hooks, FSDP2 on the stream of its
reduction; DDP by the communication hook of its bucket.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distnorm.errors import ConfigError
from distnorm.plan.collectives import average_bucket

Bucket = Any
"""`torch.distributed.GradBucket`, where torch is built with collectives."""


class Listener(Protocol):
    """Receives what happens to gradients in backward, by their positions among the shards."""

    def read(self, i: int) -> None:
        """A gradient is final, where its parameter has it."""

    def read_before(self, bucket: int, flat: Tensor) -> None:
        """This rank's own gradients are complete in a bucket, before others' are added."""

    def read_reduced(self, pieces: Sequence[tuple[int, Tensor]]) -> None:
        """These elements of a bucket will be gradients; `mark` follows when they are."""

    def mark(self, which: Sequence[int]) -> None:
        """Gradients are final that were read in a bucket."""


class AccumulateHook:
    """Lets a `Listener` read a gradient that is final. In a copy or pickle of its parameter it does
    nothing."""

    def __init__(self, listener: Listener | None = None, i: int = -1) -> None:
        self._listener, self._i = None if listener is None else weakref.ref(listener), i

    def __call__(self, holder: Tensor) -> None:
        overlap = None if self._listener is None else self._listener()
        if overlap is not None:
            overlap.read(self._i)

    def __reduce__(self) -> tuple[type[AccumulateHook], tuple[()]]:
        return AccumulateHook, ()


class Relay:
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
        self._listener: weakref.ref[Listener] | None = None
        self._index: Mapping[int, int] = {}
        # torch refuses a hook whose annotation of `bucket` is a string, so this one has none.
        module.register_comm_hook(self, lambda relay, bucket: relay.run(bucket))
        # A copy of the module has a reducer of its own, without our hook, and must not claim to have it.
        module._comm_hooks.pop()
        module.register_comm_hook = partial(_register_inner, module)  # type: ignore[method-assign]

    @classmethod
    def of(cls, module: DistributedDataParallel) -> Relay:
        """The module's relay, made once: torch can't unregister a communication hook."""
        if module not in _relays:
            _relays[module] = cls(module)
        return _relays[module]

    def listen(self, listener: weakref.ref[Listener], index: Mapping[int, int]) -> None:
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


_relays: weakref.WeakKeyDictionary[DistributedDataParallel, Relay] = weakref.WeakKeyDictionary()


def _register_inner(module: DistributedDataParallel, state: object, hook: Callable[..., Future[Any]]) -> None:
    """In place of a DDP module's `register_comm_hook`: keeps the hook for the relay to run. A copy of the
    module has no relay, and registers as usual."""
    relay = _relays.get(module)
    if relay is None:
        DistributedDataParallel.register_comm_hook(module, state, hook)
    else:
        relay.state, relay.inner = state, hook


def _when_reduced(
    listener: Listener, pieces: Sequence[tuple[int | None, int, bool]], reduced: Future[Any]
) -> Any:
    value = reduced.value()
    flat = value[0] if isinstance(value, list | tuple) else value
    numels = [numel for _, numel, _ in pieces]
    if sum(numels) == flat.numel():
        parts = zip(pieces, flat.split(numels), strict=True)
        listener.read_reduced([(i, part) for (i, _, is_whole), part in parts if i is not None and is_whole])
    return flat


def replicated(modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """The DDP modules in some modules."""
    return [
        inner
        for module in modules
        for inner in module.modules()
        if isinstance(inner, DistributedDataParallel)
    ]
