"""Clipping each element to a bound."""

from __future__ import annotations

import math

import torch

from distnorm.policies.decision import Decision
from distnorm.policies.policy import Policy, StepStatistics


class Value(Policy):
    """Put every element of every gradient within ``[-max_norm, max_norm]``.

    No norm is measured and nothing is reduced, so ``clip.nonfinite`` does nothing: an infinite
    element becomes a finite one, and NaN stays NaN. The coefficient is 1 and no max norm is in force.

    Reference: Mikolov, "Statistical language models based on neural networks" (2012), and
        `torch.nn.utils.clip_grad_value_`.
    """

    name = "value"
    reads = "nothing"

    def decide(self, step: StepStatistics) -> Decision:
        ones = torch.ones_like(step.total_norm)
        clamp = None if math.isinf(self._max_norm) else self._max_norm
        return Decision(ones, torch.full_like(ones, math.inf), may_clip=False, clamp=clamp)
