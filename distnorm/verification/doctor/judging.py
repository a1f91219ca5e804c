"""One parameter's verdict: weights, coverage, and by how much its gradient differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distnorm.verification.doctor.explaining import Copy, Piece, explain
from distnorm.verification.doctor.holdings import Holding, Index, count, select
from distnorm.verification.doctor.meeting import Case
from distnorm.verification.doctor.mistakes import Circumstances, Explanation, Mistake
from distnorm.verification.doctor.reference import Reference
from distnorm.verification.pieces import digest
from distnorm.verification.ranks import rank_list


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one parameter; the same on every rank.

    Args:
        name: its name in the whole model.
        place: its place in the order of the forward.
        elements: number of its elements.
        difference: the largest difference of a rank's gradient from the reference's, relative to the norm of
            that; `None` where there is nothing to compare.
        cosine: of the angle between the two gradients.
        scale: the factor by which the reference's, multiplied, comes nearest.
        tolerance: the relative difference that rounding explains.
        is_dead: whether the gradient is zero, or absent, on both sides.
        explanations: what is wrong; none where nothing is.
    """

    name: str
    place: int
    elements: int = 0
    difference: float | None = None
    cosine: float | None = None
    scale: float | None = None
    tolerance: float = 0.0
    is_dead: bool = False
    explanations: tuple[Explanation, ...] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.explanations)


def judge(case: Case, reference: Reference) -> Verdict:
    """Compare a parameter; a difference is explained later. Local."""
    known, expected = reference.known.get(case.name), case.expected
    ranks = tuple(sorted({holding.rank for holding in case.holdings}))
    place = 1 << 20 if known is None else known.place
    if known is None or expected is None:
        text = f"the reference has no parameter of this name; {rank_list(list(ranks))} do"
        return Verdict(case.name, place, explanations=(Explanation(Mistake.EXTRA, text, ranks),))
    size = math.prod(known.shape)
    if not case.holdings:
        text = "the reference has it, and no rank does"
        return Verdict(case.name, place, size, explanations=(Explanation(Mistake.MISSING, text),))
    faults = [*_shape_faults(case, known.shape), *_weight_faults(case, expected.weight)]
    if faults:
        return Verdict(case.name, place, size, explanations=tuple(faults))
    verdict = Verdict(case.name, place, size, tolerance=known.tolerance)
    return replace(_compared(case, verdict, known.trains), explanations=tuple(_coverage_faults(case, size)))


def _compared(case: Case, verdict: Verdict, trains: bool) -> Verdict:
    assert case.expected is not None
    pieces = pieces_of(case, case.expected.gradient)
    ours = theirs = both = apart = 0.0
    for piece in pieces:
        worst = max(piece.copies, key=lambda copy: _apart(piece, copy))
        value = piece.value(worst)
        ours += float((value * value).sum())
        theirs += float((piece.expected * piece.expected).sum())
        both += float((value * piece.expected).sum())
        apart += _apart(piece, worst) ** 2
    if ours == 0 and theirs == 0:
        if not trains and not any(holding.trains for holding in case.holdings):
            return verdict  # frozen on both sides, and so nothing that has to be proved
        return replace(verdict, is_dead=True, difference=0.0)
    difference = math.sqrt(apart / theirs) if theirs else math.inf
    return replace(
        verdict,
        difference=difference,
        cosine=both / math.sqrt(ours * theirs) if ours and theirs else 0.0,
        scale=both / theirs if theirs else math.inf,
    )


def _apart(piece: Piece, copy: Copy) -> float:
    apart = float((piece.value(copy) - piece.expected).norm())
    return math.inf if math.isnan(apart) else apart


def is_right(verdict: Verdict) -> bool:
    """Whether a gradient is right within its tolerance."""
    return verdict.difference is None or verdict.difference <= verdict.tolerance


