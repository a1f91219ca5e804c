"""What is wrong inside a module whose ranks send tokens to each other: experts, each on some ranks only.

Such a module's inner tensors have other rows on each rank than in one process, in another order, so they are
compared token by token: each is looked for among the reference's. That explains a difference that was found
at the module's own boundary, and finds none by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distnorm.verification.doctor.explaining import Copy, Piece, explain, scaled
from distnorm.verification.doctor.mistakes import Circumstances, Explanation, Mistake, nearly, show_factor
from distnorm.verification.doctor.sketch import sketch_rows
from distnorm.verification.doctor.tracing import (
    FORWARD,
    INPUT,
    INPUT_GRADIENT,
    OUTPUT,
    OUTPUT_GRADIENT,
    WEIGHTS,
    Boundary,
)

_LOOSEST = 0.1
"""The largest relative difference by which two tokens are the same: others agree so well by no chance."""
BEFORE = {OUTPUT: INPUT, INPUT_GRADIENT: OUTPUT_GRADIENT}
"""What goes into a module where this comes out."""


def same_direction(boundary: Boundary, other: Boundary) -> bool:
    """Whether both are of the forward, or both of the backward."""
    return (boundary.kind in FORWARD) == (other.kind in FORWARD) and boundary.kind not in WEIGHTS


def factor_of_tokens(values: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The factor by which all tokens are some of the reference's; `None` where they are not.

    Args:
        values: [n, k] sketches of a rank's tokens, none of them zero.
        expected: [m, k] sketches of the reference's, in any order.
        tolerance: the relative difference that rounding explains.
    """
    expected = expected[expected.any(1)]
    if not len(values) or not len(expected):
        return None
    bound = min(tolerance, _LOOSEST)
    unit = torch.nn.functional.normalize(expected, dim=1)
    nearest = expected[(torch.nn.functional.normalize(values, dim=1) @ unit.t()).abs().argmax(1)]
    factors = (values * nearest).sum(1) / nearest.square().sum(1)
    rest = (values - factors.unsqueeze(1) * nearest).norm(dim=1)
    if bool((rest > bound * values.norm(dim=1)).any()):
        return None
    middle = float(factors.median())
    return middle if all(nearly(factor, middle, bound) for factor in factors.tolist()) else None


def scaled_tokens(
    inner: Sequence[tuple[Boundary, Mapping[int, Tensor], Tensor, float]], around: Circumstances
) -> Explanation | None:
    """Whether tokens arrive at an inner module as multiples of what they should be.

    Args:
        inner: in the order of the run, boundaries with each rank's tokens, [n, k], the reference's whole
            tensor, and the relative difference that rounding explains.
        around: what is known of the run.
    """
    for boundary, by_rank, whole, tolerance in inner:
        size = whole.shape[-1]
        expected = sketch_rows(whole.reshape(-1, size), ((0, size, size),))
        found = {rank: factor_of_tokens(tokens, expected, tolerance) for rank, tokens in by_rank.items()}
        factors = [factor for factor in found.values() if factor is not None]
        if len(factors) < len(found):
            return None  # from here on, they are others
        if factors and not all(nearly(factor, 1, tolerance) for factor in factors):
            ranks = tuple(rank for rank, factor in found.items() if factor is not None)
            first = scaled(factors[0], ranks, tolerance, around)
            times = show_factor(factors[0])
            text = f"tokens are {times} times the right ones at {boundary.module}'s {boundary.kind}"
            return Explanation(Mistake.SCALED, text, ranks, first.axes, first.factor, first.others)
    return None


def scaled_residual(
    boundary: Boundary, out: Sequence[Piece], into: Sequence[Piece], tolerance: float, around: Circumstances
) -> Explanation | None:
    """Whether what a module adds to its input is a multiple of what it should be."""
    pieces = []
    for after, before in zip(out, into, strict=False):
        if len(after.copies) != 1 or len(before.copies) != 1 or after.expected.shape != before.expected.shape:
            return None
        added = after.value(after.copies[0]) - before.value(before.copies[0])
        copy = Copy(after.copies[0].ranks, added)
        pieces.append(Piece((), after.expected - before.expected, [copy], [], is_sketch=True))
    if not pieces or len(out) != len(into):
        return None
    found = explain(pieces, tolerance, around)
    if not found or any(one.mistake is not Mistake.SCALED for one in found):
        return None
    first = found[0]
    text = f"what {boundary.module or 'the model'} adds to its {BEFORE[boundary.kind]} is wrong: {first.text}"
    ranks = tuple(sorted({rank for one in found for rank in one.ranks}))
    return Explanation(Mistake.SCALED, text, ranks, first.axes, first.factor, first.others)


def exchange_axes(
    module: str, modules: Mapping[int, frozenset[str]], around: Circumstances
) -> tuple[str, ...]:
    """The mesh axes along which ranks hold other modules than each other inside a module that all have."""
    prefix = f"{module}." if module else ""
    inside = {rank: {n for n in names if n.startswith(prefix)} for rank, names in modules.items()}
    found = []
    for axis, lines in around.axes.items():
        if axis.startswith("pp"):  # each stage has its own modules anyway
            continue
        lines = [line for line in lines if len(line) > 1 and all(module in modules[r] for r in line)]
        if lines and all(len({frozenset(inside[rank]) for rank in line}) > 1 for line in lines):
            found.append(axis)
    return tuple(found)


def wrong_exchange(axes: tuple[str, ...], ranks: tuple[int, ...]) -> Explanation:
    """What ranks with modules of their own inside, and right tensors before, are consistent with."""
    over = " and ".join(axes)
    text = (
        "neither the right one nor a multiple, while all before it is right; ranks hold other modules each: "
        f"consistent with tokens that were not, or wrongly, exchanged over {over}"
    )
    return Explanation(Mistake.UNGATHERED, text, ranks, axes)
