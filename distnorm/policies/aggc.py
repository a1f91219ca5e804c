"""Keeping a group's norm within an interval around what it has been."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distnorm.policies.decision import Decision, handle_nonfinite, is_finite
from distnorm.policies.policy import Policy, StepStatistics, count, number, scalar

_EPS = 1e-12


class Aggc(Policy):
    """Adaptive group-wise clipping: scale a group's norm N to the interval [L, U] around its running mean S.

    ``L = max(min_norm, low * S)``, ``U = high * S``; where N > U, ``c = max(U / N, max_down)``; where N < L
    and `raise_small`, ``c = min(L / N, max_up)``; else ``c = 1``. Then ``S <- beta S + (1 - beta) c N``,
    which starts at 0: while S is 0 there is no U.

    Each of `clip.groups` that has this policy has its own S. With `total_steps` T, `low` and `high` go in a
    line to `low_late` and `high_late` while the step, counted from 0, goes from ``switch * T`` to
    ``(switch + transition) * T``. A coefficient above 1 enlarges gradients: only with `raise_small`. There
    is no max norm; the threshold reported is U, or inf while there is none.

    Args:
        nonfinite: see `handle_nonfinite`. A norm that is not finite leaves S alone, and counts as a step.
        beta: the decay of S.
        low, high: the interval's ends, as multiples of S.
        min_norm: L is this at least.
        raise_small: whether norms under L are raised.
        max_down, max_up: the smallest and the largest coefficient; None: no such bound.
        low_late, high_late: the multiples later on; None: as before.
        total_steps: T; None: `low` and `high` stay.
        switch, transition: when they begin to change, and how long it takes, as shares of T.

    Reference: Li et al., "AGGC: adaptive group gradient clipping for stabilizing large language model
        training", arXiv 2601.11864. Formulas are those of its authors' code, whose scripts set the defaults.
    """

    name = "aggc"

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        beta: float = 0.95,
        low: float = 0.95,
        high: float = 0.6,
        min_norm: float = 0.0,
        raise_small: bool = False,
        max_down: float | None = 0.9,
        max_up: float | None = 1.1,
        low_late: float | None = 0.98,
        high_late: float | None = 0.7,
        total_steps: int | None = None,
        switch: float = 0.4,
        transition: float = 0.3,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._beta, self._min_norm, self._raises, self._total = beta, min_norm, raise_small, total_steps
        self._max_down, self._max_up = max_down, max_up
        self._low = low, low if low_late is None else low_late
        self._high = high, high if high_late is None else high_late
        self._switch, self._transition = switch, max(transition, 1e-6)
        self._load({"steps": 0, "mean": 0.0})

    def decide(self, step: StepStatistics) -> Decision:
        state, norm = self._state_at(step.total_norm), step.history_norm
        mean, late = state["mean"], self._late(state["steps"])
        upper = mean * self._between(*self._high, late)
        lower = (mean * self._between(*self._low, late)).clamp(min=self._min_norm)
        is_above = (norm > upper + _EPS) & (upper > 0)
        down, up = upper / (norm + _EPS), lower / (norm + _EPS)
        coef = torch.ones_like(norm)
        if self._raises:
            up = up if self._max_up is None else up.clamp(max=self._max_up)
            coef = torch.where((norm < lower - _EPS) & (norm > 0), up, coef)
        down = down if self._max_down is None else down.clamp(min=self._max_down)
        coef = torch.where(is_above, down, coef)
        counts = is_finite(norm)
        mean.copy_(torch.where(counts, torch.lerp(mean, coef * norm, 1 - self._beta), mean))
        state["steps"].add_(1)
        threshold = upper.masked_fill(upper <= 0, math.inf)
        return handle_nonfinite(Decision(coef, threshold), step.total_norm, self._nonfinite)

    def _late(self, steps: Tensor) -> Tensor:
        """How far the multiples have changed, 0 to 1."""
        if self._total is None:
            return torch.zeros_like(steps)
        return ((steps / self._total - self._switch) / self._transition).clamp(0.0, 1.0)

    @staticmethod
    def _between(first: float, last: float, late: Tensor) -> Tensor:
        return first * (1 - late) + last * late

    def _saved(self) -> dict[str, Any]:
        return {"steps": int(self._state["steps"].item()), "mean": self._state["mean"].item()}

    def _load(self, state: Mapping[str, Any]) -> None:
        steps, mean = count(state["steps"]), number(state["mean"])
        if mean < 0:
            raise ValueError(mean)
        self._keep({"steps": scalar(steps), "mean": scalar(mean)})
