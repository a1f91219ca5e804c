"""A target's tensors, whether they are still the same, and whether their gradients may be read."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, starmap, zip_longest
from operator import is_
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from distnorm import kernels
from distnorm.errors import DistnormError, UnsupportedGradientError
from distnorm.sources.fsdp2 import GATHERED, UnreducedGradients, gathered_parameters, managed_parameters
from distnorm.sources.targets import modules_of, named_tensors


class Inventory:
    """A target's tensors, and whether they are still the same.

    Args:
        target: what `read_once` returned.

    Attributes:
        named: names and tensors, as `named_tensors` gives them.

    Raises:
        DistnormError: something in the target is no tensor, pair or module.
    """

    def __init__(self, target: Tensor | nn.Module | Collection[Any]) -> None:
        self.named = named_tensors(target)
        self.holders = [tensor for _, tensor in self.named]
        # A single tensor or module stays the same one, and is not kept alive.
        self._items = () if isinstance(target, Tensor | nn.Module) else target
        self._is_mapping = isinstance(self._items, Mapping)
        self._given = list(self._present())
        self._owners: list[Mapping[str, Any]] = [
            owned
            for module in modules_of(target)
            for inner in module.modules()
            for owned in (inner._modules, inner._parameters)
        ]
        self._owned: list[object] = [value for owned in self._owners for value in owned.values()]

    @property
    def is_current(self) -> bool:
        """Whether nothing was added, taken out or replaced; by identity, so that it costs little."""
        missing = object()
        same = all(starmap(is_, zip_longest(self._present(), self._given, fillvalue=missing)))
        return same and kernels.hold_just(self._owners, self._owned)

    def require_current(self) -> None:
        """Refuse to go on where something changed since a graph was compiled.

        Raises:
            DistnormError: something was added, taken out or replaced.
        """
        if not self.is_current:
            raise DistnormError(
                "expected the parameters that the graph was compiled with, found that some were added, taken "
                "out or replaced; call clip() once outside of the compiled function, on every rank"
            )

    def _present(self) -> Iterable[object]:
        return self._items.values() if self._is_mapping else self._items  # type: ignore[union-attr]


class Managers:
    """The DDP and FSDP2 modules that reduce the gradients of some parameters, wherever they are.

    A list of parameters doesn't name them, so the process is searched once.

    Args:
        named: names and parameters.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        self._names = {id(tensor): name for name, tensor in named}
        self._trained = {id(tensor) for _, tensor in named if tensor.requires_grad}
        found = _managing(self._names) if named and dist.is_available() and dist.is_initialized() else []
        self._replicated = [weakref.ref(m) for m in found if isinstance(m, DistributedDataParallel)]
        self._unreduced = UnreducedGradients(found)
        gathered = {id(parameter) for module in found for parameter in gathered_parameters(module)}
        self._gathered = [name for key, name in self._names.items() if key in gathered]

    def are_of(self, named: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether these are the parameters that were searched for."""
        return self._names == {id(tensor): name for name, tensor in named}

    def refuse_unreduced(self) -> None:
        """Refuse gradients that FSDP2 holds back, and parameters that it only lends.

        Raises:
            UnsupportedGradientError: naming one of the parameters.
        """
        if self._gathered:
            raise UnsupportedGradientError(f"parameter '{self._gathered[0]}': {GATHERED}")
        for parameter, fact in self._unreduced.find():
            if id(parameter) in self._names:
                raise UnsupportedGradientError(f"parameter '{self._names[id(parameter)]}': {fact}")

    @property
    def is_joining(self) -> bool:
        """Whether DDP runs under torch's `Join`, where ranks that are out of data make no step.

        Raises:
            DistnormError: a parameter is not DDP's, so that the norm needs the ranks that are out of data.
        """
        joining = _joining(self._replicated) if self._replicated else []
        if not joining:
            return False
        rest = self._trained.difference(id(p) for module in joining for p in module.parameters())
        if rest:
            first = next(name for key, name in self._names.items() if key in rest)
            raise DistnormError(
                f"expected under Join parameters that DDP replicates, found '{first}', which is none of its"
            )
        return True


class Replicated:
    """The DDP modules of this process, for tensors that are no parameters and so name no module.

    The process is searched once.
    """

    def __init__(self) -> None:
        self._modules = [weakref.ref(module) for module in _instances((DistributedDataParallel,))]

    def joins(self, tensors: Sequence[Tensor]) -> bool:
        """Whether DDP holds these gradients or parameters, and runs under torch's `Join`.

        Raises:
            DistnormError: it runs under `Join`, and some are none of its: their norm needs the ranks that are
                out of data.
        """
        joining = _joining(self._modules)
        if not joining:
            return False
        held = {id(tensor) for module in joining for p in module.parameters() for tensor in (p, p.grad)}
        if any(id(tensor) not in held for tensor in tensors):
            raise DistnormError(
                "expected under Join gradients or parameters that DDP replicates, found other tensors; give "
                "those themselves, or measure after Join"
            )
        return True


_joins: weakref.WeakKeyDictionary[nn.Module, tuple[object, list[weakref.ref[Join]]]]
_joins = weakref.WeakKeyDictionary()


def _joining(modules: Iterable[weakref.ref[DistributedDataParallel]]) -> list[DistributedDataParallel]:
    """Those that run under torch's `Join`."""
    return [module for module in (ref() for ref in modules) if module is not None and _is_joining(module)]


def _is_joining(module: DistributedDataParallel) -> bool:
    # A module keeps what `Join` has set after that is over; but the `Join` itself is then gone.
    config = module._join_config
    if not config.enable:
        return False
    if module not in _joins or _joins[module][0] is not config:
        found = [join for join in _instances((Join,)) if any(module is one for one in join._joinables)]
        _joins[module] = config, [weakref.ref(join) for join in found]
    return any(ref() is not None for ref in _joins[module][1])


def _managing(names: Mapping[int, str]) -> list[nn.Module]:
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", DistributedDataParallel)
    kinds = (DistributedDataParallel, fsdp2)
    return [m for m in _instances(kinds) if any(id(p) in names for p in _parameters(m))]


def _instances(kinds: tuple[type, ...]) -> list[Any]:
    # By type: `isinstance` would ask an object's own `__class__`, which may run code of lazy modules.
    # An object refers to its class, and the collector finds that sooner than a loop does.
    found = gc.get_referrers(*_with_subclasses(kinds))
    return [module for module in found if issubclass(type(module), kinds)]


def _with_subclasses(kinds: Iterable[type]) -> Iterable[type]:
    for kind in kinds:
        yield kind
        yield from _with_subclasses(kind.__subclasses__())


def _parameters(module: nn.Module) -> Iterable[Tensor]:
    if isinstance(module, DistributedDataParallel):
        return module.parameters()
    return chain(managed_parameters(module), gathered_parameters(module))
