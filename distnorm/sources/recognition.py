"""Targets that were measured before: their tensors, and the key of their plan, without listing them anew."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.sources.inventory import Inventory, Managers, Replicated
from distnorm.sources.shards import Source
from distnorm.sources.targets import Fleeting, named_tensors

_MOST_KNOWN = 64
_MOST_SHAPES = 64


@dataclass(frozen=True)
class PlanKey:
    """What a plan depends on: names and layouts, and not which tensors have them. Hashed once.

    Args:
        parts: all of it.
    """

    parts: tuple[object, ...]
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.parts))

    def __hash__(self) -> int:
        return self._hash


@dataclass(slots=True)
class Known:
    """What is remembered of a target. It keeps no module alive, nor parameters that were given in a list.

    Args:
        key: of its plan.
        managers: of its parameters; `None` for other tensors.
        shapes: of the first parameters: another list may have got the `id`s of one that was freed.
        modules: those that the target is, or lists; none where it lists tensors.
        inventories: theirs.
        listed: the tensors of all of them.
    """

    key: PlanKey
    managers: Managers | None
    shapes: list[torch.Size]
    modules: Sequence[weakref.ref[nn.Module]] = ()
    inventories: Sequence[Inventory] = ()
    listed: Sequence[Tensor] = ()

    def holders(self, target: Any) -> Sequence[Tensor] | None:
        """The target's tensors, if they are those that were measured, without reading most of them."""
        if self.modules:
            modules = _modules(target)
            same = len(modules) == len(self.modules) and all(
                known() is module and inventory.is_current
                for known, module, inventory in zip(self.modules, modules, self.inventories, strict=True)
            )
            return self.listed if same else None
        holders = _tensors(target)
        return holders if [tensor.shape for tensor in holders[:_MOST_SHAPES]] == self.shapes else None

    def is_joining(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors, the target's, are of DDP modules under torch's `Join`.

        Raises:
            DistnormError: some are, and some are not.
        """
        if self.managers is not None:
            return self.managers.is_joining
        if self.key not in _replicated:
            _keep(_replicated, self.key, Replicated())
        return _replicated[self.key].joins(tensors)


_known: OrderedDict[object, Known] = OrderedDict()
_replicated: OrderedDict[object, Replicated] = OrderedDict()


def recognise(target: Any, source: Source, fixed: tuple[object, ...]) -> tuple[Known, Sequence[Tensor]]:
    """What is remembered of a target, made if it is a new one; and its tensors.

    Args:
        target: what `read_once` has seen.
        source: what is measured of its tensors.
        fixed: what else a plan depends on.
    """
    memo = (source, *fixed, *_identity(target))
    known = None if isinstance(target, Fleeting) else _known.get(memo)
    holders = None if known is None else known.holders(target)
    if known is not None and holders is not None:
        return known, holders
    named = named_tensors(target)
    holders = [tensor for _, tensor in named]
    layouts = (
        (name, t.shape, t.dtype, getattr(t, "placements", None), getattr(t, "device_mesh", None))
        for name, t in named
    )
    modules = _modules(target)
    is_gradient = source is Source.GRADIENT
    shapes = [tensor.shape for tensor in holders[:_MOST_SHAPES]]
    lasts = not isinstance(target, Fleeting)
    key = PlanKey((source, *fixed, *layouts))
    managers = Managers(named if lasts else ()) if is_gradient else None
    known = Known(key, managers, shapes)
    if modules:
        known.modules = [weakref.ref(module, lambda _: _known.pop(memo, None)) for module in modules]
        known.inventories, known.listed = list(map(Inventory, modules)), holders
    if lasts and is_gradient and (modules or _is_flat(target, holders)):
        _keep(_known, memo, known)
    return known, holders


def _keep(kept: OrderedDict[object, Any], key: object, value: object) -> None:
    kept[key] = value
    if len(kept) > _MOST_KNOWN:
        kept.popitem(last=False)


def _identity(target: Any) -> tuple[object, ...]:
    if isinstance(target, Tensor | nn.Module):
        return (id(target),)
    items = target.items() if isinstance(target, Mapping) else target
    return tuple(
        (item[0], id(item[1])) if isinstance(item, tuple) and len(item) == 2 else id(item) for item in items
    )


def _modules(target: Any) -> Sequence[nn.Module]:
    """The modules that a target is, or lists; none where anything else is among them."""
    if isinstance(target, nn.Module):
        return (target,)
    are_listed = isinstance(target, list | tuple) and all(isinstance(item, nn.Module) for item in target)
    return target if are_listed else ()


def _tensors(target: Any) -> Sequence[Tensor]:
    """The tensors of a target without modules, as they were given."""
    if isinstance(target, Tensor):
        return [target]
    if isinstance(target, Mapping):
        return list(target.values())
    return [item[1] if isinstance(item, tuple) else item for item in target]


def _is_flat(target: Any, holders: Sequence[Tensor]) -> bool:
    """Whether the target names just these tensors, each once."""
    given = () if isinstance(target, nn.Module) else _tensors(target)
    return list(map(id, given)) == list(map(id, holders))
