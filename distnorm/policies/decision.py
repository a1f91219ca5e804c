"""A policy's decision about a step's gradients, and how a norm that is not finite changes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distnorm.errors import ConfigError

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with the gradients; 0-d fp64 tensors.

    Args:
        coef: what every gradient is multiplied by; the smallest of `each` where that is given.
        threshold: the max norm in force; inf where none is.
        may_clip: whether the coefficient can be other than 1.
        zero_unless: 0-d bool; gradients are set to zero unless it is true. None where they never are.
        skip: 0-d bool; whether the optimizer's step must not happen. None where the policy never asks that.
        each: fp64 [n]; a coefficient for every parameter of the whole model, in the order of
            `StepStatistics.parameter_norms`, or for every output unit, in the order of
            `StepStatistics.unit_norms`; in place of `coef`.
        clamp: every element is to be put within plus and minus this, and nothing multiplied.
    """

    coef: Tensor
    threshold: Tensor
    may_clip: bool = True
    zero_unless: Tensor | None = None
    skip: Tensor | None = None
    each: Tensor | None = None
    clamp: float | None = None

    def where(self, agreed: Tensor) -> Decision:
        """This decision where the 0-d bool tensor is true; else one that leaves the gradients alone."""
        each = None if self.each is None else self.each.where(agreed, 1.0)
        zero_unless = None if self.zero_unless is None else self.zero_unless | ~agreed
        return replace(self, coef=self.coef.where(agreed, 1.0), each=each, zero_unless=zero_unless)


def check_max_norm(max_norm: float | None) -> float:
    """The threshold as a float, inf for `None`.

    Raises:
        ConfigError: negative, NaN, or no number.
    """
    if max_norm is None:
        return math.inf
    try:
        value = float(max_norm)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(max_norm, bool) or not value >= 0:
        raise ConfigError(f"max_norm: expected a number of at least 0, inf, or null; found {max_norm!r}")
    return value


def coefficient(total_norm: Tensor, threshold: Tensor, nonfinite: str) -> Tensor:
    """``min(1, threshold / (total_norm + 1e-6))``, and 1 where the threshold is inf; 0-d fp64."""
    coef = (threshold / (total_norm + EPS)).clamp(max=1.0)
    # inf / inf would make NaN of every gradient; under the other modes `handle_nonfinite` replaces it.
    return coef.masked_fill(threshold == math.inf, 1.0) if nonfinite == "propagate" else coef


def handle_nonfinite(decision: Decision, total_norm: Tensor, nonfinite: str) -> Decision:
    """Change a decision as ``clip.nonfinite`` says, where the total norm is not finite.

    Args:
        decision: as the policy's formula gives it.
        total_norm: 0-d fp64.
        nonfinite: ``"skip"``, ``"raise"`` and ``"raise_now"`` leave the gradients alone (coef 1), ``"zero"``
            makes them zero (coef 0), ``"propagate"`` lets the formula run, as torch does.
    """
    if nonfinite == "propagate":
        return decision
    is_good, instead = is_finite(total_norm), 0.0 if nonfinite == "zero" else 1.0
    is_bad = is_good.logical_not()
    each = None if decision.each is None else decision.each.masked_fill(is_bad, instead)
    zero_unless = is_good if nonfinite == "zero" else None
    return replace(
        decision, coef=decision.coef.masked_fill(is_bad, instead), each=each, zero_unless=zero_unless
    )


def is_finite(norm: Tensor) -> Tensor:
    """Whether a norm, which is never negative, is finite: one operation, where `isfinite` is four."""
    return norm < math.inf


def of_each(each: Tensor, threshold: Tensor) -> Decision:
    """The decision of many coefficients, of which there may be none."""
    coef = each.min() if each.numel() else torch.ones_like(threshold)
    return Decision(coef, threshold, each=each)
