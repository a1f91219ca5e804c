"""Clipping norms that are far above their running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distnorm.policies.decision import Decision, coefficient, handle_nonfinite, is_finite
from distnorm.policies.policy import Policy, StepStatistics, count, number, scalar


class ZClip(Policy):
    """Clip a norm N that is more than z_t standard deviations above the mean of those before it:

    ``z = (N - mu) / (sigma + eps)``; where z > z_t, the threshold is
    ``clip_factor * (mu + z_t * sigma * z_t / z)``, or mu with `clip_option` mean. In `mode` percentile a norm
    above ``mu + z_t * sigma`` is clipped to that.

    The first `warmup` finite norms are only collected; their mean and (population) variance start

    ``mu <- alpha mu + (1 - alpha) x``, ``sigma^2 <- alpha sigma^2 + (1 - alpha) (x - mu)^2`` with the new mu,

    where x is the norm after this clipping: the threshold where N is clipped, else N. With
    `skip_update_on_spike` a norm that is clipped leaves both alone. What ``max_norm`` does besides doesn't
    enter: it bounds the threshold, also during warm-up.

    The threshold reported is the one that the norm was clipped to, or else the norm above which it would have
    been, ``mu + z_t (sigma + eps)`` or that of `mode` percentile; inf during warm-up without a ``max_norm``.

    Args:
        max_norm: a bound of the threshold.
        nonfinite: see `handle_nonfinite`. A norm that is not finite changes nothing, and does not
            count as a step of warm-up.
        alpha: the decay of mean and variance.
        z_t: the z-score above which a norm is clipped.
        warmup: how many norms are collected first.
        eps: keeps z finite where all norms were the same.
        mode: ``"zscore"`` or ``"percentile"``.
        clip_option: ``"adaptive_scaling"`` or ``"mean"``; percentile doesn't use it, nor `clip_factor`.
        clip_factor: the threshold of adaptive_scaling is multiplied by it.
        skip_update_on_spike: whether norms that are clipped leave mean and variance alone.

    Reference: Kumar et al., "ZClip: adaptive spike mitigation for LLM pre-training", arXiv 2504.02507, and
        for the last four its authors' code.
    """

    name = "zclip"

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        alpha: float = 0.97,
        z_t: float = 2.5,
        warmup: int = 25,
        eps: float = 1e-6,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._option = clip_option if mode == "zscore" else mode
        self._clip_factor, self._skips = clip_factor, skip_update_on_spike
        self._alpha, self._z_t, self._warmup, self._eps = alpha, z_t, warmup, eps
        self._load({"steps": 0, "mean": 0.0, "variance": 0.0})

    def decide(self, step: StepStatistics) -> Decision:
        state, norm = self._state_at(step.total_norm), step.history_norm
        mean, sigma, is_ready = state["mean"], state["variance"].sqrt(), state["steps"] >= self._warmup
        spread = sigma + self._eps
        z = (norm - mean) / spread
        edge = torch.add(mean, sigma if self._option == "percentile" else spread, alpha=self._z_t)
        if self._option == "percentile":
            stands_out, lower = (norm > edge) & is_ready, edge
        else:
            stands_out, lower = (z > self._z_t) & is_ready, mean
            if self._option == "adaptive_scaling":
                lower = torch.addcdiv(mean, sigma, z, value=self._z_t**2) * self._clip_factor
        edge = edge.masked_fill(is_ready.logical_not(), math.inf)
        threshold = torch.where(stands_out, lower, edge).clamp(max=self._max_norm)
        applied = threshold.masked_fill(stands_out.logical_not(), self._max_norm)
        enters = is_finite(norm) & stands_out.logical_not() if self._skips else is_finite(norm)
        self._take(state, torch.where(stands_out, lower, norm), enters, is_ready)
        coef = coefficient(step.total_norm, applied, self._nonfinite)
        return handle_nonfinite(Decision(coef, threshold), step.total_norm, self._nonfinite)

    def _take(self, state: Mapping[str, Tensor], value: Tensor, enters: Tensor, is_ready: Tensor) -> None:
        """Both statistics go on in one form: during warm-up with the weight 1 / n, which gives the plain mean
        and, by Welford's product of differences to the old and the new mean, the plain variance."""
        weight = state["steps"].add_(enters).reciprocal().masked_fill(is_ready, 1 - self._alpha)
        mean = torch.lerp(state["mean"], value, weight)
        rest = value - mean
        square = rest * torch.where(is_ready, rest, value - state["mean"])
        variance = torch.lerp(state["variance"], square, weight)
        state["mean"].copy_(torch.where(enters, mean, state["mean"]))
        state["variance"].copy_(torch.where(enters, variance, state["variance"]))

    def _saved(self) -> dict[str, Any]:
        state = self._state
        mean, variance = state["mean"].item(), state["variance"].item()
        return {"steps": int(state["steps"].item()), "mean": mean, "variance": variance}

    def _load(self, state: Mapping[str, Any]) -> None:
        steps, mean, variance = count(state["steps"]), number(state["mean"]), number(state["variance"])
        if variance < 0:
            raise ValueError(variance)
        self._keep({"steps": scalar(steps), "mean": scalar(mean), "variance": scalar(variance)})
