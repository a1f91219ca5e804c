"""From the pieces of one parameter's gradient to the mistake that explains them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distnorm.verification.doctor.combining import read_parts, weights_of
from distnorm.verification.doctor.holdings import Index, show
from distnorm.verification.doctor.mistakes import (
    Circumstances,
    Explanation,
    Mistake,
    nearly,
    read_factor,
    show_factor,
)
from distnorm.verification.ranks import rank_list


@dataclass(slots=True)
class Copy:
    """What some ranks hold alike of one piece; `value` is `None` where they hold no gradient."""

    ranks: tuple[int, ...]
    value: Tensor | None
    before: Tensor | None = None
    stale: bool = False


@dataclass(slots=True)
class Piece:
    """One piece of a parameter's gradient.

    Args:
        index: which elements it is.
        expected: the reference's, fp64.
        copies: what ranks hold of it; those with the same bits are one.
        parts: the reference's summands by parts of the batch, in their own dtype.
        is_sketch: whether these are sketches, of which only sums and factors mean anything.
    """

    index: Index
    expected: Tensor
    copies: list[Copy]
    parts: list[Tensor]
    is_sketch: bool = False

    def value(self, copy: Copy) -> Tensor:
        """A copy in fp64, zeros where there is no gradient."""
        if copy.value is None:
            return torch.zeros_like(self.expected)
        return copy.value.reshape(self.expected.shape).to(self.expected.dtype)


def explain(pieces: Sequence[Piece], tolerance: float, around: Circumstances) -> list[Explanation]:
    """Explain a wrong gradient.

    Args:
        pieces: all of one parameter.
        tolerance: the relative difference that rounding explains.
        around: what is known of the run.
    """
    copies = [copy for piece in pieces for copy in piece.copies]
    everywhere = tuple(sorted({rank for copy in copies for rank in copy.ranks}))
    if all(copy.value is None for copy in copies):
        return [Explanation(Mistake.IGNORED, "no rank has a gradient", everywhere)]
    if all(copy.value is None or not bool(copy.value.any()) for copy in copies):
        return [Explanation(Mistake.ZERO, "it is zero on every rank", everywhere)]
    if all(copy.stale for copy in copies if copy.value is not None):
        text = "it has the bits that it had before this step"
        return [Explanation(Mistake.STALE, text, everywhere)]
    scale = max(float(piece.expected.norm()) for piece in pieces)
    found: list[Explanation] = []
    for piece in pieces:
        if _wrong(piece, tolerance, scale):
            found += _explain_piece(piece, pieces, tolerance, scale, around)
    return _merge(found, around)


def _wrong(piece: Piece, tolerance: float, scale: float) -> list[Copy]:
    bound = tolerance * max(float(piece.expected.norm()), 0.1 * scale)
    return [c for c in piece.copies if not float((piece.value(c) - piece.expected).norm()) <= bound]


def _explain_piece(
    piece: Piece, pieces: Sequence[Piece], tolerance: float, scale: float, around: Circumstances
) -> list[Explanation]:
    wrong = _wrong(piece, tolerance, scale)
    summed = _as_summands(piece, tolerance, around) if len(piece.copies) > 1 else None
    if summed is not None:
        return [summed]
    found = []
    for copy in wrong:
        explained = _explain_copy(piece, copy, pieces, tolerance, around)
        if explained.mistake is Mistake.UNEXPLAINED and len(piece.copies) > 1:
            right = len(piece.copies) > len(wrong)
            text = f"{rank_list(list(copy.ranks))} hold another gradient of {show(piece.index)} than " + (
                "other ranks, which are right" if right else "other ranks, and none is right"
            )
            explained = Explanation(Mistake.REPLICAS, text, copy.ranks)
        found.append(explained)
    return found


def _as_summands(piece: Piece, tolerance: float, around: Circumstances) -> Explanation | None:
    """Whether copies that differ add up to what is expected, along one mesh axis or several."""
    values = {rank: copy for copy in piece.copies for rank in copy.ranks}
    varying = [axis for axis in around.axes if len(values.keys() & set(_any_line(axis, values, around))) > 1]
    for count in range(1, len(varying) + 1):
        for axes in itertools.combinations(varying, count):
            groups = _classes(list(values), axes, around)
            if len(groups) == len(values) or not all(len(group) == len(groups[0]) for group in groups):
                continue
            factors = []
            for group in groups:
                total = torch.zeros_like(piece.expected)
                for rank in group:
                    total += piece.value(values[rank])
                factors.append(_factor(total, piece.expected, tolerance))
            if all(f is not None and nearly(f, factors[0] or 0.0, 4 * tolerance) for f in factors):
                return _unreduced(axes, len(groups[0]), factors[0] or 0.0, tuple(values), tolerance, around)
    return None


def _unreduced(
    axes: tuple[str, ...],
    size: int,
    factor: float,
    ranks: tuple[int, ...],
    tolerance: float,
    around: Circumstances,
) -> Explanation:
    over = " and ".join(axes)
    others = [a for a in around.axes if a not in axes and around.size(a) > 1]
    for axis in others:
        if nearly(factor, around.size(axis), 4 * tolerance) and size != around.size(axis):
            text = f"ranks along {over} hold summands, {show_factor(factor)} times the right ones: it was "
            return Explanation(
                Mistake.WRONG_AXIS, text + f"reduced over {axis} in place of {over}", ranks, axes, factor
            )
    if nearly(factor, 1, 4 * tolerance):
        text = f"partial, never reduced over {over}: the {size} ranks' gradients add up to the right one"
        return Explanation(Mistake.UNREDUCED, text, ranks, axes, 1.0)
    if nearly(factor, size, 4 * tolerance):
        text = f"never averaged over {over}: the mean of the {size} ranks' gradients is the right one"
        also = [f"reduced over {axis} in place of {over}" for axis in others if around.size(axis) == size]
        return Explanation(Mistake.UNREDUCED, text, ranks, axes, factor, tuple(also))
    text = (
        f"never reduced over {over}: the {size} ranks' gradients add up to {show_factor(factor)} times the "
        "right one"
    )
    return Explanation(Mistake.UNREDUCED, text, ranks, axes, factor)


def _any_line(axis: str, values: dict[int, Copy], around: Circumstances) -> tuple[int, ...]:
    lines = (around.line(axis, rank) for rank in values)
    return max(lines, key=lambda line: len(values.keys() & set(line)))


def _classes(ranks: list[int], axes: Iterable[str], around: Circumstances) -> list[list[int]]:
    """The ranks in sets that differ by their coordinates on some axes only."""
    of = {rank: {rank} for rank in ranks}
    for axis in axes:
        for rank in ranks:
            joined = set().union(*(of[other] for other in around.line(axis, rank) if other in of))
            for member in joined:
                of[member] = joined
    return [list(group) for group in dict.fromkeys(tuple(sorted(group)) for group in of.values())]


def _factor(value: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The factor between two tensors; `None` where there is none, or it is zero."""
    square = float((expected * expected).sum())
    if not square:
        return None
    factor = float((value * expected).sum()) / square
    rest = float((value - factor * expected).norm())
    return factor if factor and rest <= 2 * tolerance * abs(factor) * square**0.5 else None


