"""Runs to one HTML page that holds all it needs: plotly.js, styles, script and data. Nothing is fetched.

Nothing from a run's files gets in but through the templates, which escape it, `shown` (figures) and
`as_json`; and the page's policy runs no script but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distnorm.errors import DistnormError
from distnorm.monitor.report.charts import Chart, comparison_charts, difference_chart, step_charts
from distnorm.monitor.report.columns import columns, thinned
from distnorm.monitor.report.doctor_page import DoctorPage
from distnorm.monitor.report.layer_charts import layer_charts
from distnorm.monitor.report.numbers import plural, visible
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.summary import (
    Section,
    alerts_section,
    config_differences,
    facts,
    norm_differences,
    origin,
    skipped_section,
    summary_table,
)
from distnorm.monitor.report.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
_SCRIPTS = ("data.js", "drawing.js", "heat.js", "layers.js", "page.js")


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart at its place in the page."""

    id: str
    run: str
    chart: Chart
    names: Sequence[str] = ()
    picked: str = ""

    def as_data(self) -> dict[str, Any]:
        """What the script needs of it."""
        chart = self.chart
        return {
            "id": self.id,
            "run": self.run,
            "kind": chart.kind,
            "word": chart.word,
            "axis": chart.axis,
            "lines": [asdict(line) for line in chart.lines],
            "layers": chart.layers,
        }


@dataclass(frozen=True, slots=True)
class RunSection:
    """A run, as the template shows it."""

    key: str
    name: str
    folder: str
    facts: Sequence[tuple[str, str]]
    origin: Sequence[str]
    remarks: str
    notices: Sequence[str]
    ends: tuple[int, int] | None
    charts: Sequence[Figure]
    layers: Sequence[Figure]
    alerts: Section
    skipped: Section
    config: str
    doctor: DoctorPage | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs beside each other."""

    figures: Table
    charts: Sequence[Figure]
    configs: Section


@dataclass(slots=True)
class Contents:
    """All that a page says of some runs.

    Args:
        runs: in their order.
        live: whether the page will follow them: then layers are left out until they are asked for.
    """

    runs: Sequence[Run]
    live: bool = False
    comparison: Comparison | None = field(init=False)
    sections: Sequence[RunSection] = field(init=False)

    def __post_init__(self) -> None:
        runs = self.runs
        self.comparison = None
        if len(runs) > 1:
            charts = [*comparison_charts(runs), difference_chart(runs, norm_differences(runs))]
            figures = [Figure(f"compare-{place}", "compare", chart) for place, chart in enumerate(charts)]
            self.comparison = Comparison(summary_table(runs), figures, config_differences(runs))
        self.sections = [self._section(run, place) for place, run in enumerate(runs)]

    def _section(self, run: Run, place: int) -> RunSection:
        key, steps = f"run{place}", run.steps.rows
        charts = [Figure(f"{key}-{at}", key, chart) for at, chart in enumerate(step_charts(run, place))]
        return RunSection(
            key=key,
            name=run.name,
            folder=str(run.folder),
            facts=facts(run),
            origin=origin(run),
            remarks=run.remarks,
            notices=(*_alarm(run), *run.notes),
            ends=(steps[0].step, steps[-1].step) if len(steps) > 1 else None,
            charts=charts,
            layers=() if self.live else layer_figures(run, key),
            alerts=alerts_section(run),
            skipped=skipped_section(run),
            config=run.config,
            doctor=run.doctor,
        )

    @property
    def figures(self) -> list[Figure]:
        """All figures, in the order of the page."""
        compared = self.comparison.charts if self.comparison else ()
        return [*compared, *(figure for run in self.sections for figure in (*run.charts, *run.layers))]

    def links(self) -> list[tuple[str, str]]:
        """Where the page's navigation leads, with the words for it."""
        if len(self.runs) > 1:
            return [("comparison", "Comparison"), *((run.key, run.name) for run in self.sections)]
        found = [(f"{figure.id}-title", figure.chart.title) for figure in self.figures]
        return [
            *found,
            ("run0-alerts", "Alerts"),
            ("run0-skipped", "Skipped steps"),
            *([("run0-doctor", "Gradients")] if self.runs[0].doctor else []),
            ("run0-config", "Config"),
        ]


def _alarm(run: Run) -> tuple[str, ...]:
    """What the doctor found wrong, to be said where a run begins: it stands far below."""
    if run.doctor is None or run.doctor.state != "wrong":
        return ()
    return (f'{run.doctor.headline} See "Gradients, against one process" below.',)


def layer_figures(run: Run, key: str) -> list[Figure]:
    """The charts of a run's layers."""
    names = [layer.name for layer in run.layers.layers]
    alerted = next((alert.layer for alert in run.alerts if alert.kind != "non_finite" and alert.layer), "")
    return [
        Figure(f"{key}-layers-{at}", key, chart, names if chart.kind == "picked" else (), alerted)
        for at, chart in enumerate(layer_charts(run.layers))
    ]


def write_page(runs: Sequence[Run], live: bool = False, more: Mapping[str, Any] | None = None) -> str:
    """The page of all runs.

    Args:
        runs: in their order.
        live: whether the page asks where it came from for new rows.
        more: for the script of a live page.

    Raises:
        DistnormError: plotly or jinja2 isn't installed.
    """
    plotly = _plotly()
    names = (*_SCRIPTS, "live.js") if live else _SCRIPTS
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in names)
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    contents = Contents(runs, live)
    steps = thinned([run.steps.rows for run in runs])
    data = {
        "runs": [{"columns": columns(rows)} for rows in steps],
        "figures": [figure.as_data() for figure in contents.figures if figure.chart.is_drawn],
        **(more or {}),
    }
    return (
        environment()
        .get_template("page.html")
        .render(
            policy=policy(plotly, script, live=live),
            title="Gradient report: " + ", ".join(run.name for run in runs),
            when=f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC",
            live=live,
            runs=runs,
            has_time=any(step.time == step.time for rows in steps for step in rows),
            links=contents.links(),
            comparison=contents.comparison,
            sections=contents.sections,
            style=_trusted(style),
            plotly=_trusted(plotly),
            script=_trusted(script),
            data=_trusted(as_json(data)),
        )
    )


def policy(*scripts: str, live: bool) -> str:
    """The Content-Security-Policy of a page: these scripts and no other, nothing fetched from elsewhere.

    Styles may be inline, since plotly writes them; a style can't run anything, and can't fetch anything here.
    """
    hashes = " ".join(_hash(script) for script in scripts)
    fetched = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {fetched}; base-uri 'none'; form-action 'none'"
    )


@cache
def environment() -> Environment:
    """The templates. Whatever they print is escaped, and what can't be printed in it is spelt out.

    Raises:
        DistnormError: jinja2 isn't installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise DistnormError(
            "the report is written with jinja2, which is not installed: pip install 'distnorm[report]'"
        ) from error

    def finalize(value: object) -> object:
        return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)

    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
    )
    made.filters["count_of"] = lambda found, word: plural(len(found), word)
    return made


def _trusted(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


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


def as_json(value: object) -> str:
    """JSON that can stand in HTML: no text in it can end the element that it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
