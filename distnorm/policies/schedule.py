"""A threshold that changes with the step, along a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distnorm.policies.decision import Decision, coefficient, handle_nonfinite
from distnorm.policies.fixed import constant
from distnorm.policies.policy import Policy, StepStatistics, count, scalar


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
        nonfinite: see `handle_nonfinite`.
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
        self._curve, self._warmup, self._warmup_factor = curve, warmup, warmup_factor
        pairs = [(float(point.step), point.factor) for point in points] or [(0.0, 1.0)]
        steps, factors = torch.tensor(pairs, dtype=torch.float64, device="cpu").unbind(dim=1)
        # The points never change; among the state they get where the gradients are.
        self._keep({"step": scalar(0), "points": steps, "factors": factors})

    def decide(self, step: StepStatistics) -> Decision:
        state = self._state_at(step.total_norm)
        if math.isinf(self._max_norm):  # inf times 0 is no threshold
            decision = constant(step.total_norm, self._max_norm, self._nonfinite)
        else:
            warmup = torch.ones_like(state["step"])
            warmup.masked_fill_(state["step"] < self._warmup, self._warmup_factor)
            threshold = self._factor(**state) * warmup * self._max_norm
            coef = coefficient(step.total_norm, threshold, self._nonfinite)
            decision = handle_nonfinite(Decision(coef, threshold), step.total_norm, self._nonfinite)
        state["step"].add_(1)
        return decision

    def _factor(self, step: Tensor, points: Tensor, factors: Tensor) -> Tensor:
        """The curve's factor, 0-d fp64. Before the first point and after the last, that one is both ends."""
        passed = (points <= step).sum()
        before, after = (passed - 1).clamp(min=0), passed.clamp(max=len(points) - 1)
        low, high = factors.take(before), factors.take(after)
        if self._curve == "steps":
            return low
        start, end = points.take(before), points.take(after)
        part = ((step - start) / (end - start)).masked_fill(before == after, 0.0)
        if self._curve == "cosine":
            part = (1 - (part * math.pi).cos()) / 2
        return low + (high - low) * part

    def _saved(self) -> dict[str, Any]:
        return {"step": int(self._state["step"].item())}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._keep({"step": scalar(count(state["step"]))})