def _explain_copy(
    piece: Piece, copy: Copy, pieces: Sequence[Piece], tolerance: float, around: Circumstances
) -> Explanation:
    value, expected = piece.value(copy), piece.expected
    if not bool(value.any()):
        text = "there is no gradient" if copy.value is None else "it is zero"
        mistake = Mistake.IGNORED if copy.value is None else Mistake.ZERO
        return Explanation(mistake, text, copy.ranks)
    if copy.stale:
        return Explanation(Mistake.STALE, "it has the bits that it had before this step", copy.ranks)
    factor = _factor(value, expected, tolerance)
    if factor is not None:
        return scaled(factor, copy.ranks, tolerance, around)
    if copy.before is not None:
        both = weights_of(value, [expected, copy.before.reshape(expected.shape).double()], tolerance)
        if both is not None and all(nearly(weight, 1, 1e-3) for weight in both):
            text = "it was added to the gradient of before, which was not set to zero"
            return Explanation(Mistake.NOT_ZEROED, text, copy.ranks)
    weights = weights_of(value, piece.parts, tolerance) if len(piece.parts) > 1 else None
    if weights is not None:
        return replace(read_parts(weights, tolerance, around), ranks=copy.ranks)
    elsewhere = None if piece.is_sketch else _out_of_place(piece, value, copy, pieces, tolerance)
    text = "no mistake that the doctor knows explains it"
    return elsewhere or Explanation(Mistake.UNEXPLAINED, text, copy.ranks)


