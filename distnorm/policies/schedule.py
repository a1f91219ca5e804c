"""A threshold that follows a curve over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distnorm.policies.decision import Decision
from distnorm.policies.fixed import constant
from distnorm.policies.policy import Policy, Seen, count


class Point(Protocol):
    """A place on a curve: from this step on, or at it, the factor is this."""

    @property
    def step(self) -> int: ...

    @property
    def factor(self) -> float: ...


class Schedule(Policy):
    """Clip to ``c(step) = max_norm * f(step)``, times a factor during warm-up.

    Steps are counted from 0, and a step whose norm is not finite is one of them: a schedule goes with the
    run, as the learning rate's does. Before the first point f is its factor, after the last one that one's.
    Between (s0, f0) and (s1, f1), with t = (step - s0) / (s1 - s0):

    - ``linear``: f0 + (f1 - f0) t
    - ``cosine``: f0 + (f1 - f0) (1 - cos(pi t)) / 2
    - ``steps``: f0
    - ``constant``: 1 everywhere, and no points.

    Args:
        max_norm: the unit of the factors; inf never clips.
        nonfinite: see `settle`.
        curve: one of the four.
        points: in the order of their steps, no step twice.
        warmup: the first so many steps ...
        warmup_factor: ... have their threshold multiplied by this.
    """

    name = "schedule"
    looks_back = False

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        curve: str = "constant",
        points: Sequence[Point] = (),
        warmup: int = 0,
        warmup_factor: float = 1.0,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._curve, self._points = curve, tuple(points)
        self._warmup, self._warmup_factor = warmup, warmup_factor
        self._step = 0

    def decide(self, seen: Seen) -> Decision:
        threshold = self._max_norm
        if not math.isinf(threshold):  # inf times 0 is no threshold
            threshold *= self._factor() * (self._warmup_factor if self._step < self._warmup else 1.0)
        self._step += 1
        return constant(seen.total_norm, threshold, self._nonfinite)

    def _factor(self) -> float:
        if not self._points:
            return 1.0
        before = [point for point in self._points if point.step <= self._step]
        after = self._points[len(before) :]
        if not before or not after or self._curve == "steps":
            return (before[-1] if before else after[0]).factor
        start, end = before[-1], after[0]
        part = (self._step - start.step) / (end.step - start.step)
        if self._curve == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return start.factor + (end.factor - start.factor) * part

    def _saved(self) -> dict[str, Any]:
        return {"step": self._step}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._step = count(state["step"])