def diagnose(case: Case, verdict: Verdict, around: Circumstances) -> Verdict:
    """Explain the difference of a parameter's gradient. Local."""
    expected = case.expected
    if verdict.is_wrong or expected is None or is_right(verdict):
        return verdict
    everywhere = tuple(sorted({holding.rank for holding in case.holdings}))
    norm = 0.0 if expected.gradient is None else float(expected.gradient.double().norm())
    if not math.isfinite(verdict.difference or 0.0) and norm:
        text = f"it is not finite, and the reference's norm is {norm:.6g}"
        return replace(verdict, explanations=(Explanation(Mistake.NON_FINITE, text, everywhere),))
    if not norm:
        text = "it learns, and in the reference it has no gradient" + (
            "" if expected.gradient is None else " but zeros"
        )
        return replace(verdict, explanations=(Explanation(Mistake.FROZEN, text, everywhere),))
    pieces = pieces_of(case, expected.gradient, expected.parts)
    found = explain(pieces, verdict.tolerance, around)
    if not found:  # many small differences, each within the tolerance of its piece
        found = [Explanation(Mistake.UNEXPLAINED, "no mistake that the doctor knows explains it", everywhere)]
    return replace(verdict, explanations=tuple(found))


def pieces_of(case: Case, gradient: Tensor | None, parts: Sequence[Tensor] = ()) -> list[Piece]:
    """The pieces of a parameter with the values that ranks hold of them."""
    assert case.expected is not None
    whole = torch.zeros_like(case.expected.weight) if gradient is None else gradient
    groups: dict[Index, list[Holding]] = {}
    for holding in case.holdings:
        index = holding.index if holding.gradient is None else holding.gradient_index
        if count(index):
            groups.setdefault(index, []).append(holding)
    wholes = [part for part in parts if part.shape == whole.shape]
    sound = len(wholes) == len(parts) > 1
    return [
        Piece(
            index,
            select(whole, index).double(),
            list(_copies(case, holdings)),
            [select(part, index).double() for part in wholes] if sound else [],
        )
        for index, holdings in groups.items()
    ]


def _copies(case: Case, holdings: Sequence[Holding]) -> Iterable[Copy]:
    by_digest: dict[str | None, list[Holding]] = {}
    partial: dict[tuple[tuple[int, int], ...], list[Holding]] = {}
    for holding in holdings:
        if holding.partial:
            partial.setdefault(holding.partial, []).append(holding)
        else:
            by_digest.setdefault(holding.gradient, []).append(holding)
    for key, theirs in by_digest.items():
        yield Copy(
            tuple(holding.rank for holding in theirs),
            None if key is None else case.values[key],
            case.values.get(theirs[0].rank),
            all(holding.stale for holding in theirs),
        )
    sums: dict[tuple[str | None, ...], list[Holding]] = {}
    for summands in zip(*partial.values(), strict=False):  # by rank: one replica's summands after another's
        sums.setdefault(tuple(h.gradient for h in summands), []).extend(summands)
    for keys, theirs in sums.items():
        values = [case.values[key].double() for key in keys if key is not None]
        total = torch.stack(values).sum(0)
        yield Copy(
            tuple(sorted(h.rank for h in theirs)), total / len(values) if theirs[0].op == "avg" else total
        )


def _shape_faults(case: Case, shape: tuple[int, ...]) -> list[Explanation]:
    wrong = [h for h in case.holdings if h.global_shape not in (shape, (math.prod(shape),))]
    if not wrong:
        return []
    text = f"expected the shape {tuple(shape)} of the reference, found {tuple(wrong[0].global_shape)}"
    return [Explanation(Mistake.WEIGHTS, text, tuple(h.rank for h in wrong))]


def _weight_faults(case: Case, weight: Tensor) -> list[Explanation]:
    expected: dict[object, str] = {}
    wrong = []
    for holding in case.holdings:
        if not holding.weight:
            continue
        key = (holding.index, holding.dtype, holding.shape)
        if key not in expected:
            piece = select(weight, holding.index).to(holding.dtype).reshape(holding.shape)
            expected[key] = digest(piece)
        if holding.weight != expected[key]:
            wrong.append(holding.rank)
    if not wrong:
        return []
    text = f"the weight is not the reference's on {rank_list(wrong)}"
    return [Explanation(Mistake.WEIGHTS, text, tuple(wrong))]


def _coverage_faults(case: Case, size: int) -> list[Explanation]:
    held = sum(count(index) for index in {holding.index for holding in case.holdings})
    if held == size:
        return []
    text = f"expected pieces of {size} elements, found {held}"
    return [Explanation(Mistake.COVERAGE, text, tuple(h.rank for h in case.holdings))]