def scaled(factor: float, ranks: tuple[int, ...], tolerance: float, around: Circumstances) -> Explanation:
    """The explanation of a gradient that is right but for a factor."""
    meanings, axes = read_factor(factor, 4 * tolerance, around)
    text = f"it is {show_factor(factor)} times the right one" + (f": {meanings[0]}" if meanings else "")
    return Explanation(Mistake.SCALED, text, ranks, axes, factor, tuple(meanings[1:]))


def _out_of_place(
    piece: Piece, value: Tensor, copy: Copy, pieces: Sequence[Piece], tolerance: float
) -> Explanation | None:
    bound = 4 * tolerance * float(value.norm())
    for other in pieces:
        is_like = other is not piece and other.expected.shape == value.shape
        if is_like and float((value - other.expected).norm()) <= bound:
            where = rank_list([rank for c in other.copies for rank in c.ranks])
            text = f"in place of {show(piece.index)} it is {show(other.index)}, the piece of {where}"
            return Explanation(Mistake.SWAPPED, text, copy.ranks)
    expected = piece.expected
    if value.ndim == 2 and value.numel() > 1:
        rows, columns = value.shape
        turned = (expected.t().reshape(rows, columns), expected.reshape(columns, rows).t())
        if any(float((value - one).norm()) <= bound for one in turned):
            return Explanation(Mistake.TRANSPOSED, "it is transposed", copy.ranks)
    ordered = value.flatten().sort().values - expected.flatten().sort().values
    if value.numel() > 1 and float(ordered.norm()) <= bound:
        return Explanation(Mistake.PERMUTED, "its elements are the right ones in other places", copy.ranks)
    return None


def _merge(found: Sequence[Explanation], around: Circumstances) -> list[Explanation]:
    """Join what the pieces say alike; the axes of a reduction that is missing are those along which it
    differs who is left out."""
    merged: dict[object, Explanation] = {}
    for one in found:
        key = (one.mistake, None if one.mistake is Mistake.SWAPPED else one.text)
        known = merged.get(key)
        ranks = tuple(sorted({*one.ranks, *(known.ranks if known else ())}))
        merged[key] = replace(known or one, ranks=ranks)
    partial = [one for one in merged.values() if one.mistake is Mistake.UNREDUCED and not one.axes]
    if len(partial) > 1:
        axes = tuple(axis for axis in around.axes if _differs_along(axis, partial, around))
        ranks = tuple(sorted({rank for one in partial for rank in one.ranks}))
        over = f" over {' and '.join(axes)}" if axes else ""
        text = (
            f"not reduced{over}: each rank holds the gradient of some of the tokens only; {partial[0].text}"
        )
        text += f" on {rank_list(list(partial[0].ranks))}"
        kept = [one for one in merged.values() if one not in partial]
        return [Explanation(Mistake.UNREDUCED, text, ranks, axes, partial[0].factor), *kept]
    return list(merged.values())


def _differs_along(axis: str, found: Sequence[Explanation], around: Circumstances) -> bool:
    said = {rank: one.text for one in found for rank in one.ranks}
    return any(len({said[rank] for rank in line if rank in said}) > 1 for line in around.axes[axis])
