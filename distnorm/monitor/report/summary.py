"""What stands in words and tables: figures of a whole run, alerts, skipped steps, configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from distnorm.monitor.report.numbers import finite, percentiles, plural, share, short
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.tables import escaped, table

_MAX_ROWS = 500


def facts(run: Run) -> list[tuple[str, str]]:
    """A run in a dozen figures."""
    steps = run.steps.rows
    if not steps:
        return [("Steps", "0")]
    middle, most, top = percentiles((step.norm for step in steps), (50, 99, 100))
    losses = finite(step.loss for step in steps)
    speed = percentiles((step.tokens_per_second for step in steps), (50,))[0]
    found = [
        ("Steps", f"{len(steps):,}"),
        ("Last loss", short(losses[-1]) if losses else "none finite"),
        ("Median norm", _or_none(middle)),
        ("99th percentile", _or_none(most)),
        ("Highest norm", _or_none(top)),
        ("Clipped", share(sum(step.clipped for step in steps) / len(steps))),
        ("Skipped", f"{sum(step.skipped for step in steps):,}"),
        ("Not finite", f"{sum(not step.finite for step in steps):,}"),
        ("Alerts", f"{len(run.alerts):,}" if run.has_alerts else "no file"),
    ]
    return found if math.isnan(speed) else [*found, ("Tokens/s", short(speed))]


def _or_none(value: float) -> str:
    return "none finite" if math.isnan(value) else short(value)


def tiles(run: Run) -> str:
    """The figures of one run side by side."""
    each = "".join(
        f"<div><dt>{escaped(word)}</dt><dd>{escaped(value)}</dd></div>" for word, value in facts(run)
    )
    return f'<p class="path">{escaped(str(run.folder))}</p><dl class="tiles">{each}</dl>'


def summary_table(runs: Sequence[Run]) -> str:
    """The figures of all runs, a row a run."""
    heads = max((facts(run) for run in runs), key=len)
    rows = []
    for run in runs:
        known = dict(facts(run))
        rows.append([run.name, *(known.get(word, "-") for word, _ in heads)])
    return table(["run", *(word.lower() for word, _ in heads)], rows)


def alerts_section(run: Run, key: str) -> str:
    """All alerts, the first 500 where there are more."""
    rows = [
        (
            f"{alert.step:,}",
            alert.kind.replace("_", " "),
            alert.layer or "-",
            alert.ranks or "-",
            "-" if math.isnan(alert.value) else short(alert.value),
            "-" if math.isnan(alert.bound) else short(alert.bound),
            alert.message,
        )
        for alert in run.alerts
    ]
    none = (
        "No alerts: every rule that is on found nothing."
        if run.has_alerts
        else "This run has no alerts.jsonl: its alerts are off, or an older version wrote it."
    )
    heads = ("step", "kind", "layer", "ranks", "value", "bound", "message")
    return _section(f"{key}-alerts", "Alerts", heads, rows, none)


def skipped_section(run: Run, key: str) -> str:
    """The steps that the optimizer skipped, and those whose norm is not finite."""
    rows = [
        (
            f"{step.step:,}",
            "yes" if step.skipped else "no",
            short(step.norm),
            short(step.threshold) if math.isfinite(step.threshold) else "none",
            short(step.loss),
        )
        for step in run.steps.rows
        if step.skipped or not step.finite
    ]
    heads = ("step", "skipped", "norm before clipping", "threshold", "loss")
    none = "No step was skipped, and every norm is finite." if run.steps.rows else "No step was written yet."
    return _section(f"{key}-skipped", "Skipped steps", heads, rows, none)


def _section(key: str, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], none: str) -> str:
    shown = table(heads, rows[:_MAX_ROWS]) if rows else f"<p>{escaped(none)}</p>"
    more = f"<p>{plural(len(rows) - _MAX_ROWS, 'more row')} not shown.</p>" if len(rows) > _MAX_ROWS else ""
    return f'<article class="{key.partition("-")[2]}"><h3 id="{key}">{title}</h3>{shown}{more}</article>'


def config_section(run: Run, key: str) -> str:
    """The configuration as it stands in the run's folder."""
    if not run.config:
        return f'<article><h3 id="{key}-config">Config</h3><p>This run has no config.yaml.</p></article>'
    return (
        f'<article><h3 id="{key}-config">Config</h3><details class="config"><summary>config.yaml</summary>'
        f'<pre tabindex="0">{escaped(run.config)}</pre></details></article>'
    )


def config_differences(runs: Sequence[Run]) -> str:
    """The keys in which the configurations differ, a row a key."""
    found = [dict(_flat(run)) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in found for key in each)]
    rows = [
        [key, *(each.get(key, "-") for each in found)]
        for key in keys
        if len({each.get(key) for each in found}) > 1
    ]
    if not any(found):
        text = "<p>No run has a config.yaml that can be read.</p>"
    elif not rows:
        text = "<p>All runs have the same configuration.</p>"
    else:
        text = table(["key", *(run.name for run in runs)], rows)
    return f"<article><h3>Differences in configuration</h3>{text}</article>"


def _flat(run: Run) -> Iterator[tuple[str, str]]:
    import yaml

    try:
        data = yaml.safe_load(run.config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    yield from _leaves(data, "")


def _leaves(data: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, "null" if data is None else str(data)
