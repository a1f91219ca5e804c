"""Tables as data: the text alternatives of the charts, and what is best read so."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distnorm.monitor.report.numbers import finite, percentiles, short
from distnorm.monitor.report.steps import Step

_MAX_BINS = 50
Form = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def span(first: int, last: int) -> str:
    """A step, or the first and the last of several."""
    return f"{first}" if first == last else f"{first} to {last}"


def binned_table(
    steps: Sequence[Step],
    word: str = "norm",
    value: Callable[[Step], float] = lambda step: step.norm,
    form: Form = short,
) -> Table:
    """Lowest, median, highest of bins of steps, in at most 50 rows; for norms thresholds and counts too."""
    bins = min(_MAX_BINS, len(steps))
    rows = []
    for place in range(bins):
        inside = steps[place * len(steps) // bins : (place + 1) * len(steps) // bins]
        row = [span(inside[0].step, inside[-1].step)]
        row += [form(each) for each in percentiles(map(value, inside), (0, 50, 100))]
        if word == "norm":
            thresholds = finite(step.threshold for step in inside)
            row.append(form(thresholds[-1]) if thresholds else "none")
            row += [f"{sum(step.clipped for step in inside):,}", f"{sum(step.skipped for step in inside):,}"]
            row.append(f"{sum(not step.finite for step in inside):,}")
        rows.append(row)
    heads = ["steps", f"lowest {word}", "median", "highest"]
    if word == "norm":
        heads += ["last threshold", "clipped", "skipped", "not finite"]
    return Table(heads, rows)


def side_by_side(runs: Mapping[str, Sequence[tuple[int, float]]], caption: str, form: Form) -> Table:
    """The medians of several runs' values in bins of steps, a column a run; points are in order of step."""
    steps = sorted({step for points in runs.values() for step, _ in points})
    at = {name: [step for step, _ in points] for name, points in runs.items()}
    bins = min(_MAX_BINS, len(steps))
    rows = []
    for place in range(bins):
        inside = steps[place * len(steps) // bins : (place + 1) * len(steps) // bins]
        row = [span(inside[0], inside[-1])]
        for name, points in runs.items():
            some = points[bisect_left(at[name], inside[0]) : bisect_right(at[name], inside[-1])]
            (middle,) = percentiles((value for _, value in some), (50,))
            row.append("-" if math.isnan(middle) else form(middle))
        rows.append(row)
    return Table(["steps", *runs], rows, caption)
