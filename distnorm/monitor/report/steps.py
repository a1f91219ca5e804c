"""The steps of a run: the columns of its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from distnorm.errors import RunError
from distnorm.monitor.records import METRICS_FILE
from distnorm.monitor.report.numbers import number, plural, step_number
from distnorm.monitor.report.row_reader import Row, UnreadableLines, read_rows

WINDOW = 100
"""Steps that the clip rate is over where the file has none."""


@dataclass(frozen=True, slots=True)
class Step:
    """One row; what it doesn't hold is nan. `norm` is before clipping, `time` in seconds since 1970."""

    step: int
    loss: float
    norm: float
    coef: float
    clipped_norm: float
    threshold: float
    clipped: bool
    finite: bool
    skipped: bool
    clip_rate: float
    noise_scale: float
    tokens_per_second: float
    learning_rate: float
    time: float
    groups: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Steps:
    """All steps of a run in ascending order, and what had to be left out or added to draw them."""

    rows: tuple[Step, ...]
    notes: tuple[str, ...]


def read_steps(path: Path) -> Steps:
    """The steps in a metrics file, or in that of a run's folder.

    Raises:
        RunError: there is no such file, or it has lines and none of them is a row.
    """
    file = (
        path / METRICS_FILE if path.is_dir() else path.resolve()
    )  # a link that the caller names is followed
    if not file.is_file():
        raise RunError(f"expected a run's folder or its {METRICS_FILE}, found no file {file}")
    broken = UnreadableLines(file.name)
    found: dict[int, Step] = {}
    again = 0
    for rows in read_rows(file, broken):
        for line, row in rows:
            if (step := step_of(row)) is None:
                broken.add(line)
                continue
            again += step.step in found
            found[step.step] = step
    if broken.count and not found:
        raise RunError(f"{file}, line {broken.first}: expected JSON with at least step and grad_norm")
    notes = [str(broken)] if broken.count else []
    if again:
        notes.append(f"{file.name}: {plural(again, 'row')} for a step again; the last of each step counts")
    ordered = [found[step] for step in sorted(found)]
    if ordered and all(math.isnan(step.clip_rate) for step in ordered):
        ordered = _with_rate(ordered)
        notes.append(f"{file.name} has no clip_rate; it is worked out here over {WINDOW} steps")
    return Steps(tuple(ordered), tuple(notes))


def step_of(row: Row) -> Step | None:
    """The step that a row is about; None where it is no such row."""
    try:
        return _step(row)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return None


def _step(row: Row) -> Step:
    norm, coef = number(row["grad_norm"]), number(row.get("clip_coef"))
    return Step(
        step=step_number(row["step"]),
        loss=number(row.get("loss")),
        norm=norm,
        coef=coef,
        clipped_norm=number(row.get("clipped_norm")),
        threshold=number(row.get("threshold")),
        clipped=bool(row.get("clipped", coef < 1)),
        finite=bool(row.get("finite", True)) and math.isfinite(norm),
        skipped=bool(row.get("skipped", False)),
        clip_rate=number(row.get("clip_rate")),
        noise_scale=number(row.get("noise_scale")),
        tokens_per_second=number(row.get("tokens_per_second")),
        learning_rate=number(row.get("learning_rate")),
        time=number(row.get("time")),
        groups={
            str(name): (number(of["grad_norm"]), number(of.get("clip_coef")), number(of.get("threshold")))
            for name, of in (row.get("groups") or {}).items()
        },
    )


def _with_rate(steps: list[Step]) -> list[Step]:
    """The steps with the share of clipped ones among the last `WINDOW`, the step's own included."""
    clipped, rated = 0, []
    for place, step in enumerate(steps):
        clipped += step.clipped - (steps[place - WINDOW].clipped if place >= WINDOW else 0)
        rated.append(replace(step, clip_rate=clipped / min(place + 1, WINDOW)))
    return rated
