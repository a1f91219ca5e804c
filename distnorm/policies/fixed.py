"""A constant threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.policies.decision import EPS, Decision, handle_nonfinite
from distnorm.policies.policy import Policy, StepStatistics


def constant(total_norm: Tensor, max_norm: float, nonfinite: str = "propagate") -> Decision:
    """Clip to a fixed threshold: ``coef = min(1, max_norm / (total_norm + 1e-6))``.

    Args:
        total_norm: 0-d fp64.
        max_norm: the threshold; inf never clips.
        nonfinite: what a total norm that is not finite does; see `handle_nonfinite`.

    Reference: Pascanu et al., "On the difficulty of training recurrent neural networks",
        arXiv 1211.5063; `torch.nn.utils.clip_grad_norm_` for the 1e-6.
    """
    may_clip = not math.isinf(max_norm)
    if (
        nonfinite != "zero"
        and kernels.on_host(total_norm)
        and math.isfinite(norm := float(total_norm.numpy()))
    ):
        # The same numbers by fewer operators, which are dear where their code isn't in the caches.
        both = (min(1.0, max_norm / (norm + EPS)) if may_clip else 1.0, max_norm)
        coef, threshold = torch.tensor(both, dtype=torch.float64, device="cpu").unbind()
        return Decision(coef, threshold, may_clip)
    threshold = torch.full_like(total_norm, max_norm)
    coef = (threshold / (total_norm + EPS)).clamp(max=1.0) if may_clip else torch.ones_like(total_norm)
    return handle_nonfinite(Decision(coef, threshold, may_clip), total_norm, nonfinite)


class Constant(Policy):
    """Clip to ``clip.max_norm``; see `constant`."""

    name = "constant"
    looks_back = False

    def decide(self, step: StepStatistics) -> Decision:
        return constant(step.total_norm, self._max_norm, self._nonfinite)
