"""Clipping each parameter by its own norm."""

from __future__ import annotations

import math
import sys

from distnorm.policies.decision import Decision, handle_nonfinite, of_each
from distnorm.policies.fixed import constant
from distnorm.policies.policy import Policy, StepStatistics


class PerTensor(Policy):
    """Scale every parameter's gradient g to ``g * c / max(norm(g), c)``, with c the ``max_norm``.

    The norm is that of the whole parameter, not of a shard of it.

    Args:
        max_norm: c; inf never clips.
        nonfinite: see `handle_nonfinite`.
        rms: whether ``norm(g) / sqrt(elements)`` stands for the norm.

    Reference: TensorFlow's `clip_by_norm`, and with `rms` optax's `clip_by_block_rms`, from Shazeer and
        Stern, "Adafactor", arXiv 1804.04235.
    """

    name = "per_tensor"
    reads = "parameters"

    def __init__(
        self, max_norm: float = math.inf, nonfinite: str = "propagate", *, rms: bool = False
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._rms = rms

    def decide(self, step: StepStatistics) -> Decision:
        unclipped = constant(step.total_norm, math.inf, self._nonfinite)
        if math.isinf(self._max_norm):
            return unclipped
        norms = step.parameter_norms
        assert norms is not None
        if self._rms:
            assert step.numels is not None
            norms = norms / step.numels.clamp(min=1).sqrt()
        # A threshold of 0 makes 0 of a gradient of 0, not 0 / 0.
        each = self._max_norm / norms.clamp(min=max(self._max_norm, sys.float_info.min))
        threshold = unclipped.threshold.clamp(max=self._max_norm)
        return handle_nonfinite(of_each(each, threshold), step.total_norm, self._nonfinite)
