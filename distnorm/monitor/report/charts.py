"""The charts of a run over its steps: which columns each draws, in what colours, and its words and table.

A colour "@name" is page.css's custom property, which has a value for light and one for dark. Text from a run
goes through `shown`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnorm.monitor.report.columns import BINS, MOST_STEPS
from distnorm.monitor.report.numbers import finite, percentiles, plural, share, short, visible
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.steps import Step
from distnorm.monitor.report.tables import Table, binned_table, side_by_side

COLOURS = ("@blue", "@orange", "@green", "@purple", "@amber", "@ink")
DASHES = ("solid", "dash", "dot", "dashdot")
_WIDTH = 1.4

Number = Callable[[Step], float]
_SIMPLE: tuple[tuple[str, str, str, str, str], ...] = (
    ("Loss", "loss", "loss", "@green", "linear"),
    ("Learning rate", "learning rate", "learning_rate", "@amber", "linear"),
    ("Throughput", "tokens/s", "tokens_per_second", "@blue", "linear"),
    ("Clip rate", "clip rate", "clip_rate", "@purple", "rate"),
    ("Clip coefficient", "coefficient", "coef", "@orange", "log"),
    ("Gradient noise scale", "noise scale", "noise_scale", "@blue", "log"),
)
_ALWAYS = {"loss", "clip_rate", "coef"}
"""A run without these is said to have none; one without others has no chart of them."""
_COMPARED = (
    ("Gradient norms", "norm", "norm", "log"),
    ("Losses", "loss", "loss", "linear"),
    ("Clip rates", "clip rate", "clip_rate", "rate"),
    ("Throughputs", "tokens/s", "tokens_per_second", "linear"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A column of a run, as it is drawn.

    Args:
        column: of `columns.columns`.
        name: for the legend.
        colour: "@name".
        dash: plotly's.
        width: in pixels.
        run: which of the page's runs it is of.
        marks: draw a mark where the flags have this bit, in place of a line.
        edge: draw the marks at this height of the figure, in place of the column's.
        symbol: of the marks, plotly's.
    """

    column: str
    name: str
    colour: str
    dash: str = "solid"
    width: float = _WIDTH
    run: int = 0
    marks: int = 0
    edge: float = 0.0
    symbol: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its words.

    Args:
        title: the heading.
        says: one or two sentences about what it shows; the only thing shown where there is nothing to draw.
        lines: what is drawn of the runs' columns.
        word: the axis's title.
        axis: linear, log, rate (a share, as per cent) or difference (logarithmic).
        table: the text alternative.
        kind: how the script treats it: "steps" and "compare" have lines, "heat", "picked", "spread" layers.
        layers: what the latter are drawn of.
    """

    title: str
    says: str
    lines: Sequence[Line] = ()
    word: str = ""
    axis: str = "linear"
    table: Table | None = None
    kind: str = "steps"
    layers: Mapping[str, Any] | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether there is a figure at all."""
        return bool(self.lines) or self.layers is not None


def shown(text: str) -> str:
    """Text for a figure, where plotly takes tags for tags; what can't be printed is spelt out."""
    return html.escape(visible(text), quote=False).replace(
        "$", "&#36;"
    )  # between dollars it would be MathJax's


def step_charts(run: Run, place: int = 0) -> list[Chart]:
    """Norm, loss, learning rate, throughput, clip rate, coefficient, and what else the run's steps have."""
    steps = run.steps.rows
    found = [_norm(steps, place)]
    for title, word, column, colour, axis in _SIMPLE:
        if column in _ALWAYS or finite(_of(column)(step) for step in steps):
            found.append(_simple(steps, Line(column, word, colour, run=place), title, axis))
    groups = _groups(steps, place)
    return found if groups is None else [*found, groups]


def comparison_charts(runs: Sequence[Run]) -> list[Chart]:
    """The norms of all runs in one chart, their losses in another, and so on; and their differences."""
    charts = []
    for title, word, column, axis in _COMPARED:
        value = _of(column)
        points = {run.name: [(step.step, value(step)) for step in run.steps.rows] for run in runs}
        drawn = [place for place, run in enumerate(runs) if finite(y for _, y in points[run.name])]
        if not drawn:
            if column in ("norm", "loss"):
                why = f"No run has a finite {word}, so there is nothing to draw."
                charts.append(Chart(title, why, kind="compare"))
            continue
        lines = [_styled(column, runs[place].name, place, len(runs)) for place in drawn]
        says = f"The {word} of every run{' before clipping' if word == 'norm' else ''}, step by step."
        if len(drawn) > 1:
            says += " Where runs lie on each other, the wider line is of the one that is listed first."
        text = side_by_side(
            points, f"Median {word} of each run by steps.", share if axis == "rate" else short
        )
        charts.append(Chart(title, says, lines, word, axis, text, "compare"))
    return charts


