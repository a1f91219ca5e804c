"""All contenders of one variant in turns: what they took, and whether they agree on the norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from distnorm.bench.contenders import Contender
from distnorm.bench.limit import Limit, Work, seconds, slowest
from distnorm.bench.problem import Problem

_WARM_UP = 2  # rounds, not counted
_SCALED_WITHIN = 1e-3


@dataclass(frozen=True, slots=True)
class Variant:
    """One table: a problem and those who solve it.

    Args:
        workload: its name on the command line.
        title: what is measured.
        problem: the gradients.
        contenders: who is timed.
        work: what this rank has to do, at the least.
        max_norm: the threshold whose scaling is checked, or `None`.
        limit_is: the contender whose median is the limit, in place of what was measured beforehand.
    """

    workload: str
    title: str
    problem: Problem
    contenders: Sequence[Contender]
    work: Work
    max_norm: float | None = None
    limit_is: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one contender.

    Args:
        name: its name.
        seconds: of every round, on the slowest rank.
        error: the largest relative error of the norm, on any rank, in any round; `None` where there is none.
        problem: what is wrong with it: what it raised, or that it disagrees.
        agrees: whether the norm, and the scaling, are right.
    """

    name: str
    seconds: tuple[float, ...]
    error: float | None
    problem: str | None
    agrees: bool

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one variant; the same on every rank.

    Args:
        workload, title: the variant's.
        tensors: gradients of the whole model.
        bytes: that the limit is made of, on all ranks together.
        limit: seconds in which the busiest rank could do it.
        reference: the name of the contender that times are compared with.
        rows: one for each contender.
    """

    workload: str
    title: str
    tensors: int
    bytes: float
    limit: float
    reference: str
    rows: tuple[Row, ...]

    @property
    def reference_median(self) -> float | None:
        return next((row.median for row in self.rows if row.name == self.reference and row.seconds), None)


def run_rounds(variant: Variant, rounds: int, limit: Limit) -> Table:
    """Time every contender `rounds` times. Collective.

    The order is turned by one from round to round. Gradients are restored before every call, untimed.
    A first call of each, untimed, tells who raises: on all ranks, since the others would wait for the one.
    """
    world, contenders = variant.problem.world, list(variant.contenders)
    first = {each.name: _first_call(variant, each) for each in contenders}
    fit = [each for each in contenders if first[each.name][0] is None]
    times: dict[str, list[float]] = {each.name: [] for each in fit}
    norms: dict[str, list[float | None]] = {each.name: [] for each in fit}
    for round_ in range(-_WARM_UP, rounds):
        start = round_ % len(fit) if fit else 0
        for each in fit[start:] + fit[:start]:
            taken, norm = _timed_call(variant, each)
            times[each.name].append(taken)
            norms[each.name].append(norm)
    rows = []
    for each in contenders:
        failure, scaling = first[each.name]
        if failure is not None:
            rows.append(Row(each.name, (), None, failure, agrees=True))
            continue
        error = _largest_error(variant, norms[each.name])
        wrong = scaling or (_disagreement(error, each) if error is not None else None)
        rows.append(
            Row(
                each.name,
                tuple(slowest(world, times[each.name][_WARM_UP:])),
                error,
                wrong,
                agrees=wrong is None,
            )
        )
    works = world.gather(variant.work)
    at_best = max(limit.seconds(work) for work in works)
    return Table(
        variant.workload,
        variant.title,
        len({name for names in world.gather([h.name for h in variant.problem.held]) for name in names}),
        sum(work.bytes for work in works),
        next((row.median for row in rows if row.name == variant.limit_is), at_best),
        next((each.name for each in contenders if each.is_reference), ""),
        tuple(rows),
    )


def _first_call(variant: Variant, contender: Contender) -> tuple[str | None, str | None]:
    """What it raised on any rank, and what is wrong with its scaling. Collective."""
    problem = variant.problem
    problem.restore()
    failure = None
    try:
        contender.call()
    except Exception as error:  # whatever a peer raises is shown
        text = str(error).strip().partition("\n")[0]
        failure = f"raises {type(error).__name__}: {text}"
    failures = [each for each in problem.world.gather(failure) if each is not None]
    if failures:
        return failures[0], None
    if variant.max_norm is None:
        return None, None
    expected = problem.norm * min(1.0, variant.max_norm / (problem.norm + 1e-6))
    found = problem.present_norm()
    if math.isclose(found, expected, rel_tol=_SCALED_WITHIN):
        return None, None
    return None, f"DISAGREES: gradients were left with norm {found:.6g}, not {expected:.6g}"


def _timed_call(variant: Variant, contender: Contender) -> tuple[float, float | None]:
    variant.problem.restore()
    found: list[object] = []
    taken = seconds(variant.problem.world, lambda: found.append(contender.call()))
    norm: object = found[0]
    return taken, None if norm is None else float(norm)  # type: ignore[arg-type]


def _largest_error(variant: Variant, norms: Sequence[float | None]) -> float | None:
    """Over all rounds and ranks; a NaN is the largest. Collective."""
    true = variant.problem.norm
    mine = [abs(norm / true - 1) for norm in norms if norm is not None]
    errors = [error for theirs in variant.problem.world.gather(mine) for error in theirs]
    if not errors:
        return None
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _disagreement(error: float, contender: Contender) -> str | None:
    if error <= contender.tolerance:
        return None
    return f"DISAGREES: off by {error:.1e}, and {contender.tolerance:.0e} is allowed"
