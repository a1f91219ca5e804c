"""The charts of a run over its steps, as plotly's figures in plain data.

A colour "@name" is page.css's custom property, which has a value for light and one for dark. Text from a run
goes through `shown`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnorm.monitor.report.numbers import finite, packed, percentiles, plural, share, short
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.steps import Step
from distnorm.monitor.report.tables import binned_table, side_by_side, table

Trace = dict[str, Any]
COLOURS = ("@blue", "@orange", "@green", "@purple", "@amber", "@ink")
DASHES = ("solid", "dash", "dot", "dashdot")
_MAX_POINTS = 4000


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its words.

    Args:
        title: the heading.
        says: one or two sentences about what it shows; the only thing shown where there are no `traces`.
        traces: plotly's.
        layout: plotly's; page.js adds what all figures share.
        table: the text alternative, HTML.
        kind: how page.js treats it: "steps" share their zoom in a run, "heat" and "spread" have layers.
    """

    title: str
    says: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]
    table: str = ""
    kind: str = "steps"


def shown(text: str) -> str:
    """Text for a figure, where plotly takes tags for tags; what can't be printed is spelt out."""
    visible = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return html.escape(visible, quote=False).replace("$", "&#36;")  # between dollars it would be MathJax's


def step_charts(run: Run) -> list[Chart]:
    """Norm, loss, clip rate, coefficient, and what else the run's steps have."""
    steps = run.steps.rows
    return [
        chart
        for chart in (
            _norm(steps),
            _simple(steps, "Loss", "loss", lambda step: step.loss, "@green", "linear"),
            _simple(steps, "Clip rate", "clip rate", lambda step: step.clip_rate, "@purple", "rate"),
            _simple(steps, "Clip coefficient", "coefficient", lambda step: step.coef, "@orange", "log"),
            _groups(steps),
            _noise(steps),
        )
        if chart is not None
    ]


def comparison_charts(runs: Sequence[Run]) -> list[Chart]:
    """The norms of all runs in one chart, and their losses in another."""
    columns: tuple[tuple[str, str, Callable[[Step], float], str], ...] = (
        ("Gradient norms", "norm", lambda step: step.norm, "log"),
        ("Losses", "loss", lambda step: step.loss, "linear"),
        ("Clip rates", "clip rate", lambda step: step.clip_rate, "rate"),
    )
    charts = []
    for title, word, value, axis in columns:
        points = {run.name: [(step.step, value(step)) for step in run.steps.rows] for run in runs}
        traces = [
            _line(points[run.name], run.name, _style(place), axis)
            for place, run in enumerate(runs)
            if finite(y for _, y in points[run.name])
        ]
        if not traces:
            charts.append(Chart(title, f"No run has a finite {word}, so there is nothing to draw.", [], {}))
            continue
        says = f"The {word} of every run{' before clipping' if word == 'norm' else ''}, step by step."
        form = share if axis == "rate" else short
        text = side_by_side(points, f"Median {word} of each run by steps.", form)
        charts.append(Chart(title, says, traces, _axes(word, axis, traces), text, kind="compare"))
    return charts


def _style(place: int) -> dict[str, Any]:
    """Colours first, then dashes: no two of 24 lines look alike."""
    return {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)]}


