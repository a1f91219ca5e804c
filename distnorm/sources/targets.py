"""What the caller hands in, as (name, tensor) pairs; and the names that make an identity."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import starmap, zip_longest
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distnorm import kernels
from distnorm.errors import ConfigError, DistnormError

Tied = Sequence[Sequence[str]]
"""Groups of names that are one parameter, such as ``[("tok.weight", "head.weight")]``."""

_DATA_PARALLEL = ("DistributedDataParallel", "DataParallel")
# What torch.compile, activation checkpointing and FSDP1 put between a module and its parameters.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")


_EXPECTED = "a tensor, a module, or an iterable of tensors, of (name, tensor) pairs or of modules"


def named_tensors(target: Tensor | nn.Module | Iterable[Any]) -> list[tuple[str, Tensor]]:
    """List a target's tensors with their names; a tensor that occurs twice is listed once.

    Tensors without names are named by their position. Names of several modules (pipeline parts) are
    taken to be those of the whole model; where two parts use one name for two parameters, the part's
    position comes before every name.

    Raises:
        DistnormError: something in the target is no tensor, pair or module.
    """
    return list({id(tensor): (name, tensor) for name, tensor in reversed(_pairs(target))}.values())[::-1]


class Inventory:
    """A target's tensors, and whether they are still the same.

    Args:
        target: what `read_once` has seen.

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

    def _present(self) -> Iterable[object]:
        return self._items.values() if isinstance(self._items, Mapping) else self._items


def read_once(target: Tensor | nn.Module | Iterable[Any]) -> Tensor | nn.Module | Collection[Any]:
    """Make of a generator what can be read again.

    Raises:
        DistnormError: it is nothing that can be read.
    """
    if isinstance(target, Tensor | nn.Module | Collection):
        return target
    if not isinstance(target, Iterable):
        raise DistnormError(f"expected {_EXPECTED}; found {type(target).__name__}")
    return list(target)


def modules_of(target: Tensor | nn.Module | Iterable[Any]) -> list[nn.Module]:
    """The modules in a target that `read_once` has seen."""
    if isinstance(target, nn.Module):
        return [target]
    if isinstance(target, Tensor | Mapping):
        return []
    return [item for item in target if isinstance(item, nn.Module)]


def _pairs(target: Any) -> list[tuple[str, Tensor]]:
    if isinstance(target, Tensor):
        return [("0", target)]
    if isinstance(target, nn.Module):
        return _module_pairs(target)
    if isinstance(target, Mapping):
        target = target.items()
    items = list(target)  # read once: a generator of parameters has no second pass
    if items and all(isinstance(item, nn.Module) for item in items):
        return _parts_pairs(items)
    return [_pair(position, item) for position, item in enumerate(items)]


def _parts_pairs(parts: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    pairs = [_module_pairs(part) for part in parts]
    owners: dict[str, int] = {}
    alike = any(owners.setdefault(name, id(tensor)) != id(tensor) for part in pairs for name, tensor in part)
    # Parts that use one name for two parameters number their layers from zero, each for itself.
    return [
        (f"{index}.{name}" if alike else name, tensor)
        for index, part in enumerate(pairs)
        for name, tensor in part
    ]


def _module_pairs(module: nn.Module) -> list[tuple[str, Tensor]]:
    while type(module).__name__ in _DATA_PARALLEL:
        module = module.module  # type: ignore[assignment]
    return [(_WRAPPERS.sub("", name), parameter) for name, parameter in module.named_parameters()]


def _pair(position: int, item: Any) -> tuple[str, Tensor]:
    if isinstance(item, Tensor):
        return str(position), item
    if (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], Tensor)
    ):
        return item
    raise DistnormError(f"expected {_EXPECTED}; found {type(item).__name__} at position {position}")


def checked_tied(tied: Tied) -> tuple[tuple[str, ...], ...]:
    """The tied names as tuples.

    Raises:
        ConfigError: a group is no sequence of two or more names.
    """
    groups = [(names,) if isinstance(names, str) else tuple(names) for names in tied]
    for names in groups:
        if len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f'tied: expected groups of two or more names, such as [("tok.weight", "head.weight")]; '
                f"found the group {names!r}"
            )
    return tuple(groups)


def stage_of(pp_mesh: DeviceMesh | None) -> int | None:
    """This rank's pipeline stage.

    Raises:
        ConfigError: the mesh has more than one axis, or this rank is not on it.
    """
    if pp_mesh is None:
        return None
    if pp_mesh.ndim != 1 or pp_mesh.get_coordinate() is None:
        raise ConfigError(f"pp_mesh: expected a 1-d mesh with this rank on it, found {pp_mesh}")
    return pp_mesh.get_local_rank()


def canonical_names(names: Sequence[str], stage: int | None, tied: Tied) -> list[str]:
    """Turn names in this process into names in the whole model.

    Raises:
        DistnormError: two tensors of this rank have one name and are not tied.
    """
    first = {name: group[0] for group in tied for name in group}
    prefix = "" if stage is None else f"pp{stage}."
    result, taken = [], set()
    for name in names:
        if name in taken:
            raise DistnormError(
                f"expected one tensor for each name, found two named '{name}'; "
                "give whole-model names, or say which names are one parameter with tied=[...]"
            )
        taken.add(name)
        result.append(first.get(name, prefix + name))
    return result
