"""The steps of runs as columns of numbers, which the page's script draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from distnorm.monitor.report.numbers import packed
from distnorm.monitor.report.steps import Step

NUMBERS = (
    *("time", "norm", "threshold", "loss", "coef", "clip_rate", "learning_rate", "tokens_per_second"),
    "noise_scale",
)
CLIPPED, SKIPPED, NOT_FINITE = 1, 2, 4
MOST_STEPS, BINS = 6_000, 1_000
"""A run with more steps than this is drawn through the extremes of so many bins."""


def columns(steps: Sequence[Step]) -> dict[str, Any]:
    """Steps as typed arrays: `step`, `flags`, `NUMBERS`, and `group:NAME` for the norms of groups.

    Numbers that no step has are left out; a single one that isn't there or isn't finite is nan.
    """
    found: dict[str, Any] = {
        "step": packed((step.step for step in steps), "i"),
        "flags": packed((_flags(step) for step in steps), "i"),
    }
    for name in NUMBERS:
        values = [getattr(step, name) for step in steps]
        if any(map(math.isfinite, values)):
            found[name] = packed(value if math.isfinite(value) else math.nan for value in values)
    for group in dict.fromkeys(name for step in steps for name in step.groups):
        norms = (step.groups[group][0] if group in step.groups else math.nan for step in steps)
        found[f"group:{group}"] = packed(norm if math.isfinite(norm) else math.nan for norm in norms)
    return found


def thinned(runs: Sequence[Sequence[Step]]) -> list[Sequence[Step]]:
    """The steps of runs, those of long ones thinned: each number's lowest and highest of each bin stay.

    A step that one run keeps is kept of all, so that differences between runs have both their ends.
    """
    if all(len(steps) <= MOST_STEPS for steps in runs):
        return list(runs)
    first = min(steps[0].step for steps in runs if steps)
    last = max(steps[-1].step for steps in runs if steps)
    kept = {first, last}
    for steps in runs:
        for name in NUMBERS:
            kept |= _extremes(steps, lambda step, name=name: getattr(step, name), first, last)  # type: ignore[misc]
        kept |= _extremes(steps, _flags, first, last)
    return [[step for step in steps if step.step in kept] for steps in runs]


def _extremes(steps: Sequence[Step], value: Callable[[Step], float], first: int, last: int) -> set[int]:
    low: dict[int, tuple[float, int]] = {}
    high: dict[int, tuple[float, int]] = {}
    width = (last - first) / BINS or 1.0
    for step in steps:
        number = value(step)
        if math.isfinite(number):
            place, found = int((step.step - first) / width), (number, step.step)
            low[place] = min(low.get(place, found), found)
            high[place] = max(high.get(place, found), found)
    return {step for ends in (low, high) for _, step in ends.values()}


def _flags(step: Step) -> int:
    return CLIPPED * step.clipped + SKIPPED * step.skipped + NOT_FINITE * (not step.finite)