def thin(points: Sequence[tuple[int, float]], most: int = _MAX_POINTS) -> list[tuple[int, float]]:
    """The points, or the lowest, highest and any broken one of each of `most` / 2 bins, in order."""
    if len(points) <= most:
        return list(points)
    bins = most // 2
    kept: list[tuple[int, float]] = []
    for place in range(bins):
        inside = points[place * len(points) // bins : (place + 1) * len(points) // bins]
        sound = [point for point in inside if math.isfinite(point[1])] or inside[:1]
        ends = {min(sound, key=lambda point: point[1]), max(sound, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _line(points: Sequence[tuple[int, float]], name: str, line: Mapping[str, Any], axis: str) -> Trace:
    drawn = thin(points)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(finite(y for _, y in drawn)) < 3 else "lines",
        "name": shown(name),
        "x": packed((x for x, _ in drawn), "i"),
        "y": packed(_drawable(y, axis) for _, y in drawn),
        "line": {"width": 1.4, **line},
        "marker": {"size": 7, "color": line["color"]},
        "hovertemplate": "%{y:.1%}" if axis == "rate" else "%{y:.4~g}",
    }


def _marks(points: Sequence[tuple[int, float]], name: str, colour: str, symbol: str, **more: Any) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": packed((x for x, _ in points), "i"),
        "y": packed(y for _, y in points),
        "marker": {"color": colour, "symbol": symbol, "size": 7, "line": {"width": 1, "color": "@paper"}},
        "hovertemplate": "%{y:.4~g}",
        **more,
    }


def _drawable(value: float, axis: str) -> float:
    return math.nan if not math.isfinite(value) or (axis == "log" and value <= 0) else value


def _axes(word: str, axis: str, traces: Sequence[Trace]) -> dict[str, Any]:
    y: dict[str, Any] = {"title": {"text": word}}
    if axis == "log":
        y |= {"type": "log"}
    if axis == "rate":
        y |= {"tickformat": ".0%", "rangemode": "tozero"}
    return {"xaxis": {"title": {"text": "step"}}, "yaxis": y, "showlegend": len(traces) > 1}


def _norm(steps: Sequence[Step]) -> Chart:
    title = "Gradient norm"
    broken = [step for step in steps if not step.finite]
    skipped = [step for step in steps if step.skipped]
    norms = [(step.step, step.norm) for step in steps]
    sound = finite(norm for _, norm in norms)
    if not sound:
        why = (
            f"None of {plural(len(steps), 'step')} has a finite norm" if steps else "No step was written yet"
        )
        return Chart(title, f"{why}, so there is nothing to draw.", [], {})
    thresholds = [(step.step, step.threshold) for step in steps]
    has_threshold = bool(finite(threshold for _, threshold in thresholds))
    clipped = [(step.step, step.norm) for step in steps if step.clipped and math.isfinite(step.norm)]
    axis = "log" if max(sound) > 0 else "linear"
    traces = [_line(norms, "norm before clipping", {"color": "@blue"}, axis)]
    if has_threshold:
        dashed = {"color": "@orange", "dash": "dash", "width": 1.8}
        traces.append(_line(thresholds, "threshold", dashed, axis))
    if clipped:
        traces.append(_marks(thin(clipped), "clipped", "@amber", "triangle-up"))
    edge = {"yaxis": "y2", "hovertemplate": "%{x}"}
    if skipped:
        places = [(step.step, 0.07) for step in skipped[:_MAX_POINTS]]
        traces.append(_marks(places, "skipped", "@purple", "diamond", **edge))
    if broken:
        places = [(step.step, 0.025) for step in broken[:_MAX_POINTS]]
        traces.append(_marks(places, "not finite", "@ink", "x", **edge))
    layout = _axes("norm", axis, traces)
    layout["yaxis2"] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    says = [
        f"{plural(len(steps), 'step')}, {len(clipped):,} of them clipped, {len(skipped):,} skipped, "
        f"{len(broken):,} not finite. The axis is {axis}arithmic."
        if axis == "log"
        else f"{plural(len(steps), 'step')}; every finite norm is zero.",
        ""
        if has_threshold
        else "There is no threshold (it is infinite or was not written), so nothing is clipped.",
        _zeros(sound, axis),
        _thinned(len(steps)),
    ]
    return Chart(title, " ".join(filter(None, says)), traces, layout, binned_table(steps))


def _simple(
    steps: Sequence[Step], title: str, word: str, value: Callable[[Step], float], colour: str, axis: str
) -> Chart:
    points = [(step.step, value(step)) for step in steps]
    sound = finite(y for _, y in points)
    if not sound:
        why = "No step was written yet" if not steps else f"No step has a finite {word}"
        return Chart(title, f"{why}, so there is nothing to draw.", [], {})
    low, middle, high = percentiles(sound, (0, 50, 100))
    kind = "log" if axis == "log" and high > 0 else axis if axis != "log" else "linear"
    traces = [_line(points, word, {"color": colour}, kind)]
    form = share if axis == "rate" else short
    says = f"From {form(low)} to {form(high)}, median {form(middle)}; {form(sound[-1])} at the end."
    if len(sound) < len(points):
        says += f" {plural(len(points) - len(sound), 'step')} without a finite value: gaps."
    said = " ".join(filter(None, [says, _zeros(sound, kind), _thinned(len(steps))]))
    return Chart(title, said, traces, _axes(word, kind, traces), binned_table(steps, word, value, form))


def _groups(steps: Sequence[Step]) -> Chart | None:
    names = list(dict.fromkeys(name for step in steps for name in step.groups))
    if not names:
        return None
    traces = []
    for place, name in enumerate(names):
        points = [(step.step, step.groups[name][0]) for step in steps if name in step.groups]
        traces.append(_line(points, name, _style(place), "log"))
    rows = []
    for name in names:
        norms = percentiles((step.groups[name][0] for step in steps if name in step.groups), (0, 50, 100))
        cut = sum(step.groups[name][1] < 1 for step in steps if name in step.groups)
        rows.append((name, *map(short, norms), f"{cut:,}"))
    text = table(("group", "lowest norm", "median", "highest", "steps clipped"), rows)
    layout = _axes("norm", "log", traces) | {"showlegend": True}
    says = f"The norms before clipping of {plural(len(names), 'group')} of parameters. {_thinned(len(steps))}"
    return Chart("Groups", says.strip(), traces, layout, text)


def _noise(steps: Sequence[Step]) -> Chart | None:
    if not finite(step.noise_scale for step in steps):
        return None
    return _simple(
        steps, "Gradient noise scale", "noise scale", lambda step: step.noise_scale, "@blue", "log"
    )


def _zeros(values: Iterable[float], axis: str) -> str:
    count = sum(value <= 0 for value in values) if axis == "log" else 0
    return f"{plural(count, 'value')} of zero can't be drawn on a logarithmic axis." if count else ""


def _thinned(count: int) -> str:
    if count <= _MAX_POINTS:
        return ""
    return f"Lines go through the lowest and the highest of each of {_MAX_POINTS // 2:,} bins of steps."
