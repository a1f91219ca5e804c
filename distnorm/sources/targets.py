"""The caller's target as (name, tensor) pairs, and the names of parameters in the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distnorm.errors import ConfigError, DistnormError, UnsupportedGradientError
from distnorm.sources import fsdp2

Tied = Sequence[Sequence[str]]
"""Groups of names that are one parameter, such as ``[("tok.weight", "head.weight")]``."""

# What stands between a module and its parameters: wrappers, by class, and the name of what they wrap.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


class Fleeting(list[tuple[str, Tensor]]):
    """A target of tensors that are made anew for one call: nothing is remembered of them."""


_EXPECTED = "a tensor, a module, or an iterable of tensors, of (name, tensor) pairs or of modules"


def named_tensors(target: Tensor | nn.Module | Iterable[Any]) -> list[tuple[str, Tensor]]:
    """List a target's tensors with their names; a tensor that occurs twice is listed once.

    Tensors without names are named by their position. Names of several modules (pipeline parts) are
    taken to be those of the whole model; where two parts use one name for two parameters, the part's
    position comes before every name.

    Raises:
        DistnormError: something in the target is no tensor, pair or module.
        UnsupportedGradientError: a tensor is nested.
    """
    named = list({id(tensor): (name, tensor) for name, tensor in reversed(_pairs(target))}.values())[::-1]
    for name, tensor in named:
        if tensor.is_nested:
            raise UnsupportedGradientError(
                f"parameter '{name}': expected a dense tensor, found a nested one; give its values()"
            )
    return named


def read_once(target: Tensor | nn.Module | Iterable[Any]) -> Tensor | nn.Module | Collection[Any]:
    """Make of a generator what can be read again.

    Raises:
        DistnormError: it is nothing that can be read.
    """
    if isinstance(target, Tensor | nn.Module | Collection):
        return target
    if not isinstance(target, Iterable):
        raise DistnormError(f"expected {_EXPECTED}; found {type(target).__name__}")
    items = list(target)
    if not items and isinstance(target, Generator):
        warnings.warn(
            "distnorm was given an empty generator, which may be exhausted: nothing is measured or clipped "
            "on this rank",
            stacklevel=4,
        )
    return items


def modules_of(target: Tensor | nn.Module | Iterable[Any]) -> list[nn.Module]:
    """The modules in a target that `read_once` returned."""
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
    # Parts that use one name for two parameters each number their layers from zero.
    return [
        (f"{index}.{name}" if alike else name, tensor)
        for index, part in enumerate(pairs)
        for name, tensor in part
    ]


def _module_pairs(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Names as they are without wrappers, in whatever order these were put around the module."""
    sharded = fsdp2.sharded_parameters(module)
    pairs: list[tuple[str, Tensor]] = []
    seen: set[int] = set()

    def visit(inner: nn.Module, prefix: str, wrapped_as: str | None) -> None:
        if id(inner) in visited:
            return
        visited.add(id(inner))
        for name, shown in inner._parameters.items():
            parameter = sharded.get((id(inner), name), shown)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                pairs.append((prefix + name, parameter))
        for name, child in inner._modules.items():
            if child is not None:
                own = _wrapped_name(inner)
                visit(child, prefix if name == own else f"{prefix}{name}.", own)

    visited: set[int] = set()
    visit(module, "", None)
    return pairs


def _wrapped_name(module: nn.Module) -> str | None:
    return next(
        (_WRAPPERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None
    )


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
