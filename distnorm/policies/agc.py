"""Clipping each output unit by the norm of its weights."""

from __future__ import annotations

import math

import torch

from distnorm.policies.decision import Decision, handle_nonfinite, of_each
from distnorm.policies.policy import Policy, StepStatistics


class Agc(Policy):
    """Adaptive gradient clipping, for every output unit i:

    ``G_i * min(1, lambda * max(norm(W_i), eps) / norm(G_i))``

    There is no max norm; the threshold reported is inf.

    Args:
        nonfinite: see `handle_nonfinite`.
        lambda_: the largest ratio of a unit's gradient to its weights.
        eps: weights of a smaller norm count as of this one, so that those that begin at 0 can move.

    Reference: Brock et al., "High-performance large-scale image recognition without normalization",
        arXiv 2102.06171.
    """

    name = "agc"
    reads = "units"

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        lambda_: float = 0.01,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._lambda, self._eps = lambda_, eps

    def decide(self, step: StepStatistics) -> Decision:
        assert step.unit_norms is not None
        assert step.unit_weight_norms is not None
        allowed = step.unit_weight_norms.clamp(min=self._eps) * self._lambda
        each = (allowed / step.unit_norms).clamp(max=1.0)  # a gradient of 0 gives inf, hence 1
        decision = of_each(each, torch.full_like(step.total_norm, math.inf))
        return handle_nonfinite(decision, step.total_norm, self._nonfinite)