def difference_chart(runs: Sequence[Run], text: Table) -> Chart:
    """How far each run's norm is from the first one's: |a - b| over the larger, at the steps of both."""
    title = f"Differences from {runs[0].name}"
    steps = {step.step: step.norm for step in runs[0].steps.rows}
    parted = [
        place
        for place, run in enumerate(runs)
        if place
        and any(steps.get(step.step, step.norm) != step.norm for step in run.steps.rows if step.finite)
    ]
    if not parted:
        return Chart(title, "At the steps in common all norms are the same, bit for bit.", (), table=text)
    lines = [_styled("difference", runs[place].name, place, len(runs)) for place in parted]
    says = "The relative difference of the norms, at the steps in common; equal norms are not drawn."
    return Chart(title, says, lines, "relative difference", "log", text, "compare")


def _of(column: str) -> Number:
    return lambda step: float(getattr(step, column))


def _styled(column: str, name: str, place: int, count: int) -> Line:
    """Colours first, then dashes: no two of 24 lines look alike. The first are the widest, and lie below."""
    width = _WIDTH + 2.0 * min(count - 1 - place, 3) / (1 if count <= 4 else 2)
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return Line(column, shown(name), COLOURS[place % len(COLOURS)], dash, width, place)


def _norm(steps: Sequence[Step], run: int) -> Chart:
    title = "Gradient norm"
    broken = sum(not step.finite for step in steps)
    skipped = sum(step.skipped for step in steps)
    sound = finite(step.norm for step in steps)
    if not sound:
        why = (
            f"None of {plural(len(steps), 'step')} has a finite norm" if steps else "No step was written yet"
        )
        return Chart(title, f"{why}, so there is nothing to draw.")
    has_threshold = bool(finite(step.threshold for step in steps))
    clipped = sum(step.clipped and math.isfinite(step.norm) for step in steps)
    axis = "log" if max(sound) > 0 else "linear"
    lines = [Line("norm", "norm before clipping", "@blue", run=run)]
    if has_threshold:
        lines.append(Line("threshold", "threshold", "@orange", "dash", 1.8, run))
    if clipped:
        lines.append(Line("norm", "clipped", "@amber", run=run, marks=1, symbol="triangle-up"))
    if skipped:
        lines.append(Line("", "skipped", "@purple", run=run, marks=2, edge=0.07, symbol="diamond"))
    if broken:
        lines.append(Line("", "not finite", "@ink", run=run, marks=4, edge=0.025, symbol="x"))
    says = [
        f"{plural(len(steps), 'step')}, {clipped:,} of them clipped, {skipped:,} skipped, "
        f"{broken:,} not finite. The axis is logarithmic."
        if axis == "log"
        else f"{plural(len(steps), 'step')}; every finite norm is zero.",
        ""
        if has_threshold
        else "There is no threshold (it is infinite or was not written), so nothing is clipped.",
        _zeros(sound, axis),
        _thinned(len(steps)),
    ]
    return Chart(title, " ".join(filter(None, says)), lines, "norm", axis, binned_table(steps))


def _simple(steps: Sequence[Step], line: Line, title: str, axis: str) -> Chart:
    word, value = line.name, _of(line.column)
    points = [value(step) for step in steps]
    sound = finite(points)
    if not sound:
        why = "No step was written yet" if not steps else f"No step has a finite {word}"
        return Chart(title, f"{why}, so there is nothing to draw.")
    low, middle, high = percentiles(sound, (0, 50, 100))
    kind = "log" if axis == "log" and high > 0 else axis if axis != "log" else "linear"
    form = share if axis == "rate" else short
    says = f"From {form(low)} to {form(high)}, median {form(middle)}; {form(sound[-1])} at the end."
    if len(sound) < len(points):
        says += f" {plural(len(points) - len(sound), 'step')} without a finite value: gaps."
    said = " ".join(filter(None, [says, _zeros(sound, kind), _thinned(len(steps))]))
    return Chart(title, said, [line], word, kind, binned_table(steps, word, value, form))


def _groups(steps: Sequence[Step], run: int) -> Chart | None:
    names = list(dict.fromkeys(name for step in steps for name in step.groups))
    if not names:
        return None
    lines, rows = [], []
    for place, name in enumerate(names):
        style = _styled(f"group:{name}", name, place, 1)
        lines.append(Line(style.column, style.name, style.colour, style.dash, run=run))
        norms = percentiles((step.groups[name][0] for step in steps if name in step.groups), (0, 50, 100))
        cut = sum(step.groups[name][1] < 1 for step in steps if name in step.groups)
        rows.append((name, *map(short, norms), f"{cut:,}"))
    text = Table(("group", "lowest norm", "median", "highest", "steps clipped"), rows)
    says = f"The norms before clipping of {plural(len(names), 'group')} of parameters. {_thinned(len(steps))}"
    return Chart("Groups", says.strip(), lines, "norm", "log", text)


def _zeros(values: Iterable[float], axis: str) -> str:
    count = sum(value <= 0 for value in values) if axis == "log" else 0
    return f"{plural(count, 'value')} of zero can't be drawn on a logarithmic axis." if count else ""


def _thinned(count: int) -> str:
    return (
        f"Lines go through the lowest and the highest of each of {BINS:,} bins of steps."
        if count > MOST_STEPS
        else ""
    )
