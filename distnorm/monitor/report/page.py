"""Runs to one HTML page that holds all it needs: plotly.js, styles, script and data. Nothing is fetched.

Nothing from a run's files gets in but through `escaped` (HTML), `shown` (figures) and `_data` (JSON),
and the page's policy runs no script but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from distnorm.errors import DistnormError
from distnorm.monitor.report.charts import Chart, comparison_charts, step_charts
from distnorm.monitor.report.layer_charts import layer_charts
from distnorm.monitor.report.numbers import plural
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.summary import (
    alerts_section,
    config_differences,
    config_section,
    skipped_section,
    summary_table,
    tiles,
)
from distnorm.monitor.report.tables import escaped

_HERE = Path(__file__).parent


def write_page(runs: Sequence[Run]) -> str:
    """The page of all runs.

    Raises:
        DistnormError: plotly isn't installed.
    """
    plotly = _plotly()
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("drawing.js", "page.js"))
    figures: list[dict[str, object]] = []
    body = [_comparison(runs, figures)] if len(runs) > 1 else []
    body += [_run(run, place, figures) for place, run in enumerate(runs)]
    title = escaped("Gradient report: " + ", ".join(run.name for run in runs))
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_hash(plotly)} {_hash(script)}"
    )
    when = f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the report</a>
<header><div><h1>Gradient report</h1>
<p>{plural(len(runs), "run")}, written by distnorm on {when}</p></div>
<button type="button" id="theme" aria-pressed="false">Dark theme</button></header>
{_navigation(runs, figures)}
<main id="content" tabindex="-1">
<noscript><p class="notice">The charts need JavaScript; the tables below each of them do not.</p></noscript>
{"".join(body)}
</main>
<script type="application/json" id="figures">{_data(figures)}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise DistnormError(
            "the report is drawn with plotly, which is not installed: pip install 'distnorm[report]'"
        ) from error
    text: str = get_plotlyjs()
    return text.replace("</script", "<\\/script")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _data(value: object) -> str:
    """JSON that can stand in HTML: no text in it can end the element that it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _navigation(runs: Sequence[Run], figures: Sequence[dict[str, object]]) -> str:
    links = [("comparison", "Comparison")] if len(runs) > 1 else []
    links += [(f"run{place}", run.name) for place, run in enumerate(runs)]
    if len(runs) == 1:
        links = [(f"{figure['id']}-title", str(figure["title"])) for figure in figures]
        links += [("run0-alerts", "Alerts"), ("run0-skipped", "Skipped steps"), ("run0-config", "Config")]
    items = "".join(f'<li><a href="#{place}">{escaped(text)}</a></li>' for place, text in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _comparison(runs: Sequence[Run], figures: list[dict[str, object]]) -> str:
    limits = _limits(runs)
    charts = [_figure(chart, "compare", limits, figures) for chart in comparison_charts(runs)]
    return (
        '<section aria-labelledby="comparison"><h2 id="comparison">Comparison</h2>'
        f"<article><h3>In figures</h3>{summary_table(runs)}</article>"
        f'<div class="charts">{"".join(charts)}</div>{config_differences(runs)}</section>'
    )


def _run(run: Run, place: int, figures: list[dict[str, object]]) -> str:
    key = f"run{place}"
    notes = "".join(f"<li>{escaped(note)}</li>" for note in run.notes)
    limits = _limits([run])
    by_step = "".join(_figure(chart, key, limits, figures) for chart in step_charts(run))
    by_layer = "".join(
        _figure(chart, key, limits, figures, _picker(run, key, chart)) for chart in layer_charts(run.layers)
    )
    return (
        f'<section aria-labelledby="{key}"><h2 id="{key}">{escaped(run.name)}</h2>{tiles(run)}'
        f"{f'<ul class=notice>{notes}</ul>' if notes else ''}{_range(run, key)}"
        f'<div class="charts">{by_step}</div><div class="charts">{by_layer}</div>'
        f"{alerts_section(run, key)}{skipped_section(run, key)}{config_section(run, key)}</section>\n"
    )


def _limits(runs: Sequence[Run]) -> list[float]:
    """The ends of the axis of steps, so that all charts of a run lie over each other."""
    ends = [step for run in runs for step in (*run.steps.rows[:1], *run.steps.rows[-1:])]
    first = min((step.step for step in ends), default=0)
    last = max((step.step for step in ends), default=1)
    room = max(0.5, 0.006 * (last - first))
    return [first - room, last + room]


def _figure(
    chart: Chart, key: str, limits: list[float], figures: list[dict[str, object]], controls: str = ""
) -> str:
    name = f"{key}-{len(figures)}"
    figures.append(
        {
            "id": name,
            "run": key,
            "kind": chart.kind,
            "range": limits,
            "title": chart.title,
            "traces": chart.traces,
            "layout": chart.layout,
        }
    )
    title = escaped(chart.title)
    parts = [
        f'<h3 id="{name}-title">{title}</h3>',
        f'<p id="{name}-says">{escaped(chart.says)}</p>',
        controls,
    ]
    if chart.traces:
        parts.append(_key(chart))
        parts.append(
            f'<div class="plot {chart.kind}" id="{name}" role="img" aria-labelledby="{name}-title" '
            f'aria-describedby="{name}-says"></div>'
        )
    if chart.table:
        parts.append(f"<details><summary>{title} as a table</summary>{chart.table}</details>")
    nothing = "" if chart.traces else " nothing"
    return f'<article class="chart {chart.kind}{nothing}">{"".join(parts)}</article>\n'


def _key(chart: Chart) -> str:
    """What the marked cells of a heat map are."""
    trace = chart.traces[0] if chart.traces else {}
    words = {
        "zeros": '<span class="zero">all zero</span>',
        "broken": '<span class="broken">not finite</span>',
    }
    found = [word for name, word in words.items() if trace.get(name)]
    return f'<p class="key">{"".join(found)}</p>' if found else ""


def _picker(run: Run, key: str, chart: Chart) -> str:
    if chart.kind != "picked":
        return ""
    alerted = next((alert.layer for alert in run.alerts if alert.kind != "non_finite" and alert.layer), "")
    options = "".join(
        f'<option value="{row}"{" selected" if layer.name == alerted else ""}>{escaped(layer.name)}</option>'
        for row, layer in enumerate(run.layers.layers)
    )
    return f'<p class="controls"><label>Layer <select data-run="{key}">{options}</select></label></p>'


def _range(run: Run, key: str) -> str:
    if len(run.steps.rows) < 2:
        return ""
    first, last = run.steps.rows[0].step, run.steps.rows[-1].step
    limits = f'min="{first}" max="{last}" required'
    return (
        f'<form class="controls" data-run="{key}" aria-label="Steps shown"><label>Steps '
        f'<input type="number" name="first" value="{first}" {limits}></label> <label>to '
        f'<input type="number" name="last" value="{last}" {limits}></label> '
        '<button type="submit">Show</button> <button type="reset">All</button></form>'
    )
