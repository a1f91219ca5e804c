"""The checks of a verification: from what was gathered to sentences. All of it runs on the root."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from distnorm.verification.axes import Lines
from distnorm.verification.fast import Clipped, Outcome, Plan, refusal_of
from distnorm.verification.oracle import Truth
from distnorm.verification.ranks import rank_list
from distnorm.verification.ratio import read_ratio
from distnorm.verification.report import Check
from distnorm.verification.scaling import partial_faults

TOLERANCE = 1.2e-7
"""Relative; one fp32 ulp, as the contract promises."""

_SHOWN = 5

Given = tuple[float, str] | None
"""The caller's own norm on one rank, and what is odd about the tensor that held it."""


def check_norm(truth: Truth, outcomes: Iterable[Mapping[int, Outcome]], axes: Lines) -> Check:
    """Judge the norms that `GradClipper` gave, by measure() and by clip()."""
    faults, norms = [], []
    for call, by_rank in zip(("measure()", "clip()"), outcomes, strict=False):
        if refusal := refusal_of(by_rank):
            faults.append(f"GradClipper's {call} refuses: {refusal}")
        for rank, outcome in by_rank.items():
            norm = math.inf if outcome.non_finite else outcome.norm
            if outcome.refusal is None or outcome.non_finite:
                norms.append(norm)
                if not agrees(norm, truth.norm):
                    faults.append(f"{call} on rank {rank}: {read_ratio(norm, truth, axes)}")
    if faults:
        return Check("norm", False, _listed(faults))
    if not math.isfinite(truth.norm):
        return Check("norm", True, f"found not to be finite by both: {_listed(truth.non_finite)}")
    worst = max((abs(norm - truth.norm) for norm in norms), default=0.0) / (truth.norm or 1.0)
    return Check(
        "norm", True, f"GradClipper agrees with the gathered gradient to {worst:.1e} (at most {TOLERANCE:g})"
    )


def check_given(truth: Truth, given: Mapping[int, Given], axes: Lines) -> list[Check]:
    """Judge the norm that the caller handed in; no check where none was."""
    values = {rank: entry for rank, entry in given.items() if entry is not None}
    if not values:
        return []
    faults = []
    if missing := [rank for rank in given if rank not in values]:
        faults.append(f"expected a norm from every rank, found none on {rank_list(missing)}")
    by_value: dict[tuple[str, str], list[int]] = {}
    for rank, (value, note) in values.items():
        by_value.setdefault((repr(value), note), []).append(rank)
    if len(by_value) > 1:
        found = "; ".join(f"{value} on {rank_list(where)}" for (value, _), where in by_value.items())
        faults.append(f"expected the same norm on every rank, found {found}")
    for (text, note), where in by_value.items():
        if note:
            faults.append(note)
        if not agrees(float(text), truth.norm):
            faults.append(f"{text} on {rank_list(where)}: {read_ratio(float(text), truth, axes)}")
    detail = _listed(faults) or "the norm handed in is the norm of the gathered gradient"
    return [Check("measured", not faults, detail)]


def check_agreement(
    outcomes: Iterable[Mapping[int, Outcome]], configs: Mapping[int, str], cannot: bool
) -> Check:
    """See that all ranks hold the same bits of the total norm and of the coefficient."""
    faults = [f"expected one configuration, found {found}"] if (found := _parted(configs)) else []
    for call, by_rank in zip(("measure()", "clip()"), outcomes, strict=False):
        for what, which in (("total norm", 0), ("coefficient", 1)):
            found = _parted({rank: outcome.bits[which] for rank, outcome in by_rank.items()})
            if found:
                faults.append(f"{call}: expected the same bits of the {what} on every rank, found {found}")
    if faults or cannot:
        return Check(
            "agreement", not faults, _listed(faults) or "nothing to compare: there is no finite norm"
        )
    return Check("agreement", True, "every rank holds the same bits of total norm and coefficient")


def check_replicas(truth: Truth) -> Check:
    """See that replicas' gradients are bitwise equal."""
    detail = (
        f"pieces with replicas: {truth.replicated}, all bitwise equal"
        if truth.replicated
        else "there are none"
    )
    return Check("replicas", not truth.replicas, _listed(truth.replicas) or detail)


def check_coverage(truth: Truth) -> Check:
    """See that every element is held, by one piece and its replicas."""
    detail = f"{truth.elements:,} elements of {len(truth.norms)} parameters, each in one piece"
    return Check("coverage", not truth.coverage, _listed(truth.coverage) or detail)


def check_scaling(truth: Truth, plan: Plan, clipped: Clipped | None) -> Check:
    """See that clip() multiplied every gradient by the coefficient, and by the right one."""
    if clipped is None:
        if plan.impossible:
            return Check("scaling", False, plan.impossible)
        why = "every gradient is zero" if truth.norm == 0 else "the norm is not finite"
        return Check("scaling", True, f"not checked: {why}, so there is nothing to scale")
    if refusal := refusal_of(clipped.outcomes):
        return Check("scaling", False, f"GradClipper's clip() refuses: {refusal}")
    faults = []
    coefficient = next(iter(clipped.outcomes.values())).coefficient
    for rank, outcome in clipped.outcomes.items():
        expected = min(1.0, outcome.threshold / (outcome.norm + 1e-6))
        if not abs(outcome.coefficient - expected) <= TOLERANCE * expected:
            faults.append(
                f"rank {rank}: expected a coefficient of {expected!r}, found {outcome.coefficient!r}"
            )
        faults += [f"rank {rank}: {fault}" for fault in outcome.faults]
    if clipped.partial is not None:
        faults += partial_faults(truth, clipped.partial, coefficient)
    threshold = f"{plan.max_norm:.6g}" + (
        " (verify's own: the configured one would not clip)" if plan.own else ""
    )
    detail = f"clip() scaled every gradient by {coefficient:.9g} at the threshold {threshold}"
    return Check("scaling", not faults, _listed(faults) or f"{detail}; they were put back since")


def agrees(found: float, expected: float) -> bool:
    """Whether a norm is right to `TOLERANCE`; what isn't finite must be found not to be, inf or NaN."""
    if not math.isfinite(expected):
        return not math.isfinite(found)
    return abs(found - expected) <= TOLERANCE * expected


def _parted(by_rank: Mapping[int, str]) -> str:
    """Which ranks hold which of several values; empty where they hold one."""
    groups: dict[str, list[int]] = {}
    for rank, value in by_rank.items():
        groups.setdefault(value, []).append(rank)
    return (
        "; ".join(f"{value} on {rank_list(where)}" for value, where in groups.items())
        if len(groups) > 1
        else ""
    )


def _listed(faults: Sequence[str]) -> str:
    shown = [*faults[:_SHOWN], *([f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])]
    return "\n".join(shown)
