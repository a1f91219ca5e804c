"""A threshold from the distribution of the norms so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.policies.decision import Decision, coefficient, handle_nonfinite, is_finite
from distnorm.policies.policy import Policy, StepStatistics
from distnorm.policies.window import held, push, window

_FIRST = 1024  # norms for which there is room at first, where all are kept


class Percentile(Policy):
    """AutoClip: clip to the p-th percentile of the norms so far, this step's among them.

    ``c = percentile(last `window` norms before clipping, p)``, between neighbours linear, as in numpy; never
    above ``max_norm``. The window is bounded by default; the paper and its authors' code keep every norm, as
    ``window: null`` does: its memory doubles when it is full, its steps take longer and longer, as all norms
    are sorted, and a CUDA graph can't hold it.

    Args:
        max_norm: a bound of the threshold.
        nonfinite: see `handle_nonfinite`. A norm that is not finite doesn't enter the window.
        p: the percentile, 0 to 100.
        window: how many norms are kept; None: all.

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
        window: int | None = 1024,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._quantile, self._size = p / 100, window
        self._most = 0  # so many norms are held, or fewer: some may not have been finite
        self._load({"history": ()})

    def decide(self, step: StepStatistics) -> Decision:
        state = self._state_at(step.total_norm)
        if self._size is None:
            self._make_room(state)
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

    def _make_room(self, state: dict[str, Tensor]) -> None:
        """Double the window where it may be full. How many norms it holds is known on the device alone."""
        kernels.refuse_capture(
            "expected a window under policy percentile, found window = null, whose history grows"
        )
        if state is not self._state:  # of a dry run
            return
        values = state["values"]
        if self._most == values.numel():
            state["values"] = torch.cat([torch.full_like(values, math.inf), values])
        self._most += 1

    def take_over(self, other: Policy) -> None:
        assert isinstance(other, Percentile)
        super().take_over(other)
        self._most = other._most

    def _saved(self) -> dict[str, Any]:
        return {"history": held(self._state)}

    def _load(self, state: Mapping[str, Any]) -> None:
        history = state["history"]
        doubled = _FIRST << max(0, math.ceil(math.log2(max(len(history), 1) / _FIRST)))
        self._keep(window(self._size or doubled, history))
        self._most = len(history)
