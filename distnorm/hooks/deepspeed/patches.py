"""Replacing attributes of single objects, and putting them back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

from distnorm.errors import DistnormError

_ABSENT = object()
_CURE = "this version of DeepSpeed can't be hooked; pip install 'deepspeed==0.19.8'"


class Patches:
    """Attributes that were set on instances; classes and modules stay as they are."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance, which must be there already."""
        if not hasattr(owner, name):
            raise DistnormError(
                f"expected {type(owner).__module__}.{type(owner).__qualname__} to have '{name}', found none; "
                f"{_CURE}"
            )
        self.add(owner, name, value)

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance, whether it is there already or not."""
        self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put every attribute back, the newest first."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def rebound(owner: Any, method: str, functions: Mapping[str, Callable[..., Any]]) -> MethodType:
    """A method of one object that sees other functions than its module's under some names.

    Some wrappers take their norm by functions of a module, which other engines of this process use as well.

    Raises:
        DistnormError: the method does not use one of the names.
    """
    original = inspect.unwrap(getattr(type(owner), method))
    assert isinstance(original, FunctionType)
    for name in functions:
        if name not in original.__code__.co_names:
            raise DistnormError(
                f"expected {original.__module__}.{original.__qualname__} to call '{name}', found that it "
                f"does not; {_CURE}"
            )
    copy = FunctionType(
        original.__code__,
        {**original.__globals__, **functions},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return MethodType(copy, owner)
