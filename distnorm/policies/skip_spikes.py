"""Steps that stand out are not made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distnorm.errors import DistnormError
from distnorm.policies.decision import Decision, is_finite
from distnorm.policies.fixed import constant
from distnorm.policies.policy import Policy, StepStatistics, rounded
from distnorm.policies.window import held, push, window


class SkipSpikes(Policy):
    """Skip the step if the norm before clipping, or the loss, is above ``mean + k * sigma`` of those before.

    Mean and (sample) standard deviation are those of the last `window` values before this step's, of steps
    made and skipped, and count once there are `after` of them. A value above the absolute bound `above` is
    skipped from the first step on; so is a loss that is not finite where the norm is. Gradients of a step
    that is made are clipped to ``max_norm``, as by `constant`.

    The threshold reported is the smaller of ``max_norm`` and the norm above which a step is skipped.

    Args:
        max_norm: what gradients are clipped to; inf never clips.
        nonfinite: see `handle_nonfinite`. It alone decides where the norm is not finite: such a step enters
            no history, and isn't skipped by this policy.
        k: how many standard deviations above the mean a spike begins.
        window: how many values are kept.
        after: how many there must be; at most `window`.
        on: ``"norm"`` or ``"loss"``, which then has to be given with every step.
        above: the absolute bound, or None.

    Reference: OLMo-core's `SkipStepOptimizer` (which checks both, and once there are max(20, window // 2)
        values with this step's); skipped batches are from Chowdhery et al., "PaLM", arXiv 2204.02311.
    """

    name = "skip_spikes"

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        k: float = 6.0,
        window: int = 128,
        after: int = 64,
        on: str = "norm",
        above: float | None = None,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._k, self._size, self._after, self._on = k, window, after, on
        self._above = math.inf if above is None else above
        self.wants_loss = on == "loss"
        self._load({"on": on, "history": ()})

    def decide(self, step: StepStatistics) -> Decision:
        state = self._state_at(step.total_norm)
        value, limit, is_norm_finite = self._value(step), self._limit(state), is_finite(step.total_norm)
        is_value_finite = is_finite(value.abs())
        skip = ((value > limit) | ~is_value_finite) & is_norm_finite
        push(state, value, is_value_finite & is_norm_finite)
        decision = constant(step.total_norm, self._max_norm, self._nonfinite)
        threshold = torch.minimum(decision.threshold, limit) if self._on == "norm" else decision.threshold
        return replace(decision, threshold=threshold, skip=skip)

    def _value(self, step: StepStatistics) -> Tensor:
        if self._on == "norm":
            return step.history_norm
        if step.loss is None:
            raise DistnormError(
                "expected a loss with every step under policy skip_spikes with on: loss, found none"
            )
        return rounded(step.loss)

    def _limit(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value above which this step is a spike; 0-d fp64."""
        values, count = state["values"], state["count"]
        is_empty = values == math.inf
        mean = values.masked_fill(is_empty, 0.0).sum() / count
        rest = (values - mean).masked_fill(is_empty, 0.0)
        sigma = (rest.dot(rest) / (count - 1)).sqrt()
        limit = torch.add(mean, sigma, alpha=self._k).masked_fill(count < self._after, math.inf)
        return limit.clamp(max=self._above)

    def _saved(self) -> dict[str, Any]:
        return {"on": self._on, "history": held(self._state)}

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["on"] != self._on:
            raise ValueError(state["on"])
        self._keep(window(self._size, state["history"]))
