"""From what a user steps to the optimizers whose hooks torch will call: wrappers are followed inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distnorm.errors import DistnormError

# Where accelerate, Lightning, Lookahead; torch.distributed; SAM; and torchtitan's containers keep theirs.
_ATTRIBUTES = ("optimizer", "optim", "base_optimizer", "optimizers")
_DEEPEST = 5  # wrappers in wrappers; an object that answers to every attribute has no last one
_EXPECTED = "expected a torch optimizer, several, or a wrapper that holds one in " + ", ".join(
    f".{name}" for name in _ATTRIBUTES
)


def checked(given: Any) -> list[Any]:
    """What `attach` was given, as a list of things that each lead to a torch optimizer.

    Raises:
        DistnormError: one of them is no optimizer, and wraps none; its type is named.
    """
    is_several = isinstance(given, Iterable) and not isinstance(given, Optimizer | nn.Module | str)
    items = [] if given is None else list(given) if is_several and not hookable(given) else [given]
    if not items:
        raise DistnormError(f"optimizer: {_EXPECTED}; found {given!r}")
    for item in items:
        if not hookable(item):
            is_empty = isinstance(item, Optimizer)
            why = ", whose step calls no hooks because its __init__ never ran" if is_empty else ""
            raise DistnormError(f"optimizer: {_EXPECTED}; found {type(item).__name__}{why}")
    return items


def hookable(outer: object) -> list[Optimizer]:
    """The optimizers that `outer` is, or wraps, and whose step calls hooks; the outermost first."""
    return [each for each in wrapped(outer) if isinstance(each, Optimizer) and _calls_hooks(each)]


def wrapped(outer: object) -> list[object]:
    """All that steps inside `outer`, itself first."""
    found: dict[int, object] = {}
    level = [outer]
    for _ in range(_DEEPEST):
        level = [each for each in level if callable(getattr(each, "step", None)) and id(each) not in found]
        found.update((id(each), each) for each in level)
        level = [held for each in level for held in _held_by(each)]
    return list(found.values())


def parameters_of(outer: object) -> Iterator[Tensor]:
    """The parameters that `outer` steps."""
    for optimizer in hookable(outer):
        for group in optimizer.param_groups:
            yield from group["params"]


def _held_by(candidate: object) -> Iterator[object]:
    for name in _ATTRIBUTES:
        held = getattr(candidate, name, None)
        if isinstance(held, Mapping):
            yield from held.values()
        elif isinstance(held, list | tuple):
            yield from held
        else:
            yield held


def _calls_hooks(optimizer: Optimizer) -> bool:
    # Optimizer.__init__ makes the registry of hooks, and has the class's step call them.
    has_registry = hasattr(optimizer, "_optimizer_step_pre_hooks")
    return has_registry and bool(getattr(type(optimizer).step, "hooked", False))
