"""What stands in words and tables: figures of a whole run, alerts, skipped steps, differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from distnorm.monitor.compare import relative_difference
from distnorm.monitor.report.numbers import finite, percentiles, plural, share, short, written
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.tables import Table

_MAX_ROWS = 500


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a table, or with a sentence where there is nothing to list."""

    title: str
    key: str
    table: Table | None
    says: str


def facts(run: Run) -> list[tuple[str, str]]:
    """A run in a dozen figures."""
    steps = run.steps.rows
    if not steps:
        return [("Steps", "0")]
    middle, most, top = percentiles((step.norm for step in steps), (50, 99, 100))
    losses = finite(step.loss for step in steps)
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
    for word, values in (
        ("Tokens/s", percentiles((step.tokens_per_second for step in steps), (50,))),
        ("Learning rate", finite(step.learning_rate for step in steps)[-1:]),
    ):
        found += [(word, short(value)) for value in values if not math.isnan(value)]
    return found


def _or_none(value: float) -> str:
    return "none finite" if math.isnan(value) else short(value)


def summary_table(runs: Sequence[Run]) -> Table:
    """The figures of all runs, a row a run."""
    heads = max((facts(run) for run in runs), key=len)
    rows = []
    for run in runs:
        known = dict(facts(run))
        rows.append([run.name, *(known.get(word, "-") for word, _ in heads)])
    return Table(["run", *(word.lower() for word, _ in heads)], rows)


def origin(run: Run) -> list[str]:
    """From which commit and when the run was started, and with what; a line for each start."""
    return [
        "; ".join(
            filter(
                None,
                [
                    f"started {datetime.fromtimestamp(start.time, timezone.utc):%d %B %Y, %H:%M} UTC"
                    + (f" after step {start.step:,}" if start.step else ""),
                    f"commit {start.commit}" if start.commit else "",
                    start.versions,
                ],
            )
        )
        for start in run.starts
    ]


def alerts_section(run: Run) -> Section:
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
    return _section("Alerts", "alerts", heads, rows, none)


def skipped_section(run: Run) -> Section:
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
    return _section("Skipped steps", "skipped", heads, rows, none)


def _section(title: str, key: str, heads: Sequence[str], rows: Sequence[Sequence[str]], none: str) -> Section:
    more = f"{plural(len(rows) - _MAX_ROWS, 'more row')} not shown." if len(rows) > _MAX_ROWS else ""
    return Section(title, key, Table(heads, rows[:_MAX_ROWS]) if rows else None, more if rows else none)


def config_differences(runs: Sequence[Run]) -> Section:
    """The keys in which the configurations differ, a row a key."""
    found = [dict(_flat(run)) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in found for key in each)]
    rows = [
        [key, *(each.get(key, "-") for each in found)]
        for key in keys
        if len({each.get(key) for each in found}) > 1
    ]
    heads, none = ["key", *(run.name for run in runs)], "All runs have the same configuration."
    if not any(found):
        none = "No run has a config.yaml that can be read."
    return _section("Differences in configuration", "configs", heads, rows, none)


def norm_differences(runs: Sequence[Run]) -> Table:
    """Where each run's norms part from those of the first, and how far."""
    base = {step.step: step.norm for step in runs[0].steps.rows}
    rows = []
    for run in runs[1:]:
        pairs = [
            (relative_difference(base[step.step], step.norm), step.step)
            for step in run.steps.rows
            if step.step in base
        ]
        apart = [step for difference, step in pairs if difference > 0]
        most, at = max(pairs, default=(math.nan, 0))
        rows.append(
            [
                run.name,
                f"{len(pairs):,}",
                f"{len(apart):,}",
                f"{apart[0]:,}" if apart else "none",
                "-" if not apart else f"{short(most, 3)} at step {at:,}",
            ]
        )
    heads = (
        "run",
        "steps in common",
        "steps that differ",
        "first that differs",
        "largest relative difference",
    )
    return Table(heads, rows, f"Norms before clipping, compared with those of {runs[0].name}.")


def _flat(run: Run) -> Iterator[tuple[str, str]]:
    import yaml

    try:
        # An alias repeats a part: n short lines may mean 2^n leaves. What distnorm writes has none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(run.config, yaml.SafeLoader)):
            return
        data = yaml.safe_load(run.config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    yield from _leaves(data, "")


def _leaves(data: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, written(data)
