"""A threshold from the distribution of the norms so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from distnorm.policies.decision import Decision, coefficient, handle_nonfinite, is_finite
from distnorm.policies.policy import Policy, StepStatistics
from distnorm.policies.window import held, push, window


class Percentile(Policy):
    """AutoClip: clip to the p-th percentile of the norms so far, this step's among them.

    ``c = percentile(last `window` norms before clipping, p)``, between neighbours linear, as in numpy; never
    above ``max_norm``. The window is bounded, where the paper keeps every norm.

    Args:
        max_norm: a bound of the threshold.
        nonfinite: see `handle_nonfinite`. A norm that is not finite doesn't enter the window.
        p: the percentile, 0 to 100.
        window: how many norms are kept.

    Reference: Seetharaman et al., "AutoClip: adaptive gradient clipping for source separation networks",
        arXiv 2007.14469.
    """

    name = "percentile"

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        p: float = 10.0,
        window: int = 1024,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._quantile, self._size = p / 100, window
        self._load({"history": ()})

    def decide(self, step: StepStatistics) -> Decision:
        state = self._state_at(step.total_norm)
        push(state, step.history_norm, is_finite(step.history_norm))
        ordered, last = state["values"].sort().values, (state["count"] - 1).clamp(min=0)
        at = last * self._quantile
        low = at.floor()
        high = torch.minimum(low + 1, last)
        percentile = torch.lerp(ordered.take(low.long()), ordered.take(high.long()), at - low)
        # An empty window holds inf alone, and inf - inf is NaN.
        threshold = percentile.nan_to_num(math.inf, math.inf).clamp(max=self._max_norm)
        coef = coefficient(step.total_norm, threshold, self._nonfinite)
        return handle_nonfinite(Decision(coef, threshold), step.total_norm, self._nonfinite)

    def _saved(self) -> dict[str, Any]:
        return {"history": held(self._state)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._keep(window(self._size, state["history"]))
