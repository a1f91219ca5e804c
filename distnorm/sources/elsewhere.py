"""Gradients that are elsewhere than in `grad`, such as Megatron's ``main_grad``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distnorm.errors import ConfigError, DistnormError, UnsupportedGradientError

GradOf = str | Callable[[Tensor], Tensor | None] | None
"""The name of the attribute that holds a gradient, or a function that gives it; `None` means `grad`."""

KNOWN = ("main_grad", "decoupled_grad")
"""Where frameworks keep gradients beside `grad`."""


@dataclass(frozen=True, slots=True)
class GradPlace:
    """Where parameters' gradients are.

    Args:
        given: the name of an attribute, or a function.
    """

    given: str | Callable[[Tensor], Tensor | None]

    def __post_init__(self) -> None:
        if not callable(self.given) and not (isinstance(self.given, str) and self.given.isidentifier()):
            raise ConfigError(
                f"grad_of: expected the name of an attribute, or a function; found {self.given!r}"
            )

    def __str__(self) -> str:
        return f".{self.given}" if isinstance(self.given, str) else "what grad_of returns"

    def of(self, parameter: Tensor) -> Tensor | None:
        """The gradient of a parameter; `None` where it has none.

        Raises:
            UnsupportedGradientError: what is there is no tensor; or nothing is, and `grad` holds a gradient;
                or a function raised, or returned a copy.
        """
        given = self.given
        found = getattr(parameter, given, None) if isinstance(given, str) else self._asked(given, parameter)
        if found is not None and not isinstance(found, Tensor):
            raise UnsupportedGradientError(f"expected a gradient in {self}, found {type(found).__name__}")
        if not isinstance(given, str) and _is_another(found, self._asked(given, parameter)):
            raise UnsupportedGradientError(
                f"expected the gradient itself in {self}, found a copy, new in each call: clipping it "
                "would change nothing; return the tensor that the optimizer reads, or a view of it"
            )
        if found is None and parameter.is_leaf and parameter.grad is not None:
            raise UnsupportedGradientError(
                f"expected its gradient in {self}, found none there, and one in .grad; was it not moved "
                "there yet, or is grad_of wrong?"
            )
        return found

    def _asked(self, given: Callable[[Tensor], Tensor | None], parameter: Tensor) -> Tensor | None:
        try:
            return given(parameter)
        except DistnormError:
            raise
        except Exception as error:  # on this rank only, maybe: the others have to hear of it
            raise UnsupportedGradientError(
                f"expected a gradient or None in {self}, found {type(error).__name__}: {error}"
            ) from error

    def put(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Set the attribute.

        Raises:
            UnsupportedGradientError: a function gives gradients, and can't be given one.
        """
        if not isinstance(self.given, str):
            raise UnsupportedGradientError(
                f"expected a gradient that needs no other in its place, found one in {self} that is Partial, "
                "or laid out unlike its parameter; redistribute it, or give grad_of an attribute's name"
            )
        setattr(parameter, self.given, gradient)


def _is_another(found: Tensor | None, again: Tensor | None) -> bool:
    """Whether two answers for one parameter lie in different memory."""
    if found is None or again is None or again is found or not found.numel():
        return False
    # Wrappers have no memory of their own.
    return type(found) is Tensor is type(again) and found.data_ptr() != again.data_ptr()


def refuse_unnamed(parameter: Tensor) -> None:
    """Refuse to take a gradient that is elsewhere for none.

    Raises:
        UnsupportedGradientError: it is in a known attribute; the attribute is named.
    """
    for name in KNOWN:
        if isinstance(getattr(parameter, name, None), Tensor):
            raise UnsupportedGradientError(
                f'expected its gradient in .grad, found none there, and one in .{name}; give grad_of="{name}"'
            )
