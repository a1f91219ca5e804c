"""Whether clip() multiplied the gradients by its coefficient; and putting them back as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.verification.declared import Place
from distnorm.verification.oracle import Truth
from distnorm.verification.pieces import is_dtensor, local_of


@dataclass(frozen=True, slots=True)
class Before:
    """A parameter's gradient as verify found it: the tensor itself, and a copy of its local values."""

    name: str
    parameter: Tensor
    gradient: Tensor | None
    values: Tensor | None
    place: Place

    @property
    def is_partial(self) -> bool:
        """Whether the gradient was still a partial sum."""
        return is_dtensor(self.gradient) and any(
            placement.is_partial()
            for placement in self.gradient.placements  # type: ignore[union-attr]
        )


def remember(named: Sequence[tuple[str, Tensor]], place: Place) -> list[Before]:
    """Copy every local gradient."""
    held = [(name, tensor, place.of(tensor)) for name, tensor in named]
    return [
        Before(name, tensor, gradient, None if gradient is None else local_of(gradient).clone(), place)
        for name, tensor, gradient in held
    ]


def restore(befores: Sequence[Before]) -> None:
    """Put back every gradient, bit for bit and in the tensor that held it."""
    for before in befores:
        if before.place.of(before.parameter) is not before.gradient:
            before.place.put(before.parameter, before.gradient)
        if before.gradient is not None and before.values is not None:
            local_of(before.gradient).copy_(before.values)


def scaling_faults(befores: Sequence[Before], coefficient: float) -> list[str]:
    """Compare every local gradient with its value before, times the coefficient.

    A gradient that was partial is left to `partial_faults`: reducing it changes every element.
    """
    faults = []
    for before in befores:
        if before.values is None or before.is_partial:
            continue
        found = before.place.of(before.parameter)
        if found is None:
            faults.append(f"'{before.name}': expected a gradient after clip(), found none")
        elif fault := _scaling_fault(before.values, local_of(found), coefficient):
            faults.append(f"'{before.name}': {fault}")
    return faults


def _scaling_fault(before: Tensor, after: Tensor, coefficient: float) -> str | None:
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"expected {before.dtype} {tuple(before.shape)}, found {after.dtype} {tuple(after.shape)}"
    wide = torch.complex128 if before.is_complex() else torch.float64
    expected = before.to(wide) * coefficient
    wrong = ~((after.to(wide) - expected).abs() <= _tolerance(expected, before.dtype))
    if not bool(wrong.any()):
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0]) if wrong.ndim else ()
    untouched = " (unscaled)" if torch.equal(before, after) else ""
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements are not gradient * {coefficient:.9g}{untouched}; "
        f"first local index {at}: expected {expected[at].item()!r}, found {after[at].item()!r}"
    )


def _tolerance(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding to the gradient's dtype, and one of the coefficient to what it is computed in."""
    info = torch.finfo(dtype)
    computed_in = min(info.eps, torch.finfo(torch.float32).eps)
    return expected.abs() * (info.eps + computed_in) / 2 + info.smallest_normal * info.eps


def partial_faults(before: Truth, after: Truth, coefficient: float) -> list[str]:
    """Compare the norms of gradients that were partial with those they have after clip(), reduced and scaled.

    Reducing rounds once for each summand, so the tolerance grows with their number and size.
    """
    faults = []
    for name, norm in after.norms.items():
        summands = [p.gradient for p in before.pieces if p.name == name and p.gradient is not None]
        eps = max(torch.finfo(gradient.dtype).eps for gradient in summands)
        slack = 2 * eps * coefficient * (before.norms[name] + sum(gradient.norm for gradient in summands))
        expected = before.norms[name] * coefficient
        if not abs(norm - expected) <= slack:
            faults.append(
                f"'{name}' was partial: expected a norm of {expected!r} once it is reduced and scaled, "
                f"found {norm!r}"
            )
        if any(p.gradient is not None and p.gradient.partial for p in after.pieces if p.name == name):
            faults.append(
                f"'{name}' was partial and still is after clip(): expected it reduced and stored back"
            )
    return faults
