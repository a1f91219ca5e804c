"""One parameter's verdict: weights, coverage, and by how much its gradient differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distnorm.verification.doctor.explaining import Piece, explain
from distnorm.verification.doctor.holdings import count
from distnorm.verification.doctor.meeting import Case, Sums
from distnorm.verification.doctor.mistakes import Circumstances, Explanation, Mistake
from distnorm.verification.doctor.reference import Reference
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
    known = reference.known.get(case.name)
    ranks = tuple(sorted({holding.rank for holding in case.holdings}))
    if known is None:
        text = f"the reference has no parameter of this name; {rank_list(list(ranks))} do"
        return Verdict(case.name, 1 << 20, explanations=(Explanation(Mistake.EXTRA, text, ranks),))
    size = math.prod(known.shape)
    if not case.holdings:
        text = "the reference has it, and no rank does"
        return Verdict(case.name, known.place, size, explanations=(Explanation(Mistake.MISSING, text),))
    faults = [*_shape_faults(case, known.shape), *_weight_faults(case)]
    if faults:
        return Verdict(case.name, known.place, size, explanations=tuple(faults))
    verdict = Verdict(case.name, known.place, size, tolerance=known.tolerance)
    return replace(_compared(case, verdict, known.trains), explanations=tuple(_coverage_faults(case, size)))


def _compared(case: Case, verdict: Verdict, trains: bool) -> Verdict:
    total = Sums()
    for alike in case.measured.values():
        total.add(max(alike.values(), key=lambda sums: sums.apart))
    if total.ours == 0 and total.theirs == 0:
        if not trains and not any(holding.trains for holding in case.holdings):
            return verdict  # frozen on both sides, and so nothing that has to be proved
        return replace(verdict, is_dead=True, difference=0.0)
    ours, theirs = math.sqrt(total.ours), math.sqrt(total.theirs)
    return replace(
        verdict,
        difference=math.sqrt(total.apart) / theirs if theirs else math.inf,
        cosine=total.both / (ours * theirs) if ours and theirs else 0.0,
        scale=total.both / total.theirs if theirs else math.inf,
    )


def is_right(verdict: Verdict) -> bool:
    """Whether a gradient is right within its tolerance."""
    return verdict.difference is None or verdict.difference <= verdict.tolerance


def diagnose(
    case: Case, pieces: Sequence[Piece], verdict: Verdict, reference: Reference, around: Circumstances
) -> Verdict:
    """Explain the difference of a parameter's gradient. Local."""
    everywhere = tuple(sorted({holding.rank for holding in case.holdings}))
    norm = math.sqrt(sum(next(iter(alike.values())).theirs for alike in case.measured.values()))
    if not math.isfinite(verdict.difference or 0.0) and norm:
        text = f"it is not finite, and the reference's norm is {norm:.6g}"
        return replace(verdict, explanations=(Explanation(Mistake.NON_FINITE, text, everywhere),))
    if not norm:
        is_absent = reference.known[case.name].gradient is None
        text = "it learns, and in the reference it has no gradient" + ("" if is_absent else " but zeros")
        return replace(verdict, explanations=(Explanation(Mistake.FROZEN, text, everywhere),))
    found = explain(pieces, verdict.tolerance, around)
    if not found:  # many small differences, each within the tolerance of its piece
        found = [Explanation(Mistake.UNEXPLAINED, "no mistake that the doctor knows explains it", everywhere)]
    return replace(verdict, explanations=tuple(found))


def _shape_faults(case: Case, shape: tuple[int, ...]) -> list[Explanation]:
    wrong = [h for h in case.holdings if h.global_shape not in (shape, (math.prod(shape),))]
    if not wrong:
        return []
    text = f"expected the shape {tuple(shape)} of the reference, found {tuple(wrong[0].global_shape)}"
    return [Explanation(Mistake.WEIGHTS, text, tuple(h.rank for h in wrong))]


def _weight_faults(case: Case) -> list[Explanation]:
    wrong = [holding.rank for holding in case.holdings if holding.has_other_weight]
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
