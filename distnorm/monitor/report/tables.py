"""HTML tables: the text alternatives of the charts, and what is best read so. Every cell is escaped."""

from __future__ import annotations

import html
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence

from distnorm.monitor.report.numbers import finite, percentiles, short
from distnorm.monitor.report.steps import Step

_MAX_BINS = 50
Form = Callable[[float], str]


def escaped(text: str) -> str:
    """Text for HTML, in tags and attributes; what can't be printed is spelt out, save for line breaks."""
    visible = "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
    return html.escape(visible)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column names its rows. It scrolls by itself, with the keyboard too."""
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in heads)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{escaped(first)}</th>{cells}</tr>')
    note = f"<caption>{escaped(caption)}</caption>" if caption else ""
    label = escaped(caption or " and ".join(heads[:2]))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{note}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def span(first: int, last: int) -> str:
    """A step, or the first and the last of several."""
    return f"{first}" if first == last else f"{first} to {last}"


def binned_table(
    steps: Sequence[Step],
    word: str = "norm",
    value: Callable[[Step], float] = lambda step: step.norm,
    form: Form = short,
) -> str:
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
    return table(heads, rows)


def side_by_side(runs: Mapping[str, Sequence[tuple[int, float]]], caption: str, form: Form) -> str:
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
    return table(["steps", *runs], rows, caption)
